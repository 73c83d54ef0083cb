"""Which of a client's images does its update point at: many identification games on each recorded update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from frostglass.auditing.collaboration_plan import LeakagePlan
from frostglass.auditing.outgoing import outgoing_checks
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, Rng
from frostglass.core.update import LocalPlan, Update
from frostglass.federated.federation import Federation
from frostglass.federated.gate import Outgoing
from frostglass.federated.local_client import NOTHING
from frostglass.federated.recorded import Record, Recorded


def games(made: Federation, record: Record, which: set[tuple[int, str]], plan: LeakagePlan) -> dict[str, Any]:
    """{"round/client": {share, candidates, chance, text} or {reason}} of the updates `which`.

    The check is the one of a gate (`outgoing_checks`): one of the client's images among others of its class that no
    client holds (test images), for an attacker that knows the client's other images. Games on one update depend on
    each other, so their share is a description, not a rate with an interval. Where clients train on encodings,
    candidates are plain images in the range of encodings: the attacker compares as if nothing had been mixed.
    """
    decoys = made.in_range(made.test.images.float() / 255), made.test.labels
    found: dict[str, Any] = {}
    for one in record.updates:
        h = one.header
        if (h.round, h.client) in which:
            found[f"{h.round}/{h.client}"] = _of(made, one, decoys, plan)
    return found


def _of(made: Federation, one: Recorded, decoys: tuple[Tensor, Tensor], plan: LeakagePlan) -> dict[str, Any]:
    h = one.header
    decide = outgoing_checks(
        label_leakage=None, exact_recovery=False, linter=False, gallery=1.0, decoys=decoys, candidates=plan.candidates,
        targets=plan.targets, randomness=Insecure(Rng.from_seed(made.plan.seed, "collaboration", str(h.number))),
    )  # fmt: skip
    try:
        gradients, _ = one.payload()
        sent = one.sent()
    except BadInput as wrong:
        return {"reason": wrong.problems[0]}
    private, defence = made.private(int(h.client)), made.inside if made.inside.encodes else NOTHING
    update = Update(gradients, {}, len(private), h.local_plan() or LocalPlan("delta"))
    decision = decide(Outgoing(made.model, sent, update, private, defence, h.round, h.client))
    if not decision.findings:
        return {"reason": decision.not_run[0].reason}
    told: Mapping[str, Any] = {"share": decision.findings[0].value, "candidates": plan.candidates}
    return {**told, "chance": 1 / plan.candidates, "text": decision.findings[0].text}
