"""How right the global network of a federation is, seen plainly and over encodings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frostglass.defenses.honesty import PrivacyCaution
from frostglass.defenses.inference import average_predictions
from frostglass.federated.exchange import State
from frostglass.federated.federation import Federation
from frostglass.federated.local_client import like_pool
from frostglass.numerics.called import copied
from frostglass.numerics.local_update import in_mode

_TEST_BATCH = 500


@dataclass(frozen=True)
class Accuracy:
    """Of the global network on test images.

    Args:
        plain: share that is right when images are seen as they are.
        encoded: share that is right by the mean over encodings; None where clients train on images.
    """

    plain: float
    encoded: float | None

    @property
    def best(self) -> float:
        """Seen the way that clients train, where that is known."""
        return self.plain if self.encoded is None else self.encoded


@torch.no_grad()
def accuracy_of(made: Federation, state: State) -> Accuracy:
    """Of a global state on the test images.

    Where clients keep their BatchNorm statistics, those of the test batches are used.
    """
    model = copied(made.model)
    model.load_state_dict(dict(state))
    kept = made.plan.buffers == "keep" and made.has_batch_norm
    with in_mode(model, "train" if kept else "eval"):
        plain = _share(made, lambda images: model(_seen(made, images)))
        encoded = _share_encoded(made, model)
    return Accuracy(plain, encoded)


def _seen(made: Federation, images: Tensor) -> Tensor:
    encoder = made.encoder(None)
    if encoder is not None:
        return encoder.plain_for_inference(images)
    return images * 2 - 1 if made.inside.encodes else images


def _share(made: Federation, predict: Callable[[Tensor], Tensor]) -> float:
    right = 0
    parts = list(torch.arange(len(made.test)).split(_TEST_BATCH))
    if len(parts) > 1 and len(parts[-1]) == 1:  # which has no statistics, where those of the batch are used
        parts[-2:] = [torch.cat(parts[-2:])]
    for part in parts:
        found = predict(made.test.images[part].float() / 255).argmax(1)
        right += int((found == made.test.labels[part]).sum())
    return right / len(made.test)


def _share_encoded(made: Federation, model: nn.Module) -> float | None:
    """Mixed with public images, or else with other test images: the server has none of the clients'."""
    encoder, n = made.encoder(None), made.plan.evaluation.encodings
    if encoder is None or not n:
        return None
    partners = None if encoder.public is not None else made.test.images.float() / 255

    def predict(images: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrivacyCaution)
            given = like_pool(images, encoder)
            encoded = encoder.encode_for_inference(given, n, made.plan.evaluation.min_private, partners)
        return average_predictions(model(encoded.images.float()), n)

    return _share(made, predict)
