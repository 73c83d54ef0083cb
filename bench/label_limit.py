"""What the classifier's gradient cannot say: for a batch whose labels are counted wrongly, a twin counted the same.

    python bench/label_limit.py  # cells of labels.json not right throughout; a quarter of an hour on one thread

Cells that the saved result holds are not taken again.

The twin shows almost the same images. It has other counts, those that the rule answered, and the same gradient of the
classifier to the rounding of the float32 that is sent: whatever reads only that must answer alike, and is wrong for one
of the two. One label is exchanged, then pixels are moved by damped Gauss-Newton steps of least norm until the gradient
is again the one that was seen (9 x 65 equations, K x 3072 pixels). No attack could: it takes the private images.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import labels
from frostglass.attacks.inversion.counting import CountRule
from frostglass.attacks.inversion.head import dummy_images, feature_groups, features_of, fresh
from frostglass.core.files import write_json
from frostglass.core.randomness import Rng
from frostglass.numerics.labels import classifier_layer
from harness import RESULTS, environment, parser, save

VICTIM = "resnet20 random"  # the small CNN's 4,096 features are 36,873 equations: derivatives do not fit into memory
CELLS = (("eval", 48), ("eval", 32), ("eval", 16), ("train", 48), ("train", 32))
EDGE = 1e-3  # pixels nearer to black or white stay as they are
STEPS, SMALL, NEAR = 20, 1e-9, 1e-7  # of Gauss-Newton; relative distances at which they end, and end if stuck
AGAIN = 0.2  # a step that leaves more of the distance than this asks for new derivatives


@dataclass(frozen=True)
class Batch:
    """One private batch, and what the rule answered."""

    net: nn.Module
    which: str
    images: Tensor
    labels: Tensor
    counts: Tensor
    answer: Tensor


def wrong_batch(held: labels.Data, mode: str, examples: int, count: int, seeds: int) -> Batch | None:
    """The first batch of the cell (as in labels.py) whose answer differs from the truth by one label."""
    for seed, net in enumerate(labels.victims(VICTIM, seeds)):
        net.train(mode == "train")
        seen = labels.view(net, mode, examples)
        dummies = features_of(seen, dummy_images(seen, max(384, 2 * examples)))
        known = {"coupled": mode == "train", "fresh": fresh(seen)}
        rule = CountRule(dummies, lambda seen=seen: feature_groups(seen, None), **known)
        drawn = Rng.from_seed(examples, "labels", mode, "repeated")
        for i, (head, truth) in enumerate(labels.batches(held, net, mode, examples, False, count)):
            answer = rule.count(head).counts
            if float((answer - truth).abs().sum()) == 2:
                rows = labels.draw(held, examples, False, drawn.at(i))
                return Batch(net, f"{seed}/{i}", held.images[rows], held.labels[rows], truth, answer)
    return None


class Classifier:
    """The classifier's gradient of a batch and its derivatives, in float64; one row is left out: rows sum to 0."""

    def __init__(self, net: nn.Module, labels_: Tensor, centre: Tensor | None = None) -> None:
        self.net, self.hot = net, nn.functional.one_hot(labels_, labels.CLASSES).double()
        self.layer = net.get_submodule(classifier_layer(net, labels.CLASSES, (3, labels.SIZE, labels.SIZE)) or "")
        self.centre = centre

    def features(self, images: Tensor) -> Tensor:
        kept: list[Tensor] = []
        watch = self.layer.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        try:
            self.net(images)
        finally:
            watch.remove()
        return kept[0]

    def summed(self, features: Tensor) -> Tensor:
        """K [gW | gb], features centred: the same equations, better conditioned."""
        errors = self.layer(features).softmax(1) - self.hot
        ones = features.new_ones(len(features), 1)
        return errors.T @ torch.cat([features - (0 if self.centre is None else self.centre), ones], 1)

    def equations(self, features: Tensor) -> Tensor:
        rows = self.summed(features)
        left_out = int(self.layer(features).softmax(1).sum(0).argmax())
        return torch.cat([rows[:left_out], rows[left_out + 1 :]]).flatten()

    def slopes(self, images: Tensor) -> Tensor:
        """[equations, pixels] derivatives. In eval mode images do not see each other: one pass serves all of them."""
        x = images.clone().requires_grad_(True)
        h = self.features(x)
        if self.net.training:
            wanted = self.equations(h)
            rows = [torch.autograd.grad(v, x, retain_graph=True)[0].flatten() for v in wanted]
            return torch.stack(rows)
        per_feature = [torch.autograd.grad(f.sum(), x, retain_graph=True)[0].flatten(1) for f in h.T]
        inner = torch.autograd.functional.jacobian(self.equations, h.detach())
        return torch.einsum("rnd,ndp->rnp", inner, torch.stack(per_feature, 1)).flatten(1)


