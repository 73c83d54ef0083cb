"""A defence is a named tuple of pure functions; a channel is what stands between clients and server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from frostglass.core.batch import Batch
from frostglass.core.errors import BadInput, FrostglassError, first_line
from frostglass.core.memory import is_memory
from frostglass.core.randomness import Insecure, Randomness
from frostglass.core.update import Gradients, LocalPlan, PrivacySpent, Update

if TYPE_CHECKING:
    from torch import nn

GradientFn: TypeAlias = "Callable[[nn.Module, Batch, LocalPlan, Randomness], Update]"
"""Computes the update itself, for defences that need per-example gradients."""

Simulate: TypeAlias = Callable[[Gradients, Gradients], Gradients]
"""(own gradients, observed gradients) -> what the own ones would look like if they were sent."""

Channel: TypeAlias = Callable[[Sequence[Update]], Sequence[Update]]
"""Direct, or a secure sum of a cohort."""


def _same_batch(batch: Batch, _: Randomness) -> Batch:
    return batch


def _same_update(update: Update, _: Randomness) -> Update:
    return update


def as_they_are(own: Gradients, _: Gradients) -> Gradients:
    """Nothing that a rehearsal could model: encodings, noise."""
    return own


@dataclass(frozen=True)
class Mechanism:
    """Contributions clipped in L2 norm, summed, plus independent N(0, std^2) on every coordinate of the sum.

    Args:
        unit: what a contribution is: the gradient of one "image", or the whole "update".
        clip: greatest norm of a contribution; None if nothing is clipped.
        std: of the noise on the sum, in units of a contribution; 0 for none.
        divisor: what the noised sum of images is divided by; None for the number of images.
    """

    unit: Literal["image", "update"]
    clip: float | None
    std: float
    divisor: int | None = None


@dataclass(frozen=True)
class Defense:
    """What a client does to hide its images.

    Args:
        name: as in a plan.
        encode: the batch that is trained on instead of the private one (InstaHide, Mixup).
        gradient: replaces the client step where per-example work is needed (DP-SGD); None for the ordinary step.
        protect: what is done to the finished update (pruning, noise).
        claim: "proof" where a theorem stands behind it, else "heuristic"; "none" for the identity.
        settings: its parameters, for reports.
        encodes: True if `encode` changes what is in a row, so that rows no longer are private images.
        parts: of a stack, in order; empty for a single defence.
        adaptive: names of the attacks that know of it and that it must face, most telling first.
        simulate: what an attacker that knows the defence expects to see for gradients of its own: differentiable,
            without the noise that it cannot know.
        mechanism: how much noise is added to what, where that is known; for likelihood ratios.
        account: privacy that encoding such a batch spends; None if `encode` spends none that anyone could account.
        per_example: whether `gradient` clips example by example, so that no row may hold more than one image.
    """

    name: str
    encode: Callable[[Batch, Randomness], Batch] = _same_batch
    gradient: GradientFn | None = None
    protect: Callable[[Update, Randomness], Update] = _same_update
    claim: Literal["none", "heuristic", "proof"] = "heuristic"
    settings: dict[str, Any] = field(default_factory=dict)
    encodes: bool = False
    parts: tuple[Defense, ...] = ()
    adaptive: tuple[str, ...] = ()
    simulate: Simulate = as_they_are
    mechanism: Mechanism | None = None
    account: Callable[[Batch], PrivacySpent | None] | None = None
    per_example: bool = True

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Of all parts, in order."""
        return tuple(d.mechanism for d in (self.parts or (self,)) if d.mechanism is not None)


def encoded_by(defense: Defense, batch: Batch, randomness: Randomness) -> Batch:
    """`defense.encode`, of a defence that somebody else may have written.

    Raises:
        BadInput: it raised, or returned what cannot be trained on in the place of `batch`.
    """
    with _own_errors(defense, "encode"):
        made: object = defense.encode(batch, randomness)
    if not isinstance(made, Batch):
        raise _unfit(defense, "encode", type(made).__name__, "a Batch")
    wanted = {"images": (batch.images, 4), "targets": (batch.targets, 2)}
    for name, (like, axes) in wanted.items():
        held: object = getattr(made, name)
        if not isinstance(held, Tensor) or held.dtype != like.dtype or held.ndim != axes:
            raise _unfit(
                defense, "encode", f"{name} that are {_spelled(held)}", f"tensors of {like.dtype}, {axes} axes"
            )
        if not bool(held.isfinite().all()):
            raise _unfit(defense, "encode", f"{name} that are not finite", "finite ones")
    if made.targets.shape[1] != batch.targets.shape[1]:
        raise _unfit(
            defense, "encode", f"targets of {made.targets.shape[1]} classes", f"{batch.targets.shape[1]} of them"
        )
    return made


def protected_by(defense: Defense, update: Update, randomness: Randomness) -> Update:
    """`defense.protect`, of a defence that somebody else may have written; some tensors may be left out.

    Raises:
        BadInput: it raised, or returned no update of the same tensors.
    """
    with _own_errors(defense, "protect"):
        made: object = defense.protect(update, randomness)
    return sendable(defense, "protect", made, update.gradients)


