"""An iteration's evaluations as a CUDA graph: recorded once, replayed with new variables.

Small networks keep a GPU waiting for Python. A graph replays all kernels of all seeds in one call. What changes from
step to step lies in fixed places: variables, anchor, and the weights of the terms, whose schedules are laid out on the
device beforehand. A recording is used only where it repeats what the eager path finds, at two points and two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from frostglass.attacks.inversion.engine import Objective
from frostglass.attacks.inversion.together import Evaluations, alike, evaluate_all

Replay: TypeAlias = Callable[[], Evaluations]
Recorder: TypeAlias = Callable[[Callable[[], Evaluations]], Replay]
"""Takes what is to be recorded, which reads fixed memory; returns what repeats it into the same results."""

WARM_UP = 3
"""Runs before a recording: libraries choose their kernels, and allocate, in the first ones."""


def cuda_graph(function: Callable[[], Evaluations], device: torch.device) -> Replay:
    """Records `function` on a CUDA device.

    Raises:
        RuntimeError: something in it cannot be recorded (it waits for the device, say).
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = function()

    def replay() -> Evaluations:
        with torch.cuda.device(device):
            graph.replay()
        return found

    return replay


def recorder_for(device: torch.device) -> Recorder | None:
    """How iterations are recorded on a device; None where they are not."""
    return partial(cuda_graph, device=device) if device.type == "cuda" else None


class Captured:
    """Recorded evaluations of the seeds of one run, as many as there were when it was made.

    Args:
        z: variables [s, ...].
        problems: of each seed, alike.
        at_once: seeds in one pass.
        record: see `Recorder`.
    """

    def __init__(self, z: Tensor, problems: Sequence[Objective], at_once: int, record: Recorder) -> None:
        first = problems[0]
        self._z = z.clone()
        self._anchor = None if first.anchor is None else first.anchor.clone()
        self._targets = first.targets
        self._table = first.all_scales(z)
        self._scales = self._table[first.t].clone()
        fixed = [replace(p, anchor=self._anchor, scales=self._scales, draws=None) for p in problems]
        self._replay = record(lambda: evaluate_all(self._z, fixed, at_once))

    def fits(self, z: Tensor, problem: Objective) -> bool:
        """Whether this problem is the one that was recorded, but for what may change."""
        anchored = (problem.anchor is None) == (self._anchor is None)
        return z.shape == self._z.shape and anchored and problem.targets is self._targets

    def __call__(self, z: Tensor, problem: Objective) -> Evaluations:
        """The evaluations at z, of any step; results of their own memory."""
        self._z.copy_(z)
        self._scales.copy_(self._table[problem.t])
        if self._anchor is not None and problem.anchor is not None:
            self._anchor.copy_(problem.anchor)
        found = self._replay()
        values = {name: v.clone() for name, v in found.values.items()}
        return Evaluations(found.own.clone(), found.total.clone(), found.gradient.clone(), values)


def captured(z: Tensor, problems: Sequence[Objective], at_once: int, record: Recorder) -> Captured | None:
    """A recording that repeats the eager path, or None where there is none.

    Args:
        z: variables [s, ...].
        problems: of each seed.
        at_once: seeds in one pass.
        record: see `Recorder`.
    """
    first = problems[0]
    if first.engine != "double_backward" or any(p.augment is not None for p in problems):
        return None  # shifts differ from step to step, and would be recorded as they are at this one
    other = 0.5 * z.flip(0).flip(-1)
    last = first.steps - 1
    try:
        made = Captured(z, problems, at_once, record)
        for at, t in ((z, first.t), (other, last)):
            wanted = evaluate_all(at, [replace(p, t=t) for p in problems], at_once)
            if not alike(made(at, replace(first, t=t)), wanted):
                return None
    except RuntimeError:
        return None
    return made


class Recordings:
    """Evaluates seeds through a recording where one can be had; made anew when a seed is dropped or an anchor comes."""

    def __init__(self) -> None:
        self._made: Captured | None = None
        self._refused = False

    @property
    def used(self) -> bool:
        """Whether the last evaluation was a replay."""
        return self._made is not None

    def evaluate(self, z: Tensor, problems: Sequence[Objective], at_once: int) -> Evaluations:
        """As `evaluate_all`."""
        record = recorder_for(z.device)
        if record is None or not problems:
            return evaluate_all(z, problems, at_once)
        if self._made is not None and not self._made.fits(z, problems[0]):
            self._made = None  # its memory is free before the next is made
        if self._made is None and not self._refused:
            self._made = captured(z, problems, at_once, record)
            self._refused = self._made is None
        return evaluate_all(z, problems, at_once) if self._made is None else self._made(z, problems[0])
