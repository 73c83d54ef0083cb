"""A pretend accelerator: tensors that live "elsewhere", are computed on the CPU, and refuse what CUDA refuses.

What fails on a GPU alone is, nearly always, not arithmetic: a tensor left on the CPU meets one on the device, or a
tensor on the device is handed to numpy. Here both fail as they do there, on any machine. What waits for the device (a
value read by Python, a copy back, a shape that depends on values) is written down in `waits`, so that a test can say
that a loop has none.

Importing this module changes torch for the whole process: `pretend` becomes a device. Tests that use it run in a
process of their own (`tests/test_on_device.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map

waits: list[str] = []
"""Names of what has waited for the device, in order."""

arrivals: list[str] = []
"""Names of what has brought values to the device, in order: a CUDA graph cannot record that."""

_aten = torch.ops.aten
_ACROSS = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_READS = {
    _aten._local_scalar_dense.default,
    _aten._unique2.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
}


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """What torch asks a device's module: here, a device without a generator of its own."""

    def device_count(self) -> int:
        return 1

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False


backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Module())
DEVICE = torch.device("pretend", 0)


class Elsewhere(Tensor):
    """A tensor on the pretend device; `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=DEVICE,
        )
        made.near = near
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.near!r})"

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_as_tensors(index), value)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["near"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: object, stride: object) -> Elsewhere:
        return Elsewhere(inner["near"])

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`op` on the values, its results wrapped."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in given if not isinstance(x, Elsewhere)]
    there = [x for x in given if isinstance(x, Elsewhere)]
    _refuse_mixture(op, args, here, bool(there))
    to = kwargs.get("device")
    _refuse_generator(op, kwargs.get("generator"), bool(there) or _is_pretend(to))
    leaves = bool(there) and to is not None and torch.device(to).type == "cpu"
    if op in _READS or leaves or (op is _aten.copy_.default and not isinstance(args[0], Elsewhere)):
        waits.append(str(op))
    if here and (_is_pretend(to) or (op in _ACROSS and there and isinstance(args[0], Elsewhere))):
        arrivals.append(str(op))
    near_args, near_kwargs = tree_map(_near, args), tree_map(_near, kwargs)
    found = op(*near_args, **near_kwargs)
    if torch.Tag.inplace_view in op.tags:  # unsqueeze_ and the like: the wrapper takes the new shape too
        with no_dispatch():
            op(*args, **kwargs)
    if leaves or op is _aten._local_scalar_dense.default:
        return found
    known: dict[int, Tensor] = {id(x.near): x for x in there} | {id(x): x for x in here}
    return tree_map(lambda x: known.get(id(x)) if id(x) in known else _wrapped(x), found)


def _refuse_mixture(op: Any, args: tuple[Any, ...], here: list[Tensor], there: bool) -> None:
    """As CUDA does; single numbers may lie anywhere, and what is indexed decides where its indices may lie."""
    wide = [x for x in here if x.dim() > 0]
    if not there or not wide or op in _ACROSS:
        return
    if op in _INDEXED and isinstance(args[0], Elsewhere) and all(not isinstance(x, Elsewhere) for x in args[1]):
        return
    shapes = ", ".join(str(list(x.shape)) for x in wide)
    raise RuntimeError(f"Expected all tensors to be on the same device: {op} got some on the CPU, of shape {shapes}.")


def _refuse_generator(op: Any, generator: Any, there: bool) -> None:
    if there and generator is not None and generator._cdata not in _GENERATORS:
        raise RuntimeError(f"Expected a 'pretend' device type for generator but found 'cpu': {op}")


def _near(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.near
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _wrapped(value: Any) -> Any:
    return Elsewhere(value) if isinstance(value, Tensor) else value


_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")


def _made_whole(op: Any) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: _wrapped(op(*tree_map(_near, args), **tree_map(_near, kwargs)))


# By themselves these make an empty tensor and let an operator resize it, of which a wrapper would not hear.
_FACTORIES = torch.library.Library("aten", "IMPL")
for _op in (_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.eye.default, _aten.eye.m):
    _FACTORIES.impl(_op, _made_whole(_op), "PrivateUse1")


def _as_tensors(index: Any) -> Any:
    """An index whose lists are tensors: torch makes them where no backend of Python's can reach."""
    if isinstance(index, tuple):
        return tuple(map(_as_tensor, index))
    return _as_tensor(index)


def _as_tensor(index: Any) -> Any:
    return torch.tensor(index, dtype=None if len(index) else torch.long) if isinstance(index, list | tuple) else index


def _is_pretend(device: Any) -> bool:
    return device is not None and torch.device(device).type == "pretend"


def _made_near(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensors out of Python's numbers are filled where no backend of Python's can reach: make them here, then move."""

    def made(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        if not _is_pretend(device):
            return make(data, *args, device=device, **kwargs, **({"requires_grad": True} if requires_grad else {}))
        if isinstance(data, Tensor):
            return data.to(device, kwargs.get("dtype"))
        return make(data, *args, **kwargs).to(device).requires_grad_(requires_grad)

    return made


class _AnyGenerator(type(torch.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, made: object) -> bool:
        return isinstance(made, _Generator)


_Generator = torch.Generator
_GENERATORS: set[int] = set()


class Generator(_Generator, metaclass=_AnyGenerator):
    """One of the pretend device's draws from the CPU's, and is known by its address: operators see a bare one."""

    _of: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu" if _is_pretend(device) else device)
        made._of = DEVICE if _is_pretend(device) else _Generator.device.__get__(made)  # type: ignore[attr-defined]
        if _is_pretend(device):
            _GENERATORS.add(made._cdata)  # type: ignore[attr-defined]
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._of


_new_tensor, _tolist = Tensor.new_tensor, Tensor.tolist


def _new(self: Tensor, data: Any, **kwargs: Any) -> Tensor:
    device = kwargs.pop("device", None) or self.device
    if not _is_pretend(device):
        return _new_tensor(self, data, device=device, **kwargs)
    return torch.tensor(data, dtype=kwargs.pop("dtype", self.dtype), device=device, **kwargs)


torch.Generator = Generator  # type: ignore[misc]
torch.tensor = _made_near(torch.tensor)
torch.as_tensor = _made_near(torch.as_tensor)
Tensor.new_tensor = _new  # type: ignore[method-assign]
Tensor.tolist = lambda self: _tolist(self.detach().cpu() if isinstance(self, Elsewhere) else self)  # type: ignore
