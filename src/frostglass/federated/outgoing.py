"""An update on its way out of a client, and what checks say about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor, nn

from frostglass.core.batch import Batch
from frostglass.core.defense import Defense
from frostglass.core.update import BNStatistics, Update
from frostglass.federated.exchange import State
from frostglass.numerics.called import copied


@dataclass(frozen=True, eq=False)
class Outgoing:
    """An update on its way out, with all that its client knows about it.

    Args:
        model: the network; its weights are replaced by `sent` in a copy.
        sent: parameters and buffers as the server sent them.
        update: what is about to leave, after the defence; its `bn` only if the server could know them (the buffers of
            a single step leave, too).
        private: the images that it was made of, in [0, 1], and their targets.
        defence: what was done; `Defense("none", claim="none")` for nothing.
        round: of the server.
        client: its name.
        deadline: of `time.monotonic()`, when checks shall have ended; set by the gate.
    """

    model: nn.Module
    sent: State
    update: Update
    private: Batch
    defence: Defense
    round: int
    client: str
    deadline: float = math.inf

    def expired(self) -> bool:
        """Whether the time for checks is over."""
        return time.monotonic() >= self.deadline

    def copied(self) -> Outgoing:
        """The same in tensors of its own."""
        u, p = self.update, self.private
        bn = {n: BNStatistics(s.mean.clone(), s.var.clone(), s.count) for n, s in u.bn.items()}
        return replace(
            self,
            model=copied(self.model),
            sent=_own(self.sent),
            update=replace(u, gradients=_own(u.gradients), bn=bn),
            private=replace(p, images=p.images.clone(), targets=p.targets.clone()),
        )


@dataclass(frozen=True)
class Finding:
    """What one check came to.

    Args:
        check: its name.
        exceeded: whether it speaks against letting the update out.
        value: what was measured; the unit is in `text`.
        tolerance: up to which nothing is exceeded.
        text: for people, one or two sentences.
    """

    check: str
    exceeded: bool
    value: float
    tolerance: float
    text: str


@dataclass(frozen=True)
class NotRun:
    """A check without a finding.

    Args:
        check: its name.
        reason: a clause.
        failed: True if it ought to have run (time was over, it broke); False if it cannot apply to such an update.
    """

    check: str
    reason: str
    failed: bool


@dataclass(frozen=True)
class Decision:
    """What all checks together came to.

    Args:
        findings: in the order in which they were made.
        seconds: of all checks.
        not_run: checks that have no finding.
    """

    findings: tuple[Finding, ...]
    seconds: float
    not_run: tuple[NotRun, ...] = ()

    @property
    def exceeded(self) -> tuple[Finding, ...]:
        """Findings that speak against letting the update out."""
        return tuple(f for f in self.findings if f.exceeded)


Decide: TypeAlias = Callable[[Outgoing], Decision]


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in tensors.items()}
