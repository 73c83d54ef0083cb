"""InstaHide in a plain training loop: every epoch encodes the whole private set anew, or trains on what was kept.

    python examples/plain_loop.py

InstaHide is broken and gives no (epsilon, delta): `encoder.report()` says what a setting gives away.
"""

from __future__ import annotations

import torch

from frostglass.core.randomness import Rng
from frostglass.defenses.instahide import InstaHide, average_predictions
from frostglass.vision.byte_images import load_bytes
from frostglass.vision.networks import build


def main(epochs: int = 5, limit: int | None = None) -> float:
    """Trains on digits and returns the accuracy of encoded inference on the last 360 images."""
    digits = load_bytes("digits", size=8)
    images, labels = digits.images[:-360][:limit], digits.labels[:-360][:limit]
    model = build("small_bn_cnn", classes=10, channels=1, size=8, rng=Rng.from_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    encoder = InstaHide(k=2, mask="none")  # mask = "none" is Mixup; the sign mask costs accuracy and protects nothing
    for epoch in range(epochs):
        for x, y in encoder.epoch((images, labels), batch_size=64, num_classes=10):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)  # soft targets
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {float(loss):.3f}")
    model.eval()
    test, truth = digits.images[-360:], digits.labels[-360:]
    with torch.no_grad():
        encoded = encoder.encode_for_inference(test, n=10, partners=images)
        predictions = average_predictions(model(encoded.images), n=10)
    print(encoder.report())
    return float((predictions.argmax(1) == truth).float().mean())


if __name__ == "__main__":
    print(f"accuracy {main():.3f}")
