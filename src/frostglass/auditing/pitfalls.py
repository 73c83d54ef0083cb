"""The 14 known mistakes of such evaluations, each checked for every cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from frostglass.auditing.cells import CellPlan
from frostglass.auditing.plan import Plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.plan_verdict import LEAST_TRIALS
from frostglass.auditing.scorecard import Cell, PitfallCheck
from frostglass.auditing.wording import fell_short, plural

FEATURES = ("iip_features", "lpips")
IDENTIFICATION = ("iip_pixels", "iip_features")


@dataclass(frozen=True)
class Context:
    """A cell with what the checks look at.

    Args:
        plan: the whole plan.
        cell: its row; its verdict is there.
        own: its plan.
        others: attacks against the same defence in the same scenario.
        stages: checkpoints at which the question was asked.
        control: whether a positive control passed.
    """

    plan: Plan
    cell: Cell
    own: CellPlan
    others: Sequence[str]
    stages: Sequence[str]
    control: bool


Answer = tuple[Literal["ok", "warning", "not_applicable"], str]
"""Status and what is the case."""


def _labels(c: Context) -> Answer:
    if "labels" in c.cell.grants:
        return "warning", "labels: oracle. A real server restores them first: run without the grant too."
    return "ok", "labels: inferred." if c.cell.labels.source == "restored" else "labels: not granted."


def _statistics(c: Context) -> Answer:
    if c.cell.batchnorm is False:
        return "not_applicable", "bn: none. The network has no BatchNorm."
    if "bn_batch" in c.cell.grants:
        return "warning", "bn: exact. Batch statistics were granted: run without them too."
    return "ok", "bn: running." if "bn_running" in c.cell.grants else "bn: not granted."


def _mode(c: Context) -> Answer:
    if c.cell.batchnorm is False:
        return "ok", f"{c.cell.mode} mode; without BatchNorm the modes differ in dropout alone."
    if c.cell.mode == "eval":
        return "warning", "The gradient was taken in eval mode; clients usually train in train mode."
    return "ok", "The gradient was taken in train mode."


def _checkpoints(c: Context) -> Answer:
    listed = ", ".join(c.stages)
    if {"init", "early", "final"} <= set(c.stages):
        return "ok", f"Asked at {listed}."
    return "warning", f"Asked at {listed} only; init, early and final are the least, as leakage differs between them."


def _steps(c: Context) -> Answer:
    client = c.own.scenario.client
    if client.local_steps * client.epochs == 1 and client.minibatch in (None, client.batch):
        return "warning", "One local step. If clients take more, run their real steps."
    return "ok", "The client takes several steps."


def _augmentation(c: Context) -> Answer:
    kind = c.own.scenario.client.augmentation
    if c.own.scenario.recorded is not None:
        return (
            "warning",
            "A server does not see whether its clients augment; if they do, augmented images are recovered.",
        )
    if kind == "none":
        return "warning", "Augmentation is off. If clients augment, replay their pipeline."
    return "ok", f"Augmentation: {kind}."


def _adaptive(c: Context) -> Answer:
    if c.own.defense.label == "none":
        return "not_applicable", "No defence."
    wanted = make_defense(c.own.defense).adaptive
    if not wanted:
        return "warning", "No adaptive attack is known for this defence; one may exist."
    run = [name for name in wanted if name in c.others]
    if run:
        return "ok", f"Faced by {', '.join(run)} in this plan."
    return "warning", f"No adaptive attack was run against it; run {' or '.join(wanted)}."


def _selection(_: Context) -> Answer:
    return "ok", "Among restarts the attack chooses by its own objective; the truth is sealed until scoring."


def _alignment(_: Context) -> Answer:
    return "ok", "Order is aligned in scoring alone: one-to-one, least total squared error, stated."


def _metrics(c: Context) -> Answer:
    names = set(c.plan.report.metrics)
    named = any(i.identified is not None for i in c.cell.images)
    if (named or names & set(IDENTIFICATION)) and (named or names & set(FEATURES)):
        return "ok", "Identification and features are measured beside pixels."
    return "warning", "Pixels are compared alone; add iip_pixels and iip_features to report.metrics, or run gallery."


def _typical(c: Context) -> Answer:
    if any(i.identified is not None for i in c.cell.images):
        return "ok", "Candidates of the same class take the place of a null."
    ranked = [i for i in c.cell.images if i.null is not None and i.null.p]
    if ranked:
        return (
            "ok",
            f"{len(ranked)} of {plural(len(c.cell.images), 'score')} are ranked among non-members of the class.",
        )
    return "warning", "No score is ranked among non-members of its class: a typical image could pass for a recovery."


def _optimiser(c: Context) -> Answer:
    if fell_short(c.cell.objective, c.cell.objective_at_truth):
        found = c.cell.summary is not None and c.cell.summary.over_threshold.count > 0
        short = "a better one could recover more" if found else "the attack failed, privacy was not shown"
        return "warning", f"The optimiser ended above the objective of the truth: {short}."
    if not c.control:
        return "warning", "No positive control passed: the attack is not shown to work without a defence."
    return "ok", "A positive control passed, and the objective reached that of the truth where it has one."


def _numbers(c: Context) -> Answer:
    n = c.cell.verdict.trials if c.cell.verdict is not None else 0
    if n < LEAST_TRIALS:
        return "warning", f"{plural(n, 'independent trial')}; {LEAST_TRIALS} are the least for a negative statement."
    return "ok", f"{n} independent trials, images drawn by the seed without replacement."


def _payload(c: Context) -> Answer:
    if c.own.scenario.recorded is not None:
        return "ok", "The update is the one that was sent; whatever random numbers it took were drawn by its client."
    return "ok", "The attack sees the update after the defence, and its random numbers follow from another key."


CHECKS: tuple[tuple[str, Callable[[Context], Answer]], ...] = (
    ("Labels known or distinct", _labels),
    ("BatchNorm batch statistics known", _statistics),
    ("Eval-mode gradient while the client trains in train mode", _mode),
    ("Random or early weights alone", _checkpoints),
    ("A single local step", _steps),
    ("Augmentation off", _augmentation),
    ("No adaptive attack", _adaptive),
    ("Best restart picked with the truth", _selection),
    ("Batch order aligned by the truth", _alignment),
    ("PSNR and SSIM alone", _metrics),
    ("Class-typical image taken for a reconstruction", _typical),
    ("Optimiser failure read as privacy", _optimiser),
    ("One batch, one image", _numbers),
    ("Undefended gradients seen, or the noise's seed leaks", _payload),
)

SAID_ALREADY = frozenset({1, 2, 3, 4, 5, 6, 13})
"""Of these a cell's own warnings speak already, before anything was run."""


def checked(context: Context) -> list[PitfallCheck]:
    """All 14 for one cell."""
    found = []
    for number, (about, look) in enumerate(CHECKS, 1):
        status, text = look(context)
        found.append(PitfallCheck(number=number, about=about, status=status, found=text))
    return found


def warnings_of(checks: Sequence[PitfallCheck]) -> list[str]:
    """Sentences for the report's warnings that are not there yet."""
    return [c.found for c in checks if c.status == "warning" and c.number not in SAID_ALREADY]
