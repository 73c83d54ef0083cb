"""How plain functions over arrays are compiled with numba, and the instructions that numba has no name for.

`put`, `put_on` and `stored`, what `both_sides` makes, and what is `taught` elsewhere are called from compiled loops. As
plain Python they do what a machine without those instructions would; numba is taught the fast forms when it first
compiles something, so that nothing here needs it to be installed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

# ruff: noqa: ARG001 - numba goes by the names of arguments, whether they are used or not

RUN = 32  # values in a row that `put`, `put_on` and `both_sides` are made for


def put(source: Any, at: Any, target: Any, to: Any, size: Any) -> None:
    """target[to : to + size] = source[at : at + size], for flat arrays that do not overlap and unsigned places.

    A loop over RUN values takes longer to find out that it may use vector instructions than to run.
    """
    target[to : to + size] = source[at : at + size]


def put_on(source: Any, at: Any, target: Any, to: Any, size: Any) -> None:
    """The same, added to what is there."""
    target[to : to + size] += source[at : at + size]


def stored(kind: Any, bits: Any) -> Any:
    """A float32, given by its IEEE bits, as `kind` stores it: uint32 the same bits, uint16 those of the bfloat16.

    Args:
        kind: a number of the type of the array that it goes to.
        bits: uint32.
    """
    return rounded(bits) if isinstance(kind, np.uint16) else np.uint32(bits)


def rounded(bits: Any) -> Any:
    """The IEEE bits of a float32 to those of the nearest bfloat16, ties to even."""
    tie = np.uint32(np.uint32(bits) >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(np.uint32(bits) + np.uint32(0x7FFF) + tie) >> np.uint32(16))


_TEACHING = threading.Lock()
"""Threads may compile at once: none goes on before the compiler knows all that is called."""
_UNTAUGHT: list[tuple[Callable[..., Any], Callable[[], Callable[..., Any]]]] = []
_TAUGHT: dict[int, str] = {}
"""By identity of a function that compiled loops call (none is ever let go): the file that says what it is there."""


def taught(by: Callable[[], Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for functions that compiled loops call: there they are what `by` gives.

    Args:
        by: called before anything that is compiled later; returns what `numba.extending.overload` takes.
    """

    def named(plain: Callable[..., Any]) -> Callable[..., Any]:
        _UNTAUGHT.append((plain, by))
        _TAUGHT[id(plain)] = inspect.unwrap(by).__code__.co_filename
        return plain

    return named


