"""Networks by name: built-in ones, torchvision's, or a factory of the user's.

Every network takes images in [0, 1] and normalises inside. Built-in ones are functions in `architectures`, found by
existing; `borrowed` holds those that come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from frostglass.core.errors import BadInput, close_match
from frostglass.core.opacus_import import import_opacus
from frostglass.core.randomness import Rng
from frostglass.core.registry import Registry
from frostglass.numerics.local_update import in_mode
from frostglass.vision.normalise import Normalise, Normalised, domain_of

__all__ = ["MODELS", "Normalise", "Normalised", "build", "domain_of", "fix_for_opacus", "torch_draws_from"]

MODELS: Registry[nn.Module] = Registry("model", "frostglass.vision")
"""Makers called with `classes`, `channels`, `size` and their own options, all by keyword."""


def build(
    name: str, *, classes: int, channels: int, size: int, options: Mapping[str, Any] | None = None, rng: Rng
) -> nn.Module:
    """A network with weights that follow from `rng`, in training mode, on the CPU.

    Args:
        name: a name in `MODELS`, "torchvision:NAME", or "package.module:factory" (the current directory is searched
            too; the factory is given those of classes, channels and size that it names, and all of `options`).
        classes: outputs, from 2.
        channels, size: the images will be [b, channels, size, size].
        options: further parameters of that network.
        rng: torch's global CPU generator is seeded from it while the network is built, and restored. That generator
            keeps few bits of a key, which is fine for weights that the server knows anyway.

    Raises:
        BadInput: an unknown name or option, sizes that do not fit the network, or a factory that does not import,
            raises, or returns something other than a network with `classes` outputs.
    """
    problems = [
        f"model.{word}: {value!r} must be a whole number from {least}."
        for word, value, least in (("classes", classes, 2), ("channels", channels, 1), ("size", size, 1))
        if isinstance(value, bool) or not isinstance(value, int) or value < least
    ]
    if problems:
        raise BadInput(problems)
    shape = {"classes": classes, "channels": channels, "size": size}
    given = dict(options or {})
    with torch_draws_from(rng):
        if ":" in name:
            from frostglass.vision import borrowed

            return borrowed.build(name, shape=shape, options=given)
        if name not in MODELS:
            raise BadInput(
                f"model: {name!r} is not known; {close_match(name, MODELS.names())}, "
                "or torchvision:NAME, or package.module:factory."
            )
        entry = MODELS[name]
        clash = [f"model.{word}: set by the data set; leave it out of the options." for word in shape if word in given]
        problems = clash or entry.problems({**shape, **given}, "model")
        if problems:
            raise BadInput(problems)
        return entry.make(**shape, **given)


@contextmanager
def torch_draws_from(rng: Rng) -> Iterator[None]:
    """Inside, torch's global CPU generator continues from a seed of 63 bits of `rng.key`; afterwards it is as before.

    Generators of other devices are neither seeded nor touched: networks are built on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(rng.key[:8], "big") & (2**63 - 1))
        yield


def fix_for_opacus(model: nn.Module) -> nn.Module:
    """A copy that Opacus can train privately: its `ModuleValidator.fix` puts group norm where batch norm was.

    Weights of replaced layers are lost: the copy of a trained network needs training again.

    Raises:
        BadInput: layers that Opacus still refuses, and batch norms that it overlooks (frozen, without weights of
            their own, or of a subclass), which would mix the images of a batch all the same.
    """
    import_opacus()
    from opacus.validators import ModuleValidator  # 3 s to import

    fixed: nn.Module = ModuleValidator.fix(model)
    with in_mode(fixed, "train"):  # in evaluation mode Opacus would report that, too
        left = ModuleValidator.validate(fixed, strict=False)
    problems = [f"model: Opacus refuses it ({problem}); use another network." for problem in left]
    problems += [
        f"model: Opacus leaves the batch norm {name!r} as it is; put nn.GroupNorm there."
        for name, module in fixed.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    if problems:
        raise BadInput(problems)
    return fixed
