"""What is known about one use of a differential-privacy mechanism, from whatever file it was read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from frostglass.guarantees.conversions import classical_noise

Severity = Literal["error", "warning"]
LEVEL = {"error": 2, "warning": 1}


def as_number(value: Any) -> float | None:
    """A number of a file; None for anything else. A whole number too large for a float counts as infinite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@dataclass(frozen=True)
class Facts:
    """One mechanism. None: the file does not say.

    Args:
        framework: "Frostglass", "Flower", "NVFlare", "Opacus" or "numbers".
        name: what the mechanism is called there.
        called_dp: its name, or that of what it is put into, says differential privacy.
        calibrated: False for a mechanism without noise calibrated to a sensitivity (percentile, sparse vector, top-k).
        where: part of the file, for messages.
        lines: line of each fact, by field name; "name" is that of the whole.
        file: that the lines are of; empty: the one that is checked.
        clip: clipping norm C.
        sensitivity: as declared, in the same units.
        noise_std: standard deviation s of the noise on the sum.
        noise_multiplier: s / C, if it was given instead.
        epsilon, delta: as declared.
        epsilon_is: what the declared epsilon is spent on.
        classical: s follows from Delta sqrt(2 ln(1.25/delta)) / epsilon.
        adjacency: "add_remove" or "replace_one".
        clip_unit, claim_unit: "image" or "client": what is clipped, and what is said to be protected.
        claimed_multiplier: noise multiplier that somebody claims for it.
        sampling: how batches, or clients of a round, are drawn.
        rate: sampling rate that the accounting assumes.
        steps: releases: rounds, or steps.
        accounted: True if the framework keeps an account of epsilon, False if it does not.
        order: of clipping and noise.
        unnoised: tensors or values that leave without noise.
        uncovered: what leaves exactly and is not in the claim.
        clients, installed: clients in all, and those on which the mechanism is installed.
        seed: a fixed seed of the noise.
        secure_generator: False for a generator that is not cryptographic.
        batchnorm: BatchNorm under per-example clipping.
        frozen_noised: frozen parameters are noised or not counted.
        mixing: images are mixed before per-example clipping.
        dimensions: channels x height x width, for the PSNR ceiling.
    """

    framework: str
    name: str
    called_dp: bool = True
    calibrated: bool = True
    where: str = ""
    lines: Mapping[str, int] = field(default_factory=dict)
    file: str = ""
    clip: float | None = None
    sensitivity: float | None = None
    noise_std: float | None = None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    epsilon_is: Literal["release", "total"] | None = None
    classical: bool = False
    adjacency: Literal["add_remove", "replace_one"] = "add_remove"
    clip_unit: str | None = None
    claim_unit: str | None = None
    claimed_multiplier: float | None = None
    sampling: Literal["poisson", "shuffle", "fixed"] | None = None
    rate: float | None = None
    steps: int | None = None
    accounted: bool | None = None
    order: Literal["clip_noise", "noise_clip", "noise_inside_clip"] | None = None
    unnoised: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()
    clients: int | None = None
    installed: int | None = None
    seed: int | None = None
    secure_generator: bool | None = None
    batchnorm: bool | None = None
    frozen_noised: bool | None = None
    mixing: bool = False
    dimensions: int | None = None

    @property
    def std(self) -> float | None:
        """s, as given or as the framework computes it."""
        if self.noise_std is not None:
            return self.noise_std
        if self.noise_multiplier is not None and self.clip is not None:
            return self.noise_multiplier * self.clip
        known = self.classical and self.sensitivity is not None and self.epsilon and self.delta
        if not known or self.sensitivity is None or not self.epsilon or not self.delta:
            return None
        return classical_noise(self.sensitivity, self.epsilon, self.delta) if 0 < self.delta < 1 else None

    @property
    def sigma(self) -> float | None:
        """The true noise multiplier, s / C."""
        if self.std is not None and self.clip:
            return self.std / self.clip
        return self.noise_multiplier

    @property
    def true_sensitivity(self) -> float | None:
        """C, or 2 C under replace-one."""
        if self.clip is None:
            return None
        return self.clip * (2 if self.adjacency == "replace_one" else 1)

    def line(self, *names: str) -> int | None:
        """Line of the first of these facts that has one, else of the mechanism."""
        return next((self.lines[n] for n in (*names, "name") if n in self.lines), None)


@dataclass(frozen=True)
class Finding:
    """One rule that fired.

    Args:
        rule: its id.
        severity: errors make the command exit with 1.
        line: in `file`, None where there is none.
        where: the mechanism.
        found: what is there, one sentence.
        meaning: what that means for privacy, one sentence.
        fix: what to do, one sentence.
        file: of the line; empty: the one that is checked.
    """

    rule: str
    severity: Severity
    line: int | None
    where: str
    found: str
    meaning: str
    fix: str
    file: str = ""