def spent_by(defense: Defense, batch: Batch) -> PrivacySpent | None:
    """`defense.account`; None where it has none.

    Raises:
        BadInput: it raised, or returned something else.
    """
    if defense.account is None:
        return None
    with _own_errors(defense, "account"):
        spent: object = defense.account(batch)
    if spent is not None and not isinstance(spent, PrivacySpent):
        raise _unfit(defense, "account", type(spent).__name__, "PrivacySpent, or None")
    return spent


def sendable(defense: Defense, step: str, made: object, like: Mapping[str, Tensor]) -> Update:
    """What a step of a defence returned, if it is an update of tensors such as `like`, by name and shape.

    Raises:
        BadInput: it is none.
    """
    if not isinstance(made, Update):
        raise _unfit(defense, step, type(made).__name__, "an Update")
    if not isinstance(made.gradients, Mapping):
        raise _unfit(defense, step, f"gradients in a {type(made.gradients).__name__}", "tensors by parameter name")
    for name, held in made.gradients.items():
        if name not in like:
            raise _unfit(defense, step, f"a tensor {name!r}", "those of the network's parameters")
        shape = tuple(like[name].shape)
        if not isinstance(held, Tensor) or held.shape != shape or not held.is_floating_point() or held.is_sparse:
            raise _unfit(defense, step, f"{name!r} as {_spelled(held)}", f"a dense tensor of floats, {shape}")
    if made.spent is not None and not isinstance(made.spent, PrivacySpent):
        raise _unfit(defense, step, f"{type(made.spent).__name__} as privacy spent", "PrivacySpent, or None")
    return made


@contextmanager
def _own_errors(defense: Defense, step: str) -> Iterator[None]:
    """Names the defence in what it raises: beside the client's network nobody would know whose error it is."""
    try:
        yield
    except Exception as wrong:
        if isinstance(wrong, FrostglassError) or is_memory(wrong):
            raise
        raise BadInput(f"defense {defense.name!r}: {step} raised {first_line(wrong)}; correct that defence.") from wrong


def _unfit(defense: Defense, step: str, got: str, wanted: str) -> BadInput:
    return BadInput(f"defense {defense.name!r}: {step} returned {got}; it must return {wanted}.")


def _spelled(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{'sparse ' if value.is_sparse else ''}{value.dtype} of shape {tuple(value.shape)}"


def stack(*defenses: Defense) -> Defense:
    """Several defences as one, applied in the order given; associative, stacks inside it being laid flat.

    Each part draws from a key of its own, so that two of one kind do not repeat each other's noise.

    Raises:
        BadInput: two of them replace the client step, or an encoding is combined with per-example clipping, or comes
            before one that is accounted for (a mixed row holds several images, so one image would count more than once
            and the epsilon be false).
    """
    flat = [part for d in defenses for part in (d.parts or (d,))]
    if len(flat) == 1:
        return flat[0]
    _refuse_clashes(flat)
    paths = [("part", d.name, sum(e.name == d.name for e in flat[:i])) for i, d in enumerate(flat)]

    def encode(batch: Batch, randomness: Randomness) -> Batch:
        for d, path in zip(flat, paths, strict=True):
            batch = encoded_by(d, batch, _below(randomness, path))
        return batch

    def protect(update: Update, randomness: Randomness) -> Update:
        for d, path in zip(flat, paths, strict=True):
            update = protected_by(d, update, _below(randomness, path))
        return update

    def simulate(own: Gradients, observed: Gradients) -> Gradients:
        for d in flat:
            own = d.simulate(own, observed)
        return own

    claims = [d.claim for d in flat]
    return Defense(
        name="+".join(d.name for d in flat) or "none",
        encode=encode,
        gradient=next((d.gradient for d in flat if d.gradient is not None), None),
        protect=protect,
        claim="proof" if "proof" in claims else "heuristic" if "heuristic" in claims else "none",
        settings={d.name: d.settings for d in flat},
        encodes=any(d.encodes for d in flat),
        parts=tuple(flat),
        adaptive=tuple(dict.fromkeys(name for d in flat for name in d.adaptive)),
        simulate=simulate,
        account=next((d.account for d in flat if d.account is not None), None),
        per_example=any(d.per_example for d in flat if d.gradient is not None),
    )


def _refuse_clashes(flat: Sequence[Defense]) -> None:
    steps = [d for d in flat if d.gradient is not None]
    if len(steps) > 1:
        raise BadInput(f"defense: {steps[0].name!r} and {steps[1].name!r} both replace the client step; stack one.")
    mixer = next((d for d in flat if d.encodes), None)
    if mixer is not None and any(d.per_example for d in steps):
        raise BadInput(
            f"defense: {mixer.name!r} mixes images, so the per-example sensitivity of {steps[0].name!r} and its "
            "epsilon would be false; use one of them."
        )
    proven = next((d for d in flat if d.encodes and d.account is not None), None)
    if mixer is not None and proven is not None and mixer.account is None:
        raise BadInput(
            f"defense: {mixer.name!r} mixes images before {proven.name!r} does, so the sensitivity of the latter and "
            "its epsilon would be false; use one of them, or put the latter first."
        )


def _below(randomness: Randomness, path: tuple[str | int, ...]) -> Randomness:
    """Keys of the operating system are fresh at each call anyway."""
    return Insecure(randomness.rng().at(*path)) if isinstance(randomness, Insecure) else randomness
