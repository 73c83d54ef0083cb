"""A client that trains on encodings, round after round, as a server sees it: what `gradient_then_unmix` attacks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frostglass.auditing.plan import ReportPlan
from frostglass.auditing.score import Scored, score, summarise
from frostglass.auditing.scorecard import Summary
from frostglass.auditing.simulate import Round, Truth
from frostglass.core.batch import Batch, Domain, Sealed, one_hot
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.threat import GradientMessage, Observation
from frostglass.core.update import LocalPlan
from frostglass.defenses.encoder import RowEncoder, encoded_domain
from frostglass.numerics.local_update import local_update


@dataclass(frozen=True)
class FederatedRounds:
    """What a server saw, and the private images behind it, sealed."""

    seen: Observation
    truth: Sealed[Truth]


def simulate_rounds(
    encoder: RowEncoder,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    rounds: int,
    batch: int,
    server_lr: float = 0.0,
    rng: Rng,
) -> FederatedRounds:
    """FedSGD on encodings: in every round each private image is first in one encoding; one gradient a batch is sent.

    Args:
        encoder: an `InstaHide`; its keys never leave it.
        model: takes encodings in [-1, 1]; a copy of its state is put back afterwards.
        images: [N, c, h, w] in [0, 1]; labels: [N] class indices.
        classes: outputs of the model.
        rounds: of fresh encodings.
        batch: encodings in one gradient; divides N, or the rest of a round is left out.
        server_lr: the server's step after every message.
        rng: of the order of images in each round.

    Raises:
        BadInput: batch or rounds out of range, or images that the encoder refuses.
    """
    if rounds < 1 or not 1 <= batch <= len(images):
        raise BadInput(f"rounds, batch: {rounds} and {batch} must be from 1, and batch at most {len(images)}.")
    kept = {name: t.detach().clone() for name, t in model.state_dict().items()}
    plan, sent = LocalPlan(mode="eval"), []
    model.eval()
    for r in range(rounds):
        order = rng.at("order", r).permutation(len(images))
        for start in range(0, len(images) - batch + 1, batch):
            made = encoder.encode_rows(images, labels, order[start : start + batch], r, classes)
            trace = local_update(model, made.images, made.targets, plan)
            sent.append(GradientMessage({k: g.detach().clone() for k, g in trace.gradients.items()}, plan.kind))
            if server_lr:
                with torch.no_grad():
                    for name, weight in model.named_parameters():
                        weight.sub_(server_lr * trace.gradients[name])
    model.load_state_dict(kept)
    targets = one_hot(labels, classes)
    seen = Observation(
        model=model,
        messages=tuple(sent),
        domain=encoded_domain(images.shape[1]),
        mode="eval",
        image_shape=(int(images.shape[1]), int(images.shape[2]), int(images.shape[3])),
        classes=classes,
        examples=len(images),
        labels=targets[labels.argsort(stable=True)],
        defence=Defense("instahide", settings={"k": encoder.law.k, "private": encoder.law.private}, encodes=True),
    )
    private = Batch(images.float(), targets, Domain(), tuple(f"image {i}" for i in range(len(images))))
    return FederatedRounds(seen, Sealed(Truth(private, private)))


def score_rounds(result: Reconstruction, played: FederatedRounds) -> tuple[Scored, Summary | None]:
    """Scores recovered images [-1, 1] against the private ones, with the better of the two signs for the whole set."""
    report = ReportPlan()
    found = []
    for sign in (1.0, -1.0):
        images = ((sign * result.images + 1) / 2).clamp(0, 1)
        unit = Reconstruction(images, result.proved, result.objective, result.targets, info=result.info)
        round_ = Round(played.seen, played.truth, None, LocalPlan())
        found.append(score(unit, round_, report.metrics, None, null=False))
    best = max(found, key=lambda s: sum(row.ssim or 0.0 for row in s.private))
    return best, summarise([best.private], report.threshold)