def twin_of(batch: Batch) -> tuple[Tensor, Tensor, float]:
    """(images, labels, relative distance of the gradients) of the twin that has the counts of the answer."""
    net = copy.deepcopy(batch.net).double()
    changed = batch.answer - batch.counts
    source, target = int(changed.argmin()), int(changed.argmax())
    start = batch.images.double()
    before = Classifier(net, batch.labels)
    with torch.no_grad():
        h = before.features(start)
        posterior = before.layer(h).softmax(1)[:, target]
    mine = (batch.labels == source).nonzero()[:, 0]
    given = batch.labels.clone()
    given[mine[posterior[mine].argmax()]] = target  # where the new label leaves least
    before.centre = h.mean(0)
    wanted = before.equations(h).detach()
    after = Classifier(net, given, h.mean(0))
    free = ((start > EDGE) & (start < 1 - EDGE)).double().flatten()

    x, slopes, inverse = start, None, torch.empty(0)
    for step in range(STEPS):
        with torch.no_grad():
            missing = wanted - after.equations(after.features(x))
        distance = float(missing.norm())
        print(f"  step {step}: {distance / float(wanted.norm()):.1e}", file=sys.stderr, flush=True)
        if distance < SMALL * float(wanted.norm()):
            break
        if slopes is None:
            slopes = after.slopes(x) * free
            inverse = torch.linalg.pinv(slopes @ slopes.T, rtol=1e-14, hermitian=True)
        move = (slopes.T @ (inverse @ missing)).view_as(x)
        size = 1.0
        while True:
            there = (x + size * move).clamp(0, 1)
            with torch.no_grad():
                left = float((wanted - after.equations(after.features(there))).norm())
            if left < distance or size < 1e-3:
                break
            size /= 2
        if left > 0.9 * distance and distance < NEAR * float(wanted.norm()):
            break  # rounding of float64, far below that of float32
        x = there
        slopes = None if left > AGAIN * distance else slopes
    return x, given, left / float(wanted.norm())


def gradient(net: nn.Module, images: Tensor, given: Tensor) -> list[Tensor]:
    """Of every weight, as a client computes it in float32."""
    weights = [p.requires_grad_(True) for p in net.parameters()]
    found = torch.autograd.grad(nn.functional.cross_entropy(net(images), given), weights)
    net.requires_grad_(False)
    return list(found)


def compared(batch: Batch, mode: str, examples: int) -> dict[str, Any]:
    """One row: the twin beside the batch."""
    started = time.perf_counter()
    images, given, left = twin_of(batch)
    net = copy.deepcopy(batch.net).double()
    with torch.no_grad():  # rounded to float32, as in labels.py
        mine, other = (
            (side.summed(side.features(x)) / examples).float()
            for side, x in ((Classifier(net, batch.labels), batch.images.double()), (Classifier(net, given), images))
        )
    moved = (images - batch.images.double()) * 255
    sent, twin = gradient(batch.net, batch.images, batch.labels), gradient(batch.net, images.float(), given)
    turned = gradient(batch.net, batch.images.flip(0), batch.labels.flip(0))

    def apart(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
        one, two = (torch.cat([t.double().flatten() for t in g]) for g in (a, b))
        return float((one - two).norm() / two.norm()), 1 - float(nn.functional.cosine_similarity(one, two, 0))

    return {
        "victim": VICTIM,
        "network/batch": batch.which,
        "mode": mode,
        "K": examples,
        "counts": batch.counts.int().tolist(),
        "answer, and counts of the twin": batch.answer.int().tolist(),
        "moved_grey_levels_rms": round(float(moved.square().mean().sqrt()), 3),
        "moved_grey_levels_largest": round(float(moved.abs().max()), 1),
        "distance_float64": left,
        "entries_equal_float32": round(float((mine == other).double().mean()), 4),
        "largest_difference_float32": float((mine.double() - other.double()).abs().max() / mine.abs().max()),
        "classifier_apart_as_computed": apart(twin[-2:], sent[-2:])[0],
        "classifier_apart_images_in_another_order": apart(turned[-2:], sent[-2:])[0],
        "whole_gradient_apart": round(apart(twin, sent)[0], 5),
        "whole_gradient_one_minus_cosine": round(apart(twin, sent)[1], 7),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--seeds", type=int, default=4, help="random networks")
    options.add_argument("--batches", type=int, default=25, help="batches a network, as in labels.py")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    held = labels.data(False)
    path = (chosen.out or RESULTS) / "label_limit.json"
    rows: list[dict[str, Any]] = []
    if path.exists() and not chosen.quick:
        rows = json.loads(path.read_text())["rows"]
    taken = {(row["mode"], row["K"]) for row in rows}
    for mode, examples in CELLS[:1] if chosen.quick else [cell for cell in CELLS if cell not in taken]:
        batch = wrong_batch(held, mode, examples, chosen.batches, chosen.seeds)
        if batch is None:
            continue
        rows.append(compared(batch, mode, examples))
        print(rows[-1], file=sys.stderr, flush=True)
        if not chosen.quick:
            write_json(path, {"bench": "label_limit", "environment": environment(chosen.threads), "rows": rows})
    save("label_limit", chosen.threads, rows, chosen.out)


if __name__ == "__main__":
    main()
