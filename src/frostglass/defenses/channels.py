"""What stands between the clients and the server."""

from __future__ import annotations

from collections.abc import Sequence

from frostglass.core.defense import Channel
from frostglass.core.errors import BadInput
from frostglass.core.update import Update


def direct() -> Channel:
    """Every update reaches the server as it was sent."""
    return lambda updates: list(updates)


def secure_sum(cohort: int) -> Channel:
    """Only the mean over `cohort` clients leaves, weighted by their examples: an ideal secure aggregation.

    Batch statistics of single clients are hidden too. Hiding individuals in a sum is not privacy by itself: the
    server attacks the sum as one larger batch.

    Raises:
        BadInput: the number of updates is no multiple of `cohort`.
    """

    def channel(updates: Sequence[Update]) -> list[Update]:
        if len(updates) % cohort:
            raise BadInput(f"client.cohort: {len(updates)} clients do not divide into cohorts of {cohort}.")
        return [_mean(updates[i : i + cohort]) for i in range(0, len(updates), cohort)]

    return channel


def _mean(updates: Sequence[Update]) -> Update:
    total = sum(u.examples for u in updates)
    names = updates[0].gradients.keys()
    mean = {n: sum((u.gradients[n] * (u.examples / total) for u in updates[1:]),
                   updates[0].gradients[n] * (updates[0].examples / total)) for n in names}  # fmt: skip
    return Update(mean, {}, total, updates[0].plan, updates[0].spent, clients=sum(u.clients for u in updates))
