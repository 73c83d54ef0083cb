"""Label restoration: every rule on random and trained networks, distinct and repeated labels, against the guess.

One forward pass a batch: the last layer's gradient is a product of errors and features. Intervals are 95 %, normal
approximation over batches; a rule beats the guess where the interval of the difference, batch by batch, is above 0.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from frostglass.attacks.inversion.counting import CountRule
from frostglass.attacks.inversion.head import dummy_images, feature_groups, features_of, fresh
from frostglass.core.files import write_json
from frostglass.core.randomness import Rng
from frostglass.numerics.label_counts import (
    Head,
    least_squares_counts,
    posterior_measured,
    posterior_observed,
    posterior_uniform,
)
from frostglass.numerics.labels import (
    classifier_layer,
    count_accuracy,
    row_minimum,
    set_accuracy,
    single_label,
    sum_rule,
)
from frostglass.vision import datasets, networks, weights
from harness import RESULTS, cifar, environment, parser, save

CLASSES, SIZE = 10, 32
VICTIMS = ("resnet20 trained", "small_bn_cnn random", "resnet20 random")
AUXILIARY, AUXILIARY_TRAIN = 1500, 480  # in train mode they are run again for every K
BATCHES = (1, 2, 4, 8, 16, 32, 48)


@dataclass(frozen=True)
class Data:
    """Private images and, disjoint, those of the grant 'auxiliary'."""

    images: Tensor
    labels: Tensor
    auxiliary: Tensor
    auxiliary_labels: Tensor


def data(quick: bool) -> Data:
    """Test images: the trained network has not seen them."""
    source = f"parquet:{cifar() / 'test-00000-of-00001.parquet'}"
    count = 800 if quick else 3000
    held = datasets.load(source, size=SIZE, rows=range(count + AUXILIARY))
    return Data(held.images[:count], held.labels[:count], held.images[count:], held.labels[count:])


@cache
def victims(name: str, seeds: int) -> list[nn.Module]:
    kind, state = name.split()
    made = []
    for seed in range(1 if state == "trained" else seeds):
        net = networks.build(kind, classes=CLASSES, channels=3, size=SIZE, rng=Rng.from_seed(seed))
        if state == "trained":
            weights.load_weights(net, cifar().parents[1] / "models" / "cifar10" / f"{kind}.safetensors")
        made.append(net.requires_grad_(False))
    return made


def view(net: nn.Module, mode: str, examples: int) -> Any:
    """What the feature functions read of an observation."""
    domain = networks.domain_of(net)
    return SimpleNamespace(
        model=net, mode=mode, examples=examples, classes=CLASSES, image_shape=(3, SIZE, SIZE), domain=domain
    )


_EVAL: dict[tuple[nn.Module, str], Tensor] = {}


def features(net: nn.Module, mode: str, examples: int, held: Data, which: str, rows: Tensor | None = None) -> Tensor:
    """Of private ("images") or auxiliary images; in eval mode each is run once a network."""
    images: Tensor = getattr(held, which)
    if mode == "train":
        found = features_of(view(net, mode, examples), images[:AUXILIARY_TRAIN] if rows is None else images[rows])
        assert found is not None
        return found
    if (net, which) not in _EVAL:
        found = features_of(view(net, mode, 64), images)
        assert found is not None
        _EVAL[net, which] = found.float()  # wide layers: half the memory
    return (_EVAL[net, which] if rows is None else _EVAL[net, which][rows]).double()


def draw(held: Data, examples: int, distinct: bool, rng: Rng) -> Tensor:
    """Rows of one batch: classes drawn without or with replacement, evenly, then images within."""
    generator = rng.numpy()
    if distinct:
        classes = generator.permutation(CLASSES)[:examples]
    else:
        classes = generator.integers(0, CLASSES, examples)
    places = [(held.labels == int(c)).nonzero()[:, 0] for c in classes]
    return torch.stack([p[int(generator.integers(len(p)))] for p in places])


def head_of(net: nn.Module, inputs: Tensor, labels: Tensor) -> Head:
    """The layer and its gradient on a batch with these features, rounded to the float32 that is sent."""
    layer = net.get_submodule(classifier_layer(net, CLASSES, (3, SIZE, SIZE)) or "")
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    error = torch.softmax(inputs @ weight.T + bias, 1) - nn.functional.one_hot(labels, CLASSES)
    grad = (error.T @ inputs / len(labels)).float().double()
    return Head(weight, bias, grad, error.mean(0).float().double(), len(labels))


def batches(
    held: Data, net: nn.Module, mode: str, examples: int, distinct: bool, count: int
) -> Iterator[tuple[Head, Tensor]]:
    """(head, true counts) of `count` batches."""
    rng = Rng.from_seed(examples, "labels", mode, "distinct" if distinct else "repeated")
    rows = [draw(held, examples, distinct, rng.at(i)) for i in range(count)]
    found = features(net, mode, examples, held, "images", torch.cat(rows))
    for i, row in enumerate(rows):
        mine = found[i * examples : (i + 1) * examples]
        yield head_of(net, mine, held.labels[row]), torch.bincount(held.labels[row], minlength=CLASSES).double()


def named(counts: Tensor) -> Tensor:
    """Class indices -> counts."""
    return torch.bincount(counts, minlength=CLASSES).double()


def rules(
    held: Data, net: nn.Module, mode: str, examples: int, distinct: bool
) -> dict[str, Callable[[Head], tuple[Tensor, str]]]:
    """Every rule that applies: head -> (counts, confidence)."""
    seen = view(net, mode, examples)
    dummies = features_of(seen, dummy_images(seen, max(384, 2 * examples)))
    auxiliary = features(net, mode, examples, held, "auxiliary")
    assert dummies is not None
    known = {"distinct": distinct, "coupled": mode == "train", "fresh": fresh(seen)}
    default = CountRule(dummies, lambda: feature_groups(seen, None), **known)
    granted = CountRule(auxiliary, lambda: feature_groups(seen, auxiliary), granted=True, **known)

    def default_of(rule: CountRule) -> Callable[[Head], tuple[Tensor, str]]:
        def use(head: Head) -> tuple[Tensor, str]:
            found = rule.count(head)
            return found.counts, f"{found.rule}/{found.confidence}"

        return use

    def squares(matrix: Callable[[Head], Tensor]) -> Callable[[Head], tuple[Tensor, str]]:
        return lambda h: (least_squares_counts(h.grad_bias, matrix(h), h.examples).counts, "")

    def confusion(head: Head) -> Tensor:
        p = torch.softmax(auxiliary @ head.weight.T + head.bias, 1)
        return posterior_measured(p, held.auxiliary_labels[: len(p)])

    made: dict[str, Callable[[Head], tuple[Tensor, str]]] = {
        "counts": default_of(default),
        "least squares, uniform": squares(lambda h: posterior_uniform(CLASSES)),
        "least squares, observed": squares(posterior_observed),
        "least squares, labelled auxiliary": squares(confusion),
        "counts, auxiliary": default_of(granted),
    }
    if examples <= CLASSES:
        made["row minimum"] = lambda h: (named(row_minimum(h.grad_weight, h.examples)), "")
        made["sum"] = lambda h: (named(sum_rule(h.grad_weight, h.examples)), "")
    if examples == 1:
        made["idlg"] = lambda h: (named(torch.tensor([single_label(h.grad_weight, h.grad_bias)])), "")
    return made


def interval(values: list[float]) -> list[float]:
    """Mean, and the ends of its 95 % interval."""
    mean = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return [round(mean, 4), round(mean - half, 4), round(mean + half, 4)]


def cell(
    held: Data, victim: str, mode: str, examples: int, distinct: bool, count: int, seeds: int
) -> list[dict[str, Any]]:
    """One row a rule."""
    nets = victims(victim, seeds)
    found: dict[str, list[tuple[float, float, bool, str]]] = {}
    guessed: list[float] = []
    seconds: dict[str, float] = {}
    for net in nets:
        net.train(mode == "train")
        each = rules(held, net, mode, examples, distinct)
        for head, truth in batches(held, net, mode, examples, distinct, -(-count // len(nets))):
            flat = torch.full_like(truth, examples / CLASSES)
            guessed.append(count_accuracy(flat, truth))
            for name, rule in each.items():
                started = time.perf_counter()
                counts, how = rule(head)
                seconds[name] = seconds.get(name, 0) + time.perf_counter() - started
                assert int(counts.sum()) == examples
                score = count_accuracy(counts, truth), set_accuracy(counts, truth), torch.equal(counts, truth), how
                found.setdefault(name, []).append(score)
    rows = []
    for name, scores in found.items():
        gain = interval([s[0] - g for s, g in zip(scores, guessed, strict=True)])
        said = sorted({s[3] for s in scores if s[3]})
        rows.append(
            {
                "victim": victim,
                "mode": mode,
                "K": examples,
                "labels": "distinct" if distinct else "repeated",
                "rule": name,
                "batches": len(scores),
                "multiset": interval([s[0] for s in scores]),
                "set": interval([s[1] for s in scores]),
                "exact": round(statistics.fmean(s[2] for s in scores), 3),
                "guess": round(statistics.fmean(guessed), 4),
                "gain": gain,
                "beats_guess": gain[1] > 0,
                "said": {w: round(statistics.fmean(s[3] == w for s in scores), 3) for w in said},
                "multiset_where_said": {w: round(statistics.fmean(s[0] for s in scores if s[3] == w), 3) for w in said},
                "seconds_per_batch": round(seconds[name] / len(scores), 4),
            }
        )
    return rows


def cells(sizes: Sequence[int]) -> list[tuple[str, str, int, bool]]:
    """(victim, mode, K, distinct), the trained network first."""
    return [
        (victim, mode, examples, distinct)
        for victim in VICTIMS
        for mode in ("eval", "train")
        for examples in sizes
        for distinct in (True, False)
        if not (distinct and examples > CLASSES) and not (examples == 1 and not distinct)
    ]


def earlier(path: Path) -> list[dict[str, Any]]:
    """Rows of a run that was stopped: cells that are in the file are not run again."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--batches", type=int, default=100)
    made.add_argument("--seeds", type=int, default=4, help="random networks a victim")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    held = data(options.quick)
    count, sizes = (12, (1, 4, 16)) if options.quick else (options.batches, BATCHES)
    path = (options.out or RESULTS) / "labels.json"
    rows = [] if options.quick else earlier(path)
    done = {(r["victim"], r["mode"], r["K"], r["labels"]) for r in rows}
    about = {
        "note": "CIFAR-10 images are JPEG re-encodings; private and auxiliary images are disjoint test images. "
        "Rows of distinct labels are told that labels are distinct (the grant labels_distinct).",
        "auxiliary_images": {"eval": AUXILIARY, "train": AUXILIARY_TRAIN},
        "auxiliary_labels": "only for 'least squares, labelled auxiliary'",
    }
    for victim, mode, examples, distinct in cells(sizes):
        if (victim, mode, examples, "distinct" if distinct else "repeated") in done:
            continue
        part = cell(held, victim, mode, examples, distinct, count, options.seeds)
        rows += part
        told = ("rule", "multiset", "exact", "guess", "multiset_where_said", "said")
        print(victim, mode, examples, part[0]["labels"], *(part[0][k] for k in told), file=sys.stderr, flush=True)
        if not options.quick:
            value = {"bench": "labels", "environment": environment(options.threads), **about, "rows": rows}
            write_json(path, value)
    save("labels", options.threads, rows, options.out, **about)


if __name__ == "__main__":
    main()
