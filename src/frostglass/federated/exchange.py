"""What goes over the wire of a federated engine, as model states, and what Frostglass calls an update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from frostglass.core.defense import Defense, protected_by
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Randomness
from frostglass.core.update import BNStatistics, Gradients, LocalPlan, Update
from frostglass.numerics.bn import bn_layers, recorded_bn
from frostglass.numerics.local_update import in_mode, trainable

State = Mapping[str, Tensor]
"""Like `model.state_dict()`: parameters and buffers by name."""


@dataclass(frozen=True)
class Names:
    """Which entries of a state are trained and which are carried along.

    Args:
        trained: parameters that take part in training.
        carried: everything else: buffers (running statistics, counters) and frozen parameters.
        tied: further names of the same tensors (shared layers and weights), each with the name that stands above.
    """

    trained: tuple[str, ...]
    carried: tuple[str, ...]
    tied: Mapping[str, str]


def names_of(model: nn.Module) -> Names:
    """Of this network."""
    trained = tuple(trainable(model))
    first = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    tied = {n: first[id(t)] for n, t in every if first[id(t)] != n}
    in_state = tuple(model.state_dict())
    carried = tuple(n for n in in_state if n not in tied and n not in set(trained))
    return Names(trained, carried, {n: tied[n] for n in in_state if n in tied})


def device_of(model: nn.Module) -> torch.device:
    """Where the network lies; the CPU for one without parameters and buffers."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def misfits(state: State, model: nn.Module) -> list[str]:
    """What keeps `state` from being one of `model`, a clause each: names, shapes, types, values that are not finite."""
    own = model.state_dict()
    found = []
    missing, strange = [n for n in own if n not in state], [n for n in state if n not in own]
    if missing:
        found.append(f"{len(missing)} entries are missing, the first {missing[0]!r}")
    if strange:
        found.append(f"{len(strange)} entries are not of this network, the first {strange[0]!r}")
    for name, value in own.items():
        got = state.get(name)
        if got is None:
            continue
        if got.shape != value.shape:
            found.append(f"{name!r} has shape {tuple(got.shape)}, not {tuple(value.shape)}")
        elif got.is_floating_point() != value.is_floating_point():
            found.append(f"{name!r} is {got.dtype}, not {value.dtype}")
        elif got.is_floating_point() and not bool(got.isfinite().all()):
            found.append(f"{name!r} holds {int((~got.isfinite()).sum())} values that are not finite")
    return found


def difference(sent: State, returned: State, trained: tuple[str, ...]) -> dict[str, Tensor]:
    """W_before - W_after of every trained parameter: what Frostglass calls a FedAvg delta.

    Where one side is in half precision the difference is not: a step is smaller than what the weights are rounded to.
    """
    return {name: sent[name].detach() - returned[name].detach() for name in trained}


def applied(sent: State, delta: Gradients, carried: State, tied: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The state that a client with this delta returns: W_before - delta, and what it carries along.

    Args:
        sent: what the server sent.
        delta: W_before - W_after of every trained parameter.
        carried: entries that were not trained, as they leave; those that are missing leave as they were sent.
        tied: see `Names`: what has two names leaves under both with one value.
    """
    known = {n: n for n in sent} | {n: one for n, one in (tied or {}).items() if n in sent and one in sent}
    return {
        n: (sent[one] - delta[one] if one in delta else carried.get(one, sent[one])).detach().clone()
        for n, one in known.items()
    }


def protected(
    model: nn.Module,
    sent: State,
    returned: State,
    defense: Defense,
    randomness: Randomness,
    *,
    examples: int,
    plan: LocalPlan,
) -> tuple[dict[str, Tensor], Update]:
    """(what leaves the client, the same as an update): `defense.protect` on the difference of two states.

    Buffers pass as they are: defences of the update do not touch them, and BatchNorm statistics tell about the images.

    Args:
        model: of these states; read for the names alone.
        sent: what the server sent.
        returned: what local training made of it.
        defense: or a stack; its `encode` and `gradient` are not called.
        randomness: of its noise.
        examples: images that the client trained on.
        plan: how.
    """
    names = names_of(model)
    update = Update(difference(sent, returned, names.trained), {}, examples, replace(plan, kind="delta"))
    update = protected_by(defense, update, randomness)
    carried = {n: returned[n] for n in names.carried if n in returned}
    return applied(sent, update.gradients, carried, names.tied), update


def statistics_sent(
    model: nn.Module, sent: State, returned: State, image_shape: tuple[int, int, int], examples: int
) -> dict[str, BNStatistics]:
    """Batch statistics of a client's only step, from how far it moved the running ones.

    With momentum m, running' = (1 - m) running + m batch, where the variance is the unbiased one; a layer that keeps a
    cumulative average (momentum None) has moved by 1 / (batches seen).

    Args:
        model: of these states, in any mode.
        sent, returned: before and after one step in train mode over all images.
        image_shape: (channels, height, width).
        examples: images in that step.

    Raises:
        BadInput: a layer of the network has no running statistics in these states.
    """
    counts = _counts(model, image_shape)
    found = {}
    for name, layer in bn_layers(model).items():
        mean, var, seen = (f"{name}.{part}" for part in ("running_mean", "running_var", "num_batches_tracked"))
        if any(key not in state for key in (mean, var) for state in (sent, returned)):
            raise BadInput(f"buffers: {mean!r} is not in what was sent and returned; BatchNorm buffers were left out.")
        momentum = getattr(layer, "momentum", None)
        m = 1.0 / max(int(returned[seen]), 1) if momentum is None else float(momentum)
        count = counts[name] * examples
        batch_mean = (returned[mean] - (1 - m) * sent[mean]) / m
        batch_var = (returned[var] - (1 - m) * sent[var]) / m * (count - 1) / count
        found[name] = BNStatistics(batch_mean, batch_var.clamp_min(0), count)
    return found


def _counts(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """Elements per channel and image of every BatchNorm input."""
    like = next(model.parameters())
    with torch.no_grad(), in_mode(model, "eval"), recorded_bn(model) as seen:
        model(torch.zeros(1, *image_shape, dtype=like.dtype, device=like.device))
    return {name: s.count for name, s in seen.items()}
