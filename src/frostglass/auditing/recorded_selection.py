"""Which recorded updates are looked at, and why others are not."""

from __future__ import annotations

from collections.abc import Sequence

from frostglass.auditing.recorded_inputs import Sent
from frostglass.auditing.recorded_view import Recording, mode_of
from frostglass.core.errors import BadInput


def chosen(recording: Recording) -> tuple[list[Sent], dict[int, str]]:
    """(updates to audit, why the others are not, by number).

    Without a choice in the plan: the first, the middle and the last round that was kept, all clients of each, up to
    `most` updates in turn, so that every chosen round is there.

    Raises:
        BadInput: a round or a client that the record does not hold.
    """
    plan, left = recording.plan, {}
    there = list(dict.fromkeys(u.header.client for u in recording.source.updates))
    unknown = [c for c in plan.clients if c not in there]
    if unknown:
        raise BadInput(f"updates.clients: {unknown[0]!r} is not in the record; there are {_listed(there)}.")
    kept: list[Sent] = []
    for one in recording.source.updates:
        h = one.header
        if one.recorded and h.file is None:
            left[h.number] = f"not kept: {h.reason or 'no tensors'}"
        elif plan.clients and h.client not in plan.clients:
            left[h.number] = "another client was asked for"
        else:
            kept.append(one)
    rounds = sorted({u.header.round for u in kept})
    wanted = plan.rounds or sorted({rounds[0], rounds[len(rounds) // 2], rounds[-1]}) if rounds else []
    absent = [r for r in plan.rounds if r not in rounds]
    if absent:
        raise BadInput(f"updates.rounds: {absent[0]} is not kept in the record, which holds rounds {_listed(rounds)}.")
    in_rounds = {r: [u for u in kept if u.header.round == r] for r in wanted}
    for one in kept:
        if one.header.round not in in_rounds:
            left[one.header.number] = "another round was chosen; see --round"
    picked: list[Sent] = []
    while any(in_rounds.values()):
        for r in wanted:
            if in_rounds[r] and len(picked) < plan.most:
                picked.append(in_rounds[r].pop(0))
            elif in_rounds[r]:
                left[in_rounds[r].pop(0).header.number] = f"more than {plan.most} updates; raise --most"
    return sorted(picked, key=lambda u: u.header.number), left


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "") if names else "none"


def unreadable(recording: Recording, sent: Sent) -> str:
    """Why this update cannot be looked at, half a sentence; empty if it can."""
    try:
        held = recording.source.tensors(sent)
        model = recording.model(sent, mode_of(sent, held))
    except BadInput as wrong:
        return str(wrong).removeprefix(f"{sent.title}: ").rstrip(".")
    fitting = {n: p for n, p in model.named_parameters() if n in held.update}
    if not fitting:
        if not held.update:
            return "no tensor is in it"
        first = next(iter(held.update))
        return f"no parameter of {recording.network.name} is in it, but {first!r}; is it of another network?"
    wrong_shape = [n for n, p in fitting.items() if held.update[n].shape != p.shape]
    if wrong_shape:
        n = wrong_shape[0]
        return f"{n!r} has shape {tuple(held.update[n].shape)} and {tuple(fitting[n].shape)} in the network"
    kinds = [n for n in fitting if not held.update[n].is_floating_point()]
    if kinds:
        return f"{kinds[0]!r} holds {held.update[kinds[0]].dtype}; scale quantised values back to floating point"
    broken = [n for n in fitting if not bool(held.update[n].isfinite().all())]
    if broken:
        count = sum(int((~held.update[n].isfinite()).sum()) for n in broken)
        return f"values that are not finite: {count}, the first in {broken[0]!r}"
    if sent.recorded and sent.header.reason:  # a whole state, not its difference
        return f"it was {sent.header.reason.rstrip('.')}"
    if not any(bool(held.update[n].any()) for n in fitting):
        return "every value is zero: nothing can be recovered from it, and nothing was learnt"
    return ""
