"""InstaHide in Hugging Face's Trainer, as a data collator. Needs `pip install 'frostglass[hf]'`.

python examples/hf_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from frostglass.core.randomness import Rng
from frostglass.defenses.encoded_dataset import EncodedDataset, KeywordCollate
from frostglass.defenses.instahide import InstaHide
from frostglass.vision.byte_images import load_bytes
from frostglass.vision.networks import build


class Classifier(nn.Module):
    """Takes and returns what the Trainer expects; the loss takes soft labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("small_bn_cnn", classes=10, channels=1, size=8, rng=Rng.from_seed(0))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """{"loss", "logits"}."""
        logits = self.net(pixel_values)
        return {"logits": logits} | (
            {} if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels)}
        )


def main(steps: int = 40, limit: int | None = None) -> tuple[float, EncodedDataset]:
    """Mean training loss, and the data set with its ledger."""
    digits = load_bytes("digits", size=8, limit=limit)
    data = EncodedDataset((digits.images, digits.labels), InstaHide(k=4), num_classes=10)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=64, use_cpu=True, report_to=[], disable_tqdm=True,
            learning_rate=1e-3, save_strategy="no",  # its checkpoints hold generator states (rng_state.pth)
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(Classifier(), arguments, data_collator=KeywordCollate(), train_dataset=data)
        return float(trainer.train().training_loss), data


if __name__ == "__main__":
    print(f"mean loss {main()[0]:.3f}")
