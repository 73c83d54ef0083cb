"""Networks from elsewhere: torchvision's constructors, and factories that a user names."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from frostglass.core.errors import BadInput, close_match
from frostglass.numerics.local_update import in_mode
from frostglass.vision.normalise import IMAGENET_MEAN, IMAGENET_STD, Normalised


def build(name: str, *, shape: Mapping[str, int], options: Mapping[str, Any]) -> nn.Module:
    """The network "torchvision:NAME" or "package.module:factory", after one trial run on images of zeros.

    Args:
        name: with a colon in it.
        shape: classes, channels and size.
        options: further keywords for the constructor or factory.

    Raises:
        BadInput: see `frostglass.vision.networks.build`.
    """
    origin, _, maker = name.partition(":")
    if origin == "torchvision":
        network = _from_torchvision(maker, shape, options)
    else:
        network = _from_factory(name, shape, options)
    network = unwrapped(network)
    refuse_unfit(network, name)
    _try_out(network, name, shape)
    return network


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside of `torch.compile`, DataParallel and DistributedDataParallel: they compute the same.

    Compiled passes cannot be differentiated twice, and wrapped layers are not found by what is read off them.
    """
    parallel = isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner = network.module if parallel else getattr(network, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else network


def refuse_unfit(network: nn.Module, name: str) -> None:
    """Ends on what no audit can look into, and on parameters and buffers without values.

    The meta device may be wanted (`with torch.device("meta")`).

    Raises:
        BadInput: a ScriptModule, a lazy layer that has seen no input, or a tensor on the meta device.
    """
    script = next((n for n, m in network.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if script is not None:  # attacks would pass over its layers, and BatchNorm's statistics be left out
        part = f"layer {script!r} of {name!r}" if script else repr(name)
        raise BadInput(
            f"model: {part} is a ScriptModule, whose layers cannot be seen or given other weights; give the network as "
            "it was before torch.jit."
        )
    wanted = torch.get_default_device().type == "meta"
    held = (*network.named_parameters(), *network.named_buffers())
    unset = next((n for n, t in held if is_lazy(t) or (t.is_meta and not wanted)), None)
    if unset is not None:
        raise BadInput(
            f"model: {unset!r} of {name!r} has no values yet, as in a lazy layer or on the meta device; give it a size "
            "and values where the network is made."
        )


def import_torchvision() -> types.ModuleType:
    """torchvision, also where its compiled operators do not load (say, a CUDA build of it beside a CPU build of torch).

    Such an import ends with "operator torchvision::nms does not exist", because torchvision attaches shape functions
    to its detection operators even when those are absent. Classification networks use none of them, so the two
    operators are declared here, without an implementation, and the import is tried once more. Calling a detection
    operator afterwards still fails, as it should.

    Raises:
        BadInput: torchvision is not installed, or does not import for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError as problem:
        raise BadInput(
            f"model: torchvision does not import ({problem}); run pip install 'frostglass[models]'."
        ) from None
    except RuntimeError as problem:
        if "operator torchvision::" not in str(problem):
            raise BadInput(f"model: torchvision does not import ({problem}); reinstall it to match torch.") from None
    for module in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[module]  # what the first attempt left half imported
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            _DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
            _DECLARED[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return importlib.import_module("torchvision")
    except Exception as problem:
        raise BadInput(f"model: torchvision does not import ({problem}); reinstall it to match torch.") from None


_DECLARED: list[torch.library.Library] = []  # a declaration lasts as long as the library object that made it


def _from_torchvision(maker: str, shape: Mapping[str, int], options: Mapping[str, Any]) -> nn.Module:
    import_torchvision()
    models = importlib.import_module("torchvision.models")
    known = models.list_models(module=models)
    if maker not in known:
        raise BadInput(f"model: torchvision has no classification network {maker!r}; {close_match(maker, known)}.")
    problems = [
        f"model.{word}: set by frostglass for torchvision's networks; leave it out of the options."
        for word in ("weights", "num_classes", "progress")
        if word in options
    ]
    if shape["channels"] != 3:
        problems.append(
            f"model.channels: torchvision:{maker} takes 3 channels, not {shape['channels']}; load the images with 3."
        )
    if problems:
        raise BadInput(problems)
    settings = dict(options)
    if maker.startswith("vit_"):
        settings.setdefault("image_size", shape["size"])
    elif maker in ("googlenet", "inception_v3"):  # by default: second outputs, and an initialisation that takes minutes
        settings = {"aux_logits": False, "init_weights": False, **settings}
    network = _call(
        lambda **given: models.get_model(maker, weights=None, num_classes=shape["classes"], **given),
        f"torchvision:{maker}",
        settings,
    )
    return Normalised(network, IMAGENET_MEAN, IMAGENET_STD)


def _from_factory(name: str, shape: Mapping[str, int], options: Mapping[str, Any]) -> nn.Module:
    factory = _find(name)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a callable in C may hide its signature
        return _call(factory, name, options)
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [p.name for p in parameters if p.kind in by_keyword]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    problems = [
        f"model.{word}: unknown parameter of {name!r}; {close_match(word, named)}."
        for word in options
        if word not in named and not takes_any
    ]
    problems += [
        f"model.{word}: set by the data set; leave it out of the options." for word in shape if word in options
    ]
    given = {word: value for word, value in shape.items() if word in named} | dict(options)
    problems += [
        f"model.{p.name}: missing; {name!r} needs it, so give it in the options."
        for p in parameters
        if p.kind in by_keyword and p.default is p.empty and p.name not in given
    ]
    if problems:
        raise BadInput(problems)
    return _call(factory, name, given)


def _find(name: str) -> Callable[..., Any]:
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise BadInput(f"model: {name!r} is no factory; write package.module:factory.")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that no file there hides an installed package; it stays for later imports
        importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as problem:
        raise BadInput(
            f"model: the module of {name!r} does not import ({type(problem).__name__}: {problem}); "
            f"correct the name or the module (searched: installed packages and {here})."
        ) from problem
    for part in path.split("."):
        if not hasattr(found, part):
            names = [word for word, value in vars(found).items() if callable(value) and not word.startswith("_")]
            raise BadInput(
                f"model: {module_name!r} has no {part!r}, asked for by {name!r}; {close_match(part, names)}."
            )
        found = getattr(found, part)
    if not callable(found):
        raise BadInput(f"model: {name!r} is of type {type(found).__name__}; name a function that returns a network.")
    return found


def _call(factory: Callable[..., Any], name: str, given: Mapping[str, Any]) -> nn.Module:
    call = ", ".join(f"{word}={value!r}" for word, value in given.items())
    try:
        network = factory(**given)
    except Exception as problem:
        raise BadInput(
            f"model: {name!r} raised {type(problem).__name__}: {problem} (called with {call or 'nothing'}); "
            "correct it or its options."
        ) from problem
    if not isinstance(network, nn.Module):
        raise BadInput(f"model: {name!r} returned {type(network).__name__}; it must return a torch.nn.Module.")
    return network


def _try_out(network: nn.Module, name: str, shape: Mapping[str, int]) -> None:
    """One forward pass in evaluation mode, which changes no buffer."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    images = like.new_zeros(2, shape["channels"], shape["size"], shape["size"])
    try:
        with torch.no_grad(), in_mode(network, "eval"):
            logits = network(images)
    except Exception as problem:
        raise BadInput(
            f"model: {name!r} does not take images of {shape['channels']} x {shape['size']} x {shape['size']} "
            f"({type(problem).__name__}: {problem}); change the data's size or channels, or the network."
        ) from problem
    if not isinstance(logits, Tensor) or logits.shape != (2, shape["classes"]):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        fix = "let it take `classes` and answer with so many"
        if isinstance(got, tuple) and len(got) == 2 and got[0] == 2 and got[1] > 1:  # an audit's plan can say it
            fix = (
                f"set classes = {got[1]} under [scenario.model] in an audit's plan (--classes {got[1]} for recorded "
                f"updates), or {fix}"
            )
        raise BadInput(
            f"model: {name!r} answers 2 images with {got}, not logits of shape (2, {shape['classes']}); {fix}."
        )
