"""How plain functions over arrays are compiled with numba, and the three instructions that numba has no name for.

`fetch`, `pour` and `stored` are called from compiled loops. As plain Python they do what a machine without those
instructions would; numba is taught the fast forms when it first compiles something, so that nothing here needs it to be
installed.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

# ruff: noqa: ARG001 - numba goes by the names of arguments, whether they are used or not

AHEAD = 64  # pixels that `fetch` asks for at a time: a line of bytes, four of float32
LANES = 16  # values that `pour` writes at a time: a line of float32


def fetch(table: Any, row: Any, column: Any) -> None:
    """Asks for the AHEAD pixels from table[row, column] to be brought into a cache; changes nothing.

    Bytes go to the first level. Four bytes a pixel go to the second: at the first, requests wait in the same short
    queue as loads, and rows asked for in that way come a fifth more slowly than rows that are not asked for.
    """


def pour(words: Any, start: Any, out: Any, row: Any, column: Any) -> None:
    """out[row, column : column + LANES] = words[start : start + LANES], past the caches.

    For what is larger than the caches: an ordinary store first reads the line that it overwrites. The place in `out`
    must be aligned to its LANES values. Other threads see them once they hold the interpreter's lock, as ever.
    """
    out[row, column : column + LANES] = words[start : start + LANES]


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


_CALLED: list[Callable[..., Any]] = []
_TEACHING = threading.Lock()
"""Threads may compile at once: none goes on before the compiler knows all that is called."""


def called_in_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a plain function over arrays as one that compiled loops may call; it is compiled with them."""
    _CALLED.append(function)
    return function


def _teach_called() -> None:
    """Tells numba of the functions marked since the last call: modules may be imported after the first compilation."""
    from numba.extending import overload

    while _CALLED:
        known = _CALLED.pop()
        plain = inspect.unwrap(known)
        overload(known, strict=False)(lambda *_, _plain=plain, **__: _plain)


@functools.cache
def kernel(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """`function` compiled with numba (kept on disk between runs), or None if numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    with _TEACHING:
        _teach()
        _teach_called()
    plain = inspect.unwrap(function)  # tests wrap every function in shape checks
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        made: Callable[..., Any] = numba.njit(cache=True, **options)(plain)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        made = numba.njit(**options)(plain)
    return made


def fastest(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled where numba is installed, and as it is elsewhere: for loops that are short enough."""
    return kernel(function) or function


def rounds_in_hardware() -> bool:
    """Whether this processor rounds to bfloat16 by itself and numba's compiler knows how to say so."""
    from llvmlite import binding

    # Earlier releases call a function that is not there.
    return bool(binding.llvm_version_info >= (20, 0, 0) and binding.get_host_cpu_features().get("avx512bf16"))


@functools.cache
def _teach() -> None:
    """Tells numba what `fetch`, `pour` and `stored` are in compiled code."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic, overload, register_jitable

    tools: Any = cgutils

    @intrinsic  # type: ignore[misc, unused-ignore]
    def prefetch(typing: Any, table: Any, row: Any, column: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, given[0])
            place = tools.get_item_pointer(context, builder, signature.args[0], array, given[1:], wraparound=False)
            place = builder.bitcast(place, tools.voidptr_t)
            width, number = table.dtype.bitwidth // 8, ir.IntType(32)
            of = ir.FunctionType(ir.VoidType(), [tools.voidptr_t, number, number, number])
            call = tools.get_or_insert_function(builder.module, of, "llvm.prefetch.p0")
            how = [number(0), number(3 if width == 1 else 2), number(1)]  # to read, to which level, data
            for line in range(0, AHEAD * width, 64):
                builder.call(call, [builder.gep(place, [number(line)]), *how])
            return context.get_dummy_value()

        return types.none(table, types.intp, types.intp), generate

    @intrinsic  # type: ignore[misc, unused-ignore]
    def past_caches(typing: Any, words: Any, start: Any, out: Any, row: Any, column: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            def place(at: int, where: Any) -> Any:
                array = context.make_array(signature.args[at])(context, builder, given[at])
                item = tools.get_item_pointer(context, builder, signature.args[at], array, where, wraparound=False)
                return builder.bitcast(item, ir.VectorType(item.type.pointee, LANES).as_pointer())

            value = builder.load(place(0, given[1:2]), align=out.dtype.bitwidth // 8)
            store = builder.store(value, place(2, given[3:]), align=LANES * out.dtype.bitwidth // 8)
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
            return context.get_dummy_value()

        return types.none(words, types.intp, out, types.intp, types.intp), generate

    class BFloat(ir.Type):  # type: ignore[misc, unused-ignore]
        def _to_string(self) -> str:
            return "bfloat"

    @intrinsic  # type: ignore[misc, unused-ignore]
    def by_instruction(typing: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.bitcast(builder.fptrunc(given[0], BFloat()), ir.IntType(16))

        return types.uint16(types.float32), generate

    by_integers = register_jitable(inspect.unwrap(rounded))

    @overload(fetch)  # type: ignore[misc, unused-ignore]
    def _(table, row, column):  # type: ignore[no-untyped-def]
        return lambda table, row, column: prefetch(table, row, column)  # type: ignore[call-arg, unused-ignore]

    @overload(pour)  # type: ignore[misc, unused-ignore]
    def _(words, start, out, row, column):  # type: ignore[no-untyped-def]
        return lambda words, start, out, row, column: past_caches(words, start, out, row, column)  # type: ignore[call-arg, unused-ignore]

    @overload(stored)  # type: ignore[misc, unused-ignore]
    def _(kind, bits):  # type: ignore[no-untyped-def]
        if kind != types.uint16:
            return lambda kind, bits: np.uint32(bits)
        if rounds_in_hardware():
            return lambda kind, bits: by_instruction(np.uint32(bits).view(np.float32))  # type: ignore[call-arg, unused-ignore]
        return lambda kind, bits: by_integers(np.uint32(bits))
