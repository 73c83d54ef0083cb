"""The rules of `frostglass check` on a defence as it runs, with the network and the local plan that it runs on."""

from __future__ import annotations

from frostglass.auditing.linting.facts import Facts
from frostglass.auditing.linting.rules import findings
from frostglass.core.defense import Defense
from frostglass.federated.gate import Finding, NotRun, Outgoing
from frostglass.numerics.bn import bn_layers


def linted(outgoing: Outgoing) -> Finding | NotRun:
    """Errors in the parameters of defences that add noise or claim a proof; the value is their number."""
    parts = [p for p in (outgoing.defence.parts or (outgoing.defence,)) if _about_noise(p)]
    if not parts:
        return NotRun("linter", f"{outgoing.defence.name!r} adds no noise and claims no proof", False)
    errors = [f for part in parts for f in findings(_facts(part, outgoing)) if f.severity == "error"]
    text = f"No error in the parameters of {', '.join(p.name for p in parts)}."
    if errors:
        first = errors[0]
        text = f"{first.where}: {first.found} {first.meaning} {first.fix}"
        text += f" ({len(errors)} errors in all.)" if len(errors) > 1 else ""
    return Finding("linter", bool(errors), len(errors), 0, text)


def _about_noise(part: Defense) -> bool:
    return part.claim == "proof" or "noise_multiplier" in part.settings


def _facts(part: Defense, outgoing: Outgoing) -> Facts:
    def number(key: str) -> float | None:
        value = part.settings.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    per_example = part.gradient is not None
    update, private = outgoing.update, outgoing.private
    c, h, w = private.image_shape
    return Facts(
        framework="Frostglass",
        name=part.name,
        called_dp=part.claim == "proof",
        where=part.name,
        clip=number("clipping_norm"),
        sensitivity=number("sensitivity"),
        noise_multiplier=number("noise_multiplier"),
        epsilon=number("epsilon"),
        delta=number("delta"),
        adjacency="replace_one" if part.settings.get("adjacency") == "replace" else "add_remove",
        clip_unit="image" if per_example or part.encodes else "client",
        noise_std=number("std"),
        uncovered=("labels",) if part.encodes else (),
        steps=update.plan.steps_for(update.examples) if per_example and update.plan.kind == "delta" else 1,
        rate=update.plan.sampling_rate(update.examples) if per_example else 1.0,
        accounted=True,
        batchnorm=bool(bn_layers(outgoing.model)) if per_example else None,
        dimensions=c * h * w,
    )
