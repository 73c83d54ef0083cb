"""The rules: each looks at the facts of one mechanism and says what is wrong, what it means, and the way out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from frostglass.auditing.linting.facts import Facts, Finding, Severity
from frostglass.guarantees.conversions import gdp_epsilon
from frostglass.guarantees.domain import LEAST_NOISE

SLACK = 1.001
"""Relative difference of two numbers that still count as equal."""

Found = tuple[Severity, tuple[str, ...], str, str, str]
"""Severity, the facts it is about, what was found, what it means, the fix."""


@dataclass(frozen=True)
class Rule:
    """One rule with the sentence that a list of rules shows."""

    id: str
    about: str
    look: Callable[[Facts], Iterator[Found]]


def findings(facts: Facts) -> list[Finding]:
    """All rules over one mechanism."""
    where = facts.where or facts.name
    return [
        Finding(rule.id, severity, facts.line(*names), where, found, meaning, fix, facts.file)
        for rule in RULES
        for severity, names, found, meaning, fix in rule.look(facts)
    ]


def _numbers(f: Facts) -> Iterator[Found]:
    checks: tuple[tuple[str, float | None, str, Callable[[float], bool], str], ...] = (
        ("clip", f.clip, "the clipping norm", lambda v: v > 0, "above 0"),
        ("noise_std", f.noise_std, "the noise", lambda v: v > 0, "above 0"),
        ("noise_multiplier", f.noise_multiplier, "the noise multiplier", lambda v: v > 0, "above 0"),
        ("delta", f.delta, "delta", lambda v: 0 < v < 1, "strictly between 0 and 1"),
        ("epsilon", f.epsilon, "epsilon", lambda v: v > 0, "above 0"),
        ("rate", f.rate, "the sampling rate", lambda v: 0 < v <= 1, "above 0 and at most 1"),
        ("steps", f.steps, "the number of releases", lambda v: v >= 1, "at least 1"),
        ("sensitivity", f.sensitivity, "the sensitivity", lambda v: v > 0, "above 0"),
    )
    for name, value, words, fits, must in checks:
        if value is not None and not (math.isfinite(value) and fits(value)):
            found = f"{words[0].upper()}{words[1:]} is {value:g}."
            yield "error", (name,), found, "No theorem holds there: nothing is private.", f"Set it {must}."
    if f.sigma is not None and 0 < f.sigma < LEAST_NOISE:
        found = f"The noise is {f.sigma:g} clipping norms."
        yield "error", ("noise_multiplier", "noise_std"), found, "Nothing is bounded by so little.", "Give it around 1."
    if f.std is None and f.noise_multiplier is None and f.calibrated and f.called_dp and f.epsilon is None:
        found = "No noise is given."
        yield "error", (), found, "Clipping alone proves nothing.", "Give a noise multiplier, or epsilon and delta."


def _sensitivity(f: Facts) -> Iterator[Found]:
    true, said = f.true_sensitivity, f.sensitivity
    if true is None or said is None or true / SLACK <= said <= true * SLACK:
        return
    bound = "clipping norm" if f.adjacency == "add_remove" else "2 x clipping norm, under replace-one"
    found = f"The declared sensitivity is {said:g}, and the clipped update has {true:g} ({bound})."
    if said <= 0:
        meaning = "Noise that follows from it is no noise."
        yield "error", ("sensitivity",), found, meaning, f"Set sensitivity = {true:g}."
    elif said < true:
        ratio = f"{true / said:,.0f}" if true / said >= 10 else f"{true / said:.3g}"
        yield (
            "error", ("sensitivity",), found,
            f"The noise is {ratio} times too small, so the declared epsilon and delta are false.",
            f"Set sensitivity = {true:g}.",
        )  # fmt: skip
    else:
        yield (
            "warning", ("sensitivity",), found, "More noise than the claim needs: private, at a cost in accuracy.",
            f"Set sensitivity = {true:g}.",
        )  # fmt: skip


def _claim(f: Facts) -> Iterator[Found]:
    if f.claimed_multiplier is not None and f.sigma is not None and f.claimed_multiplier > f.sigma * SLACK:
        yield (
            "error", ("claimed_multiplier", "noise_multiplier"),
            f"Claimed is a noise multiplier of {f.claimed_multiplier:g}, and {f.sigma:.4g} is added.",
            "The bound that follows from the claim does not hold.", f"Claim {f.sigma:.4g}, or add more noise.",
        )  # fmt: skip


def _formula(f: Facts) -> Iterator[Found]:
    if not f.classical or f.epsilon is None or not 1 <= f.epsilon < math.inf:
        return
    exact = ""
    if f.sensitivity and f.std and f.delta and 0 < f.delta < 1:
        exact = f" Exactly, this noise gives epsilon = {gdp_epsilon(f.sensitivity / f.std, f.delta):.4g} a release."
    yield (
        "warning", ("epsilon",),
        f"The noise follows the classical Gaussian formula at epsilon = {f.epsilon:g}.",
        f"Its proof holds for epsilon below 1 only.{exact}",
        "Calibrate the noise with an accountant (Opacus, or frostglass bound), or use epsilon < 1.",
    )  # fmt: skip


def _accounting(f: Facts) -> Iterator[Found]:
    if not f.called_dp or not f.calibrated:
        return
    if f.epsilon is not None and f.epsilon_is == "release" and f.accounted is not True:
        many = f" After {f.steps} releases it is not {f.epsilon:g}." if f.steps and f.steps > 1 else ""
        yield (
            "error" if f.steps is None or f.steps > 1 else "warning", ("epsilon",),
            f"epsilon = {f.epsilon:g} is spent in every release, and nothing adds it up.",
            f"Privacy is spent anew each round; the total is what counts.{many}",
            "Account for all rounds, state the total, and stop at a budget.",
        )  # fmt: skip
    elif f.accounted is False:
        yield (
            "warning", (), "No accountant keeps the privacy spent.",
            "Without one, no epsilon can be stated for the whole training.",
            "Add an accountant; Opacus's are free of charge for any Gaussian mechanism.",
        )  # fmt: skip
    if f.steps is None:
        yield (
            "warning", (), "The number of rounds or steps is not given.",
            "Every number below is for one release alone.", "State rounds (or epochs) and clients.",
        )  # fmt: skip


def _sampling(f: Facts) -> Iterator[Found]:
    amplified = f.rate < 1 if f.rate is not None else f.accounted is True
    if amplified and f.sampling in ("shuffle", "fixed"):
        rate = f" at rate {f.rate:g}" if f.rate is not None else ""
        yield (
            "error", ("sampling", "rate"),
            f"The account assumes Poisson sampling{rate}, and "
            + ("batches are shuffled." if f.sampling == "shuffle" else "a fixed number is drawn."),
            "Amplification by sampling is proved for the sampling that is really used; epsilon may be too small.",
            "Sample by Poisson (Opacus: poisson_sampling=True), or account with rate 1.",
        )  # fmt: skip


def _unit(f: Facts) -> Iterator[Found]:
    if f.clip_unit is None or f.claim_unit is None or f.clip_unit == f.claim_unit:
        return
    if f.clip_unit == "client":
        yield (
            "warning", ("claim_unit",), "Clipped is a client's whole update, and the claim is about one image.",
            "It covers each image, but not with the per-image PSNR ceiling, and not by per-image accounting.",
            "State the unit as the client, or clip image by image.",
        )  # fmt: skip
    else:
        yield (
            "error", ("claim_unit",), "Clipped is one image, and the claim is about a client.",
            "A client holds many images: its epsilon is far above the one stated.",
            "State the unit as the image, or clip the client's whole update.",
        )  # fmt: skip


def _order(f: Facts) -> Iterator[Found]:
    if f.order in ("noise_clip", "noise_inside_clip"):
        yield (
            "error", ("order",),
            "Noise is added before clipping." if f.order == "noise_clip" else "Noise is added inside the clip.",
            "Clipping scales the noise down together with the signal, so its size depends on the data: no guarantee.",
            "Clip first, then add noise to what was clipped.",
        )  # fmt: skip
    for name in f.unnoised:
        yield (
            "error", ("unnoised",), f"{name[0].upper()}{name[1:]} leave without noise.",
            "What is not noised is not private, and may hold the data itself.",
            "Do not send them, or clip, noise and account for them too.",
        )  # fmt: skip


def _coverage(f: Facts) -> Iterator[Found]:
    for name in f.uncovered:
        yield (
            "warning", ("uncovered",), f"{name[0].upper()}{name[1:]} leave exactly.",
            f"The guarantee is about the rest alone: {name} are not private.",
            f"Noise and account for {name} too, or say so wherever the guarantee is quoted.",
        )  # fmt: skip


def _naming(f: Facts) -> Iterator[Found]:
    if f.called_dp and not f.calibrated:
        yield (
            "error", ("name",), f"{f.name} is presented as differential privacy.",
            "It adds no noise calibrated to a sensitivity for the whole update: there is no epsilon for it.",
            "Call it a heuristic filter, or put clip-and-noise with an accountant in its place.",
        )  # fmt: skip


def _opt_in(f: Facts) -> Iterator[Found]:
    if f.clients is not None and f.installed is not None and f.installed < f.clients:
        yield (
            "error", ("installed",),
            f"The mechanism is installed on {f.installed} of {f.clients} clients.",
            "The others send what they compute, in the clear.",
            "Install it on every client and refuse updates without it.",
        )  # fmt: skip


def _randomness(f: Facts) -> Iterator[Found]:
    if f.seed is not None:
        yield (
            "error", ("seed",), f"The noise has a fixed seed ({f.seed}).",
            "Who knows it subtracts the noise; two rounds with the same noise differ by the signal alone.",
            "Leave the seed out in production; draw from the operating system.",
        )  # fmt: skip
    if f.secure_generator is False:
        yield (
            "warning", ("secure_generator",), "The noise comes from a generator that is not cryptographic.",
            "Its state can be computed from its outputs, and ordinary floating-point samplers leak low bits.",
            "Turn on a cryptographic generator (Opacus: secure_mode=True).",
        )  # fmt: skip


def _layers(f: Facts) -> Iterator[Found]:
    if f.batchnorm:
        yield (
            "error", ("batchnorm",), "BatchNorm is trained under per-example clipping.",
            "It mixes the examples of a batch, so no example's influence is bounded by the clip.",
            "Replace it by GroupNorm: ModuleValidator.fix(model) in Opacus, model.fix = \"opacus\" in a plan.",
        )  # fmt: skip
    if f.frozen_noised:
        yield (
            "warning", ("frozen_noised",), "Frozen parameters are noised, or counted in the clip.",
            "Noise where no signal is costs accuracy and protects nothing.", "Pass only what is trained.",
        )  # fmt: skip


def _mixing(f: Facts) -> Iterator[Found]:
    if f.mixing:
        yield (
            "error", ("mixing",), "Images are mixed (InstaHide or Mixup) under per-example clipping.",
            "One image is in several rows, so it counts more than once and the printed epsilon is false.",
            "Use one of them, or mixup of augmentations of a single image (DP-Mix).",
        )  # fmt: skip


RULES: tuple[Rule, ...] = (
    Rule("numbers", "a parameter lies where no theorem holds", _numbers),
    Rule("sensitivity", "declared sensitivity differs from the clipping norm", _sensitivity),
    Rule("claim", "more noise is claimed than is added", _claim),
    Rule("formula", "classical Gaussian formula at epsilon of 1 or more", _formula),
    Rule("accounting", "epsilon of one round shown as the total, no accountant, or rounds missing", _accounting),
    Rule("sampling", "amplification by sampling that is not used", _sampling),
    Rule("unit", "what is clipped is not what is claimed", _unit),
    Rule("order", "noise before or inside the clip, or tensors that leave without noise", _order),
    Rule("coverage", "something leaves exactly that the claim does not cover", _coverage),
    Rule("naming", "called differential privacy without a calibrated mechanism", _naming),
    Rule("opt-in", "not installed on every client", _opt_in),
    Rule("randomness", "seed fixed or shared, or a generator that is not cryptographic", _randomness),
    Rule("layers", "BatchNorm or frozen parameters under per-example clipping", _layers),
    Rule("mixing", "images mixed under per-example clipping", _mixing),
)
