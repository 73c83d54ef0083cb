"""The plan of a comparison of federations: one job, trained under several defences, and what its updates give away."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from frostglass.auditing.plan import Resolved, Title
from frostglass.auditing.plan_reading import override_value, read_values, sentences
from frostglass.auditing.plan_verdict import Strict
from frostglass.core.errors import BadInput
from frostglass.core.files import placed, source_placed
from frostglass.federated.federate_plan import DefensePart, FederatePlan
from frostglass.federated.train_plan import Seed

BUNDLED_POOL = "photos"
"""As `public` of an encoder: patches of the bundled photographs, cut for the size and channels of the images."""

PLACED = {"name": "the comparison's own name", "seed": "seeds", "defense": "a method's defense"}
"""Keys of a federation that a comparison sets for each run, and where they come from."""


class MethodPlan(Strict):
    """One way to train together."""

    name: Title = Field(min_length=1, description="for legends")
    defense: list[DefensePart] = Field(default_factory=list, description="a stack, as in a federation's plan")
    change: dict[str, Any] = Field(default_factory=dict, description='keys of the job that differ, as "client.lr"')


class LeakagePlan(Strict):
    """What is looked at in the recorded updates of the first seed."""

    rounds: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list, description="whose updates are audited; none: the first and last"
    )
    candidates: int = Field(10, ge=2, description="of an identification game, all of one class")
    targets: int = Field(6, ge=1, description="images of each client that are asked for in each update")
    budget: Literal["small", "full"] = Field("small", description="as in `frostglass audit-updates`")


class CollaborationPlan(Resolved):
    """A whole comparison."""

    name: Title = Field("train together", min_length=1, description="for the report")
    seeds: list[Seed] = Field(default_factory=lambda: [0, 1], min_length=1, description="of split, network and batches")
    job: dict[str, Any] = Field(default_factory=dict, description="a federation's plan, without its defence")
    method: list[MethodPlan] = Field(min_length=1, description="what is compared")
    leakage: LeakagePlan = Field(default_factory=LeakagePlan, description="what is looked at in the updates")

    def federation(self, method: MethodPlan, seed: int) -> FederatePlan:
        """The plan of one run.

        Raises:
            BadInput: every problem of it, named by the method.
        """
        values = copy.deepcopy(self.job)
        for path, value in method.change.items():
            node = values
            *parents, last = path.split(".")
            for part in parents:
                node = node.setdefault(part, {}) if isinstance(node, dict) else node
            if not isinstance(node, dict):
                raise BadInput(f"{method.name}: change: {path!r} goes into a value that is no table; name a key.")
            node[last] = value
        values |= {
            "name": f"{self.name}: {method.name}", "seed": seed,
            "defense": [{"name": p.name, **p.settings} for p in method.defense],
        }  # fmt: skip
        try:
            plan = FederatePlan.model_validate(values)
            plan.check()
        except ValidationError as wrong:
            raise BadInput([_placed(s, method) for s in sentences(wrong, FederatePlan)]) from None
        except BadInput as wrong:
            raise BadInput([_placed(s, method) for s in wrong.problems]) from None
        return plan


def _placed(problem: str, method: MethodPlan) -> str:
    """Where the sentence belongs: to the job that all methods share, unless it is about what this method changes."""
    where = problem.partition(":")[0]
    own = where == "seed" or where.startswith("defense")
    changed = any(where.startswith(k) or k.startswith(where) for k in method.change)
    return f"{method.name}: {problem}" if own or changed else f"job.{problem}"


def slug(name: str) -> str:
    """Of a method, as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "method"


def digits(overrides: Sequence[str] = ()) -> CollaborationPlan:
    """The bundled demonstration: 1,797 digits, four clients of unequal classes, four ways to train.

    Raises:
        BadInput: an override does not parse, or what it sets cannot be used.
    """
    encoded = {"client.epochs": 4, "client.lr": 0.02, "client.momentum": 0.9, "server.rounds": 30}
    instahide = {"name": "instahide", "sees": "magnitudes"}
    values: dict[str, Any] = {
        "name": "digits, four clients",
        "job": {
            "data": {"source": "digits"},
            "split": {"clients": 4, "alpha": 1.0},
            "client": {"epochs": 2, "minibatch": 33, "lr": 0.05},
            "server": {"rounds": 10},
        },
        "method": [
            {"name": "no defence"},
            {"name": "InstaHide inside, k = 2", "defense": [{**instahide, "k": 2}], "change": encoded},
            {
                "name": "InstaHide cross, k = 4",
                "defense": [{**instahide, "k": 4, "private": 2, "public": BUNDLED_POOL}],
                "change": encoded,
            },
            {
                "name": "DP-SGD, noise 1",
                "defense": [{"name": "dp_sgd", "clipping_norm": 1.0, "noise_multiplier": 1.0}],
                "change": {"model.fix": "opacus", "client.lr": 0.5, "client.minibatch": 64, "client.epochs": 2},
            },
        ],
    }
    for text in overrides:
        override_value(values, text)
    return parse_collaboration(_anchored(values, Path()))


def load_collaboration(path: Path, overrides: Sequence[str] = ()) -> CollaborationPlan:
    """Reads a TOML plan; paths of its job are taken from its folder.

    Raises:
        BadInput: every problem that was found, together.
    """
    return parse_collaboration(_anchored(read_values(path, overrides), path.parent))


def _anchored(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With the paths of the job's images, and of the public pools of its defences, taken from `folder`."""
    job = values.get("job")
    data = job.get("data") if isinstance(job, dict) else None
    for key in ("source", "test"):
        if isinstance(data, dict) and isinstance(data.get(key), str):
            data[key] = source_placed(data[key], folder)
    methods = values.get("method")
    for method in methods if isinstance(methods, list) else []:
        defenses = method.get("defense") if isinstance(method, dict) else None
        for part in defenses if isinstance(defenses, list) else []:
            pool = part.get("public") if isinstance(part, dict) else None
            if isinstance(pool, str) and pool != BUNDLED_POOL:
                part["public"] = placed(pool, folder)
    return values


def parse_collaboration(values: Mapping[str, Any]) -> CollaborationPlan:
    """Checks a plan with all its federations before any compute.

    Raises:
        BadInput: every problem that was found, together.
    """
    try:
        plan = CollaborationPlan.model_validate(values)
    except ValidationError as wrong:
        raise BadInput(sentences(wrong, CollaborationPlan)) from None
    found: list[str] = []
    if len({slug(m.name) for m in plan.method}) < len(plan.method):
        found.append("method: two of them have one name; give each its own.")
    if len(set(plan.seeds)) < len(plan.seeds):
        found.append("seeds: one stands there twice; a repeated run is no second one.")
    rounds: list[int] = []
    found += [f"job.{k}: {PLACED[k]} sets it; leave it out of the job." for k in plan.job if k in PLACED]
    for method in plan.method:
        found += [
            f"{method.name}: change: {k!r} comes from {PLACED[first]}; leave it out of the changes."
            for k in method.change if (first := k.partition(".")[0]) in PLACED
        ]  # fmt: skip
        try:
            rounds.append(plan.federation(method, plan.seeds[0]).server.rounds)
        except BadInput as wrong:
            found += wrong.problems
    last = max(plan.leakage.rounds, default=0)
    if rounds and last > min(rounds):
        found.append(f"leakage.rounds: {last} is beyond the {min(rounds)} rounds that every method has; lower it.")
    if found:
        raise BadInput(list(dict.fromkeys(found)))
    return plan