def as_it_is(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for functions that compiled loops call and that need no other form than their Python."""
    return taught(lambda: lambda *_: inspect.unwrap(plain))(plain)


def both_sides(matrix: NDArray[Any]) -> Callable[[Any], None]:
    """A function for compiled loops: tile = M tile M^T.

    The numbers of a tile are runs of RUN in a flat float32 array, in rows as long as the larger side of M. What the
    result does not fill is undefined. In compiled code M is part of the instructions.

    Args:
        matrix: M.
    """
    m = matrix.astype(np.float32)
    side = max(m.shape)

    def times(tile: Any) -> None:
        of = tile[: side * side * RUN].reshape(side, side, RUN)
        rows, columns = m.shape
        of[:rows, :rows] = np.einsum("ai,bj,ijk->abk", m, m, of[:columns, :columns])

    return taught(lambda: _sandwich(m))(times)


def allocates_nothing(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for kernels that make no array: the compiler then counts no references, which takes as long for the
    few views of a row as a tenth of what is done with its pixels. One that does make an array does not compile."""
    vars(plain)["allocates_nothing"] = True
    return plain


@functools.cache
def kernel(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """`function` compiled with numba (kept on disk between runs), or None if numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    with _TEACHING:
        _teach()
        _teach_more()
    found = inspect.unwrap(function)  # tests wrap every function in shape checks
    plain = FunctionType(found.__code__, found.__globals__, found.__name__, found.__defaults__)
    plain.__qualname__ = f"{found.__qualname__}_{_edition(found)}"
    uncounted = {"_nrt": False} if getattr(function, "allocates_nothing", False) and _uncounted() else {}
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}, **uncounted}
    made: Any = numba.njit(**options)(plain)
    with suppress(RuntimeError):  # neither the package's folder nor the user's cache can be written
        made._cache = _disk_cache()(plain)  # what njit(cache=True) does, with a cache of its own kind
    return cast(Callable[..., Any], made)


@functools.cache
def _uncounted() -> bool:
    """Whether numba can be told not to count references."""
    from numba.core.options import DefaultOptions

    return hasattr(DefaultOptions, "_nrt")


def _disk_cache() -> Any:
    """numba's cache on disk, which a full disk leaves without this kernel instead of ending the run."""
    from numba.core.caching import FunctionCache

    class Cache(FunctionCache):  # type: ignore[misc, unused-ignore]
        def save_overload(self, sig: Any, data: Any) -> None:
            with suppress(OSError):
                super().save_overload(sig, data)  # type: ignore[no-untyped-call, unused-ignore]

    return Cache


def _edition(function: FunctionType) -> str:
    """Of this module and those that taught what the function's module calls.

    numba goes by the source of a kernel alone, and would load one made with other instructions.
    """
    files = {__file__, *(_TAUGHT[name] for name in map(id, function.__globals__.values()) if name in _TAUGHT)}
    return hashlib.sha256("".join(map(_digest, sorted(files))).encode()).hexdigest()[:8]


@functools.cache
def _digest(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:  # packed without its sources, and so never changed beside a kernel
        return ""


def fastest(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled where numba is installed, and as it is elsewhere: for loops that are short enough."""
    return kernel(function) or function


def bfloat() -> Any:
    """LLVM's type of bfloat16, which llvmlite has no name for."""
    from llvmlite import ir

    class BFloat(ir.Type):  # type: ignore[misc, unused-ignore]
        def _to_string(self) -> str:
            return "bfloat"

    return BFloat()


def rounds_in_hardware() -> bool:
    """Whether numba's compiler may use instructions that round to bfloat16 (and vectors of 512 bits).

    A user may have told it not to (NUMBA_ENABLE_AVX, NUMBA_CPU_FEATURES), whatever this processor can do.
    """
    from llvmlite import binding
    from numba.core.registry import cpu_target

    if binding.llvm_version_info < (20, 0, 0):  # earlier releases call a function that is not there
        return False
    codegen: Any = cpu_target.target_context.codegen()
    return "+avx512bf16" in str(codegen.magic_tuple()[-1]).split(",")


@functools.cache
def _teach() -> None:
    """Tells numba what `put`, `put_on` and `stored` are in compiled code."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic, overload, register_jitable

    tools: Any = cgutils

    def run_of(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
        array = context.make_array(kind)(context, builder, array)
        item = tools.get_item_pointer(context, builder, kind, array, [at], wraparound=False)
        return builder.bitcast(item, ir.VectorType(item.type.pointee, RUN).as_pointer())

    def moving(onto: bool) -> Any:
        @intrinsic  # type: ignore[misc, unused-ignore]
        def move(typing: Any, source: Any, at: Any, target: Any, to: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
                width = target.dtype.bitwidth // 8
                value = builder.load(run_of(context, builder, source, *given[:2]), align=width)
                place = run_of(context, builder, target, *given[2:])
                if onto:
                    value = builder.fadd(builder.load(place, align=width), value)
                builder.store(value, place, align=width)
                return context.get_dummy_value()

            return types.none(source, types.uintp, target, types.uintp), generate

        return move

    moved, moved_on = moving(False), moving(True)

    @intrinsic  # type: ignore[misc, unused-ignore]
    def by_instruction(typing: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.bitcast(builder.fptrunc(given[0], bfloat()), ir.IntType(16))

        return types.uint16(types.float32), generate

    by_integers = register_jitable(inspect.unwrap(rounded))

    @overload(put, jit_options={"forceinline": True})  # type: ignore[misc, unused-ignore]
    def _(source, at, target, to, size):  # type: ignore[no-untyped-def]
        def run(source, at, target, to, size):  # type: ignore[no-untyped-def]
            if size == RUN:
                moved(source, at, target, to)
            else:
                for i in range(size):
                    target[to + i] = source[at + i]

        return inspect.unwrap(run)

    @overload(put_on, jit_options={"forceinline": True})  # type: ignore[misc, unused-ignore]
    def _(source, at, target, to, size):  # type: ignore[no-untyped-def]
        def run(source, at, target, to, size):  # type: ignore[no-untyped-def]
            if size == RUN:
                moved_on(source, at, target, to)
            else:
                for i in range(size):
                    target[to + i] += source[at + i]

        return inspect.unwrap(run)

    @overload(stored)  # type: ignore[misc, unused-ignore]
    def _(kind, bits):  # type: ignore[no-untyped-def]
        if kind != types.uint16:
            return lambda kind, bits: np.uint32(bits)
        if rounds_in_hardware():
            return lambda kind, bits: by_instruction(np.uint32(bits).view(np.float32))  # type: ignore[call-arg, unused-ignore]
        return lambda kind, bits: by_integers(np.uint32(bits))


def _teach_more() -> None:
    """Tells numba what was named since the last call: modules may be imported after the first compilation."""
    from numba.extending import overload

    while _UNTAUGHT:
        plain, by = _UNTAUGHT.pop()
        overload(plain, strict=False, jit_options={"forceinline": True})(by())


def _sandwich(matrix: NDArray[np.float32]) -> Any:
    """`both_sides` as vector instructions, a column and then a row at a time, in place."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    side, lanes = max(matrix.shape), ir.VectorType(ir.FloatType(), 8)
    fused = {"flags": ("contract",)}

    def weighted(builder: Any, weights: Any, values: list[Any]) -> Any:
        total = None
        for weight, value in zip(weights, values, strict=True):
            if weight:
                term = value if weight == 1 else builder.fmul(value, lanes([float(weight)] * 8), **fused)
                total = term if total is None else builder.fadd(total, term, **fused)
        return total

    @intrinsic  # type: ignore[misc, unused-ignore]
    def times(typing: Any, tile: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            numbers = context.make_array(tile)(context, builder, given[0]).data

            def place(number: int, lane: int) -> Any:
                at = builder.gep(numbers, [ir.IntType(64)(number * RUN + lane)])
                return builder.bitcast(at, lanes.as_pointer())

            def once(first: int, apart: int) -> None:
                for lane in range(0, RUN, 8):
                    at = [place(first + apart * i, lane) for i in range(side)]
                    values = [builder.load(p, align=4) for p in at[: matrix.shape[1]]]
                    results = [weighted(builder, weights, values) for weights in matrix]
                    for p, result in zip(at, results, strict=False):
                        builder.store(result, p, align=4)

            for column in range(matrix.shape[1]):
                once(column, side)
            for row in range(matrix.shape[0]):
                once(row * side, 1)
            return context.get_dummy_value()

        return types.none(tile), generate

    return lambda tile: lambda tile: times(tile)  # type: ignore[call-arg, unused-ignore]
