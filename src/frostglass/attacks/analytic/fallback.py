"""What the peeling attacks share with gradient matching: one objective to be compared by, and its place in a run."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from frostglass.attacks.inversion.target import lay_out
from frostglass.core.randomness import global_draws
from frostglass.core.runtime import Runtime, World
from frostglass.core.threat import Observation
from frostglass.numerics.distance import cosine_distance, flatten
from frostglass.numerics.local_update import local_update


def matching_objective(seen: Observation, images: Tensor, targets: Tensor, run: Runtime) -> float:
    """1 - cosine of the whole observed update and the one that `images` with `targets` would give.

    No stage of a peeling attack minimises this: it is what all attacks on gradients can be compared by.

    Args:
        seen: the observation.
        images: [b, c, h, w] in the bounds of the domain.
        targets: [b, k].
        run: device and dtype.
    """
    goal = lay_out(seen, run)
    with global_draws(run.rng.at("objective"), run.device):
        trace = local_update(goal.model, images.to(run.device, run.dtype), targets.to(run.device, run.dtype), goal.plan)
    found = flatten([trace.gradients[n] for n in goal.names])
    return max(0.0, float(cosine_distance(found.double(), goal.flat.double())))


def alone(run: Runtime) -> Runtime:
    """For the matching: every rank does all of it, as it does the algebra."""
    return replace(run.at("matching"), world=World())
