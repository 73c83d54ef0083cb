"""The matrix products of a convolution by tiles (`tiled_convolution`), of matrices that lie in panels.

A library that takes matrices in any layout first copies them into its own, and multiplies those of a few hundred rows
and columns at two thirds of a processor's speed. Tiles are made here, and so lie as their products want them:

    [columns / RUN panels][rows][RUN]    one matrix; what fills up its last panel is never a part of a sum
    [points][panels][rows][RUN]          one for each point of a tile, `step` numbers apart

Plain Python over flat float32 arrays (and run as such, slowly); `compiled.kernel` compiles them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from frostglass.numerics.compiled import RUN, taught

# ruff: noqa: ARG001 - numba goes by the names of arguments, whether they are used or not

U = np.uint64  # as in `tile_kernels`
LANES = 16
"""Columns that are summed at once: two vectors, and half a panel."""
LINES = 4
"""Rows: LINES x LANES sums stay in registers, and are as many as keep a processor's multipliers busy."""
DEEP = 3 * RUN
"""Numbers of a sum that are taken at a time: their lines of both matrices fit into the nearest cache."""
SIDE = 8
"""Rows and columns that `turn` turns."""


def block(lines: int, apart: int, step: int) -> Callable[..., None]:
    """A function for compiled loops: c = a b, or c += a b, for `lines` rows and LANES columns of c.

    Arguments of the function, places unsigned:

        a, a_at       a[row, k] of the first RUN k is a[a_at + row apart + k step]
        panel         from there to the a of the next RUN k
        depth         how many k
        b, b_at       b[k] is LANES numbers from b[b_at + k RUN] on
        c, c_at       c[row] is LANES numbers from c[c_at + row RUN] on
        add           0, or 1 for c += a b

    Args:
        lines, apart, step: as above.
    """

    def sums(a, a_at, panel, depth, b, b_at, c, c_at, add):  # type: ignore[no-untyped-def]
        for row in range(lines):
            to = int(c_at) + row * RUN
            total = c[to : to + LANES].copy() if add else np.zeros(LANES, np.float32)
            for k in range(int(depth)):
                here, under = k // RUN * int(panel) + row * apart + k % RUN * step, int(b_at) + k * RUN
                total = total + a[int(a_at) + here] * b[under : under + LANES]
            c[to : to + LANES] = total

    return taught(lambda: _block(lines, apart, step))(sums)


by_rows, by_row = block(LINES, RUN, 1), block(1, RUN, 1)
by_columns, by_column = block(LINES, 1, RUN), block(1, 1, RUN)


@taught(lambda: _turn())
def turn(source, at, target, to):  # type: ignore[no-untyped-def]
    """target[to + k RUN + j] = source[at + j RUN + k], for k and j below SIDE."""
    for j in range(SIDE):
        for k in range(SIDE):
            target[int(to) + k * RUN + j] = source[int(at) + j * RUN + k]


def multiply(a, a_step, b, b_step, c, c_step, first, last, rows, inner, columns, turned, add):  # type: ignore[no-untyped-def]
    """c = a b, or c += a b where `add` is 1, for the points from `first` to `last`.

    Args:
        a, c: [rows, inner] and [rows, columns].
        b: [inner, columns]; where `turned`, its transpose.
    """
    panel = np.zeros((inner + SIDE) * RUN, np.float32)
    for point in range(first, last):
        for left in range(0, columns, RUN):
            wide = min(RUN, columns - left)
            source, under = b, point * b_step + left * inner
            if turned:
                source, under = panel, 0
                for k in range(0, inner, SIDE):
                    at = point * b_step + k // RUN * columns * RUN + left * RUN + k % RUN
                    for j in range(0, wide, SIDE):
                        if j + SIDE <= wide:
                            turn(b, U(at + j * RUN), panel, U(k * RUN + j))
                        else:
                            for i in range(j, wide):
                                for n in range(SIDE):
                                    panel[(k + n) * RUN + i] = b[at + i * RUN + n]
            for k in range(0, inner, DEEP):
                depth, more = U(min(DEEP, inner - k)), U(1 if k else add)
                for half in range(0, wide, LANES):
                    row, from_b = 0, U(under + k * RUN + half)
                    while row < rows:
                        at = U(point * a_step + k * rows + row * RUN)
                        to = U(point * c_step + left * rows + row * RUN + half)
                        if row + LINES <= rows:
                            by_rows(a, at, U(rows * RUN), depth, source, from_b, c, to, more)
                            row += LINES
                        else:
                            by_row(a, at, U(rows * RUN), depth, source, from_b, c, to, more)
                            row += 1


