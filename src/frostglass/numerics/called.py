"""A network called with other weights and buffers, or copied; it is left as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import checkpoint

M = TypeVar("M", bound=nn.Module)


def called_with(model: nn.Module, values: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """What `model` answers to `images` with `values` in the place of parameters and buffers of these names.

    `torch.func.functional_call` exchanges what a layer holds once for every name of the layer, and leaves the new
    values in one that has two names: weights of a client's steps, and running statistics of its private images. So
    each layer is named once here. A weight that several layers hold is exchanged in all of them.
    """
    names: dict[Tensor, list[str]] = {}
    for prefix, layer in model.named_modules():  # each layer once, under its first name
        weights = layer.named_parameters(prefix, recurse=False, remove_duplicate=False)
        buffers = layer.named_buffers(prefix, recurse=False, remove_duplicate=False)
        for name, held in (*weights, *buffers):
            names.setdefault(held, []).append(name)
    everywhere = {place: values[group[0]] for group in names.values() if group[0] in values for place in group}
    with activations_kept():
        answer: Tensor = functional_call(model, {**values, **everywhere}, (images,), tie_weights=False)
    return answer


@contextmanager
def activations_kept() -> Iterator[None]:
    """In the block `torch.utils.checkpoint` keeps activations that it would compute anew in the backward pass.

    That pass comes when `called_with` has put the network's own weights and buffers back. What is computed anew with
    those has a gradient that is wrong without a word, as of every step of a client but the first; and hooks see it
    twice. A pass gives the same here, for the memory that checkpointing saves, in other threads meanwhile too.
    """
    own = object()
    try:  # around the first change too: an interrupt may come at any line
        with _KEEPING:
            _KEPT.add(own)
            if len(_KEPT) == 1:
                for name, anew in _ANEW.items():
                    held = getattr(checkpoint, name, anew)
                    if held is not anew:  # else torch has none, or an interrupt has left it there
                        _OWN[name] = held
                for name in _OWN:
                    setattr(checkpoint, name, _ANEW[name])
        yield
    finally:
        with _KEEPING:
            _KEPT.discard(own)
            if not _KEPT:
                for name, held in _OWN.items():
                    setattr(checkpoint, name, held)


class _Nothing(AbstractContextManager[None]):
    """Around a pass of the newer form: nothing that it keeps is packed away."""

    def __init__(self, frame: object) -> None:
        super().__init__()

    def __exit__(self, *_: object) -> None:
        """Nothing was begun."""


class _Straight:
    """Of the older form, which calls the function itself."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *given: Any) -> Any:
        """What the function gives."""
        return function(*given)


_ANEW: dict[str, Any] = {"_checkpoint_hook": _Nothing, "CheckpointFunction": _Straight}
"""What `torch.utils.checkpoint` asks for its two forms (2.11 to 2.14), and what stands there in `activations_kept`."""
_OWN: dict[str, Any] = {}
_KEPT: set[object] = set()
_KEEPING = threading.Lock()


def copied(model: M, known: Mapping[int, Any] | None = None) -> M:
    """A copy of `model`, of what it keeps from its last pass too, which `copy.deepcopy` refuses to copy.

    Such are activations that a network keeps to look at, and weights of `torch.nn.utils.weight_norm` and
    `spectral_norm`, which every pass makes anew. The copy holds their values, without the graph.

    Args:
        model: left as it is.
        known: by `id`, what takes the place of a part in the copy.
    """
    memo = dict(known or {})
    for layer in model.modules():
        for held in _tensors(vars(layer)):
            if held.grad_fn is not None:
                memo[id(held)] = held.detach().clone()
    return copy.deepcopy(model, memo)


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping | list | tuple):
        for part in held.values() if isinstance(held, Mapping) else held:
            yield from _tensors(part)
