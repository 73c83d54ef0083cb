"""InstaHide under Accelerate: a prepared DataLoader of encodings. Needs `pip install 'frostglass[hf]'`.

python examples/accelerate_loop.py        (or: accelerate launch examples/accelerate_loop.py)
"""

from __future__ import annotations

import torch
from accelerate import Accelerator

from frostglass.core.randomness import Rng
from frostglass.defenses.encoded_dataset import EncodedDataset, encoded_loader
from frostglass.defenses.instahide import InstaHide
from frostglass.vision.byte_images import load_bytes
from frostglass.vision.networks import build


def main(epochs: int = 2, limit: int | None = None) -> tuple[list[float], EncodedDataset]:
    """Losses of all steps, and the data set with its ledger."""
    accelerator = Accelerator(cpu=True)
    digits = load_bytes("digits", size=8, limit=limit)
    data = EncodedDataset((digits.images, digits.labels), InstaHide(k=4), num_classes=10)
    model = build("small_bn_cnn", classes=10, channels=1, size=8, rng=Rng.from_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, encoded_loader(data, 64))
    losses = []
    for epoch in range(epochs):
        data.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            losses.append(float(loss))
    # accelerator.save_state would store generator states; `frostglass check-checkpoint` finds them. Save the weights:
    # accelerator.save_model(model, "out")
    return losses, data


if __name__ == "__main__":
    found, _ = main()
    print(f"first loss {found[0]:.3f}, last {found[-1]:.3f}")