def multiply_across(a, a_step, b, b_step, c, c_step, first, last, inner, rows, columns, add):  # type: ignore[no-untyped-def]
    """c = a^T b, or c += a^T b where `add` is 1, for the points from `first` to `last`.

    Args:
        a, b, c: [inner, rows], [inner, columns] and [rows, columns].
    """
    for point in range(first, last):
        for k in range(0, inner, DEEP):
            depth, more = U(min(DEEP, inner - k)), U(1 if k else add)
            for left in range(0, columns, LANES):
                from_b = U(point * b_step + left // RUN * RUN * inner + k * RUN + left % RUN)
                row = 0
                while row < rows:
                    at = U(point * a_step + row // RUN * RUN * inner + k * RUN + row % RUN)
                    to = U(point * c_step + left // RUN * RUN * rows + row * RUN + left % RUN)
                    if row + LINES <= rows:
                        by_columns(a, at, U(RUN * RUN), depth, b, from_b, c, to, more)
                        row += LINES
                    else:
                        by_column(a, at, U(RUN * RUN), depth, b, from_b, c, to, more)
                        row += 1


def _block(lines: int, apart: int, step: int) -> Any:
    """`block` as vector instructions: sums in registers, over the k of a panel and then over panels."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    long, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), 8)
    undefined, first_lane = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)
    fused = {"flags": ("contract",)}

    @intrinsic  # type: ignore[misc, unused-ignore]
    def sums(
        typing: Any, a: Any, a_at: Any, panel: Any, depth: Any, b: Any, b_at: Any, c: Any, c_at: Any, add: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            def start(kind: Any, array: Any, at: Any) -> Any:
                return builder.gep(context.make_array(kind)(context, builder, array).data, [at])

            def place(pointer: Any, number: int) -> Any:
                return builder.bitcast(builder.gep(pointer, [long(number)]), vector.as_pointer())

            def loop(name: str, values: list[Any]) -> tuple[Any, list[Any]]:
                """A block that is entered from here with these values: it, and what they are in it."""
                before, inside = builder.block, builder.append_basic_block(name)
                builder.branch(inside)
                builder.position_at_end(inside)
                held = [builder.phi(v.type) for v in values]
                for phi, value in zip(held, values, strict=True):
                    phi.add_incoming(value, before)
                return inside, held

            def repeat(inside: Any, held: list[Any], values: list[Any], more: Any) -> None:
                """Back to it with these values while `more`; then on."""
                for phi, value in zip(held, values, strict=True):
                    phi.add_incoming(value, builder.block)
                after = builder.append_basic_block()
                builder.cbranch(more, inside, after)
                builder.position_at_end(after)

            from_a, from_b, to = (start(k, *given[i : i + 2]) for k, i in ((a, 0), (b, 4), (c, 6)))
            # pointers are those of a's first number, and what is counted is what is left
            none = [ir.Constant(vector, [0.0] * 8)] * (2 * lines)
            panels, outer = loop("panels", [given[3], from_a, from_b, *none])
            left, here_a, here_b, *held = outer
            few = builder.icmp_unsigned("<", left, long(RUN))
            some = builder.select(few, left, long(RUN))
            inner_block, inner = loop("numbers", [some, here_a, here_b, *held])
            count, at_a, at_b, *totals = inner
            under = [builder.load(place(at_b, 8 * j), align=4) for j in range(2)]
            found = []
            for row in range(lines):
                number = builder.load(builder.gep(at_a, [long(row * apart)]), align=4)
                spread = builder.insert_element(undefined, number, ir.IntType(32)(0))
                spread = builder.shuffle_vector(spread, undefined, first_lane)
                for total, numbers in zip(totals[2 * row : 2 * row + 2], under, strict=True):
                    found.append(builder.fadd(total, builder.fmul(spread, numbers, **fused), **fused))
            count_left, next_b = builder.sub(count, long(1)), builder.gep(at_b, [long(RUN)])
            again = builder.icmp_unsigned(">", count_left, long(0))
            repeat(inner_block, inner, [count_left, builder.gep(at_a, [long(step)]), next_b, *found], again)
            rest = builder.sub(left, some)
            more = builder.icmp_unsigned(">", rest, long(0))
            repeat(panels, outer, [rest, builder.gep(here_a, [given[2]]), next_b, *found], more)

            def store(onto: bool) -> None:
                for n, value in enumerate(found):
                    at = place(to, n // 2 * RUN + n % 2 * 8)
                    builder.store(builder.fadd(builder.load(at, align=4), value) if onto else value, at, align=4)

            with builder.if_else(builder.icmp_unsigned("!=", given[8], long(0))) as (then, otherwise):
                with then:
                    store(True)
                with otherwise:
                    store(False)
            return context.get_dummy_value()

        return types.none(a, *[types.uintp] * 3, b, types.uintp, c, *[types.uintp] * 2), generate

    return lambda a, a_at, panel, depth, b, b_at, c, c_at, add: (
        lambda a, a_at, panel, depth, b, b_at, c, c_at, add: sums(a, a_at, panel, depth, b, b_at, c, c_at, add)  # type: ignore[call-arg, unused-ignore]
    )


def _turn() -> Any:
    """`turn` in registers."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    long, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), SIDE)

    @intrinsic  # type: ignore[misc, unused-ignore]
    def turned(typing: Any, source: Any, at: Any, target: Any, to: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            def line(number: int, kind: Any, array: Any, at: Any) -> Any:
                numbers = context.make_array(kind)(context, builder, array).data
                first = builder.gep(numbers, [builder.add(at, long(number * RUN))])
                return builder.bitcast(first, vector.as_pointer())

            lines = [builder.load(line(j, source, *given[:2]), align=4) for j in range(SIDE)]
            for apart in (1, 2, 4):  # swaps halves of pairs, of fours, of all
                lines = _swapped(builder, lines, apart)
            for k, value in enumerate(lines):
                builder.store(value, line(k, target, *given[2:]), align=4)
            return context.get_dummy_value()

        return types.none(source, types.uintp, target, types.uintp), generate

    return lambda source, at, target, to: lambda source, at, target, to: turned(source, at, target, to)  # type: ignore[call-arg, unused-ignore]


def _swapped(builder: Any, lines: list[Any], apart: int) -> list[Any]:
    """In each two by two blocks of `apart` x `apart` numbers the two off the diagonal swapped."""
    from llvmlite import ir

    def mixed(one: Any, other: Any, which: list[int]) -> Any:
        return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), SIDE), which))

    found = list(lines)
    for j in range(SIDE):
        if j & apart:
            continue
        one, other = lines[j], lines[j + apart]
        found[j] = mixed(one, other, [SIDE + n - apart if n & apart else n for n in range(SIDE)])
        found[j + apart] = mixed(one, other, [SIDE + n if n & apart else n + apart for n in range(SIDE)])
    return found
