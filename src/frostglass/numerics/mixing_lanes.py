"""A few pixels of one encoding at a time, as vector instructions: what `fused_mixing` spends its time in.

A compiler that is given the loop over pixels alone takes twice as long for bytes to bfloat16: it converts every byte to
a float before it is weighed, and rounds and masks each half of a vector by itself. Bytes are weighed as integers, two
images in one instruction; their coefficients are multiples of 1 / GRID, so the sums are exact.

The functions share these arguments.

    row         of an encoding, (sources, weights, scale, start, bits): k rows of d pixels, uint8 or float32, in a
                tuple; k float32 in a tuple, for bytes multiples of 1 / GRID in [0, 1] and k even; float32; what to add
                them to, float32 or [d] float32; [m] bytes of keystream
    plane       0 to 7: the sign of a pixel flips where this bit of its byte is set
    i, at       first of the bytes and of the pixels
    out         [d] uint32 for float32, or uint16 for bfloat16 (rounded to nearest even)
    past        not None to write past the caches, to a place aligned to a vector: for what is larger than they are, an
                ordinary store first reads the line that it overwrites. Other threads see it once they hold the
                interpreter's lock, as ever
"""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

import numpy as np

from frostglass.numerics.compiled import as_it_is, bfloat, rounds_in_hardware, stored, taught

# ruff: noqa: ARG001 - numba goes by the names of arguments, whether they are used or not

GRID = 1 << 14
"""Coefficients are multiples of 1 / GRID: sums over bytes are exact, as integers or in float32, in any order."""
LANES = 16  # pixels that `mix_lanes` makes, two vectors of float32
LINE = 64  # pixels that `mix_line` makes, a line of memory of bytes


@taught(lambda: _begin)
def begin(start, at):  # type: ignore[no-untyped-def]
    """What pixel `at` begins with."""
    return start[at] if np.ndim(start) else start


def _begin(start, at):  # type: ignore[no-untyped-def]
    return (lambda start, at: start[at]) if hasattr(start, "dtype") else lambda start, at: start


@taught(lambda: _fit)
def fit(table, coefficients):  # type: ignore[no-untyped-def]
    """Whether images of `table` can be mixed by `coefficients` [b, k]: bytes by multiples of 1 / GRID in [0, 1]."""
    form: Any = _multiples
    return table.dtype != np.uint8 or form(table, coefficients)


def _fit(table, coefficients):  # type: ignore[no-untyped-def]
    return inspect.unwrap(_multiples) if table.dtype.bitwidth == 8 else lambda table, coefficients: True


def _multiples(table, coefficients):  # type: ignore[no-untyped-def]
    for r in range(coefficients.shape[0]):
        for j in range(coefficients.shape[1]):
            steps = coefficients[r, j] * np.float32(GRID)
            if not 0 <= steps <= GRID or steps != np.floor(steps):
                return False
    return True


@taught(lambda: _weighed)
def weighed(sources, weights, scale, start, at):  # type: ignore[no-untyped-def]
    """start + scale sum_j weights[j] sources[j][at], in float32."""
    form: Any = _weighed_bytes if sources[0].dtype == np.uint8 else _weighed_floats
    return form(sources, weights, scale, start, at)


def _weighed(sources, weights, scale, start, at):  # type: ignore[no-untyped-def]
    return inspect.unwrap(_weighed_bytes if sources.dtype.dtype.bitwidth == 8 else _weighed_floats)


def _weighed_floats(sources, weights, scale, start, at):  # type: ignore[no-untyped-def]
    x = start
    for j in range(len(sources)):
        x = x + weights[j] * scale * sources[j][at]
    return np.float32(x)


def _weighed_bytes(sources, weights, scale, start, at):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for j in range(len(sources)):
        total += np.int64(weights[j] * np.float32(GRID)) * np.int64(sources[j][at])
    # the product is exact, and so is its sum with the rest but for the last place: as if multiplied and added at once
    return np.float32(np.float64(total) * np.float64(scale / np.float32(GRID)) + np.float64(start))


@as_it_is
def mix_pixels(row, plane, i, at, out, count):  # type: ignore[no-untyped-def]
    """out[at ...] = flip(start[at ...] + scale sum_j weights[j] sources[j][at ...]), `count` pixels."""
    sources, weights, scale, start, bits = row
    for p in range(count):
        x = weighed(sources, weights, scale, begin(start, at + p), at + p)
        flip = np.uint32(np.uint32(bits[i + p]) >> np.uint32(plane)) & np.uint32(1)
        out[at + p] = stored(out[at + p], np.float32(x).view(np.uint32) ^ np.uint32(flip << np.uint32(31)))


@taught(lambda: _lanes())
def mix_lanes(row, plane, i, at, out, past):  # type: ignore[no-untyped-def]
    """LANES of `mix_pixels`."""
    mix_pixels(row, plane, i, at, out, LANES)


@taught(lambda: _line())
def mix_line(row, following, plane, i, at, out, past):  # type: ignore[no-untyped-def]
    """LINE of `mix_pixels`, while those of `following`, the sources to be mixed next, are brought into a cache.

    Random rows come as fast as they are asked for early enough and a few lines at a time. Bytes go to the first level;
    float32 to the second, as requests to the first wait in the same short queue as loads.
    """
    mix_pixels(row, plane, i, at, out, LINE)


def _lanes() -> Any:
    write = _writer(LANES)
    return lambda *_: lambda row, plane, i, at, out, past: write(row, None, plane, i, at, out, past)


def _line() -> Any:
    write = _writer(LINE)
    return lambda *_: lambda row, following, plane, i, at, out, past: write(row, following, plane, i, at, out, past)


def _writer(pixels: int) -> Any:
    """The intrinsic that makes `pixels` of them, a multiple of LANES."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    tools: Any = cgutils
    number, size = ir.IntType(32), ir.IntType(64)

    def asked(context: Any, builder: Any, kind: Any, rows: Any, at: Any) -> list[Any]:
        """The lines of LINE pixels of each of the rows."""
        places = []
        for row in tools.unpack_tuple(builder, rows, kind.count):
            place = builder.gep(context.make_array(kind.dtype)(context, builder, row).data, [at])
            place = builder.bitcast(place, tools.voidptr_t)
            places += [builder.gep(place, [size(n)]) for n in range(0, LINE * kind.dtype.dtype.bitwidth // 8, 64)]
        return places

    def ask(builder: Any, places: list[Any], level: int) -> None:
        of = ir.FunctionType(ir.VoidType(), [tools.voidptr_t, number, number, number])
        call = tools.get_or_insert_function(builder.module, of, "llvm.prefetch.p0")
        for place in places:
            builder.call(call, [place, number(0), number(level), number(1)])  # to read, to which level, data

    @intrinsic  # type: ignore[misc, unused-ignore]
    def write(typing: Any, row: Any, following: Any, plane: Any, i: Any, at: Any, out: Any, past: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            values, nexts, bit, byte, pixel, target, _ = given
            lines: list[Any] = []
            if not isinstance(following, types.NoneType):
                lines = asked(context, builder, following, nexts, pixel)
            bytes_in = row[0].dtype.dtype.bitwidth == 8
            lanes = min(pixels, 2 * LANES if bytes_in else LANES)
            vectors = _Vectors(context, builder, rounds_in_hardware(), lanes)
            for first in range(0, pixels, lanes):  # a few lines at a time, as they wait in a short queue
                ask(builder, lines[first // lanes :: pixels // lanes], 3 if bytes_in else 2)
                i_now, now = (builder.add(place, size(first)) for place in (byte, pixel))
                result = vectors.mixed(row, values, bit, i_now, now, out)
                vectors.store(result, out, target, now, not isinstance(past, types.NoneType))
            return context.get_dummy_value()

        return types.none(row, following, types.intp, types.intp, types.intp, out, past), generate

    return write


_Part: TypeAlias = tuple[tuple[Any, list[int]], tuple[Any, list[int]]]
"""Two vectors of eight values, each with the pixels whose they are."""


class _Vectors:
    """`lanes` pixels as vectors, in the code that `builder` is at."""

    def __init__(self, context: Any, builder: Any, by_instruction: bool, lanes: int) -> None:
        from llvmlite import ir

        self.context, self.builder, self.by_instruction, self.lanes = context, builder, by_instruction, lanes
        self.byte, self.word, self.number, self.real = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
        self.vector, self.constant, self.undefined = ir.VectorType, ir.Constant, ir.Undefined

        self.bfloat = bfloat()

    def mixed(self, kinds: Any, row: Any, plane: Any, i: Any, at: Any, out: Any) -> Any:
        """The pixels from `at` on, in order, as `out` holds them."""
        b = self.builder
        sources, weights, scale, start, bits = (b.extract_value(row, n) for n in range(5))
        pixels = [self.load(kinds[0].dtype, b.extract_value(sources, j), at) for j in range(kinds[0].count)]
        weights = [b.extract_value(weights, j) for j in range(kinds[0].count)]
        first = self.load(kinds[3], start, at) if hasattr(kinds[3], "dtype") else self.spread(start, self.lanes)
        kind = self.word if out.dtype.bitwidth == 16 else self.number
        by_integers = kind is self.word and not self.by_instruction
        if pixels[0].type.element is self.real:
            weights = [b.fmul(weight, scale) for weight in weights]
            parts = self.floats(pixels, weights, first, by_integers)
        else:
            parts = self.bytes(pixels, weights, b.fmul(scale, self.real(1 / GRID)), first)
        signs, made, order = self.load(kinds[4], bits, i), [], []
        for (x, places), (y, others) in parts:
            if by_integers:
                found, places = self.rounded(x, y), [p for both in zip(places, others, strict=True) for p in both]
            else:
                found, places = self.picked(x, y, list(range(16))), places + others
                found = b.fptrunc(found, self.vector(self.bfloat, 16)) if kind is self.word else found
                found = b.bitcast(found, self.vector(kind, 16))
            made.append(found)
            order += places
        at_once = len(made) == 1  # else signs are moved as the sums were, before both are put in order
        if not at_once:
            moved = self.flips(signs, plane)
            made = [b.xor(x, self.placed(moved, order[n : n + 16], kind)) for x, n in zip(made, (0, 16), strict=True)]
        found = self.picked(made[0], made[-1], [order.index(p) for p in range(self.lanes)])
        return b.xor(found, self.widened(signs, plane, kind)) if at_once else found

    def bytes(self, pixels: list[Any], weights: list[Any], scale: Any, first: Any) -> list[_Part]:
        """The float32 values of even pixels and of odd ones, 16 at a time, from bytes."""
        b, half = self.builder, self.lanes // 2
        words = [b.bitcast(x, self.vector(self.word, half)) for x in pixels]
        pairs = list(zip(words[::2], words[1::2], self.pairs(weights), strict=True))
        found = []
        # within each 128 bits, which is what weaves two vectors in one instruction
        for which in [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]] if half == 16 else [list(range(8))]:
            sums = []
            for odd in (False, True):
                total = None
                for x, y, weight in pairs:
                    woven = self.picked(x, y, [n for place in which for n in (place, place + half)])
                    eight = self.all_of(self.word, 16, 8 if odd else 255)
                    term = self.dotted(b.lshr(woven, eight) if odd else b.and_(woven, eight), weight)
                    total = term if total is None else b.add(total, term)
                begin = self.picked(first, first, [2 * place + odd for place in which])
                value = b.sitofp(total, self.vector(self.real, 8))
                fused = {"flags": ("contract",)}
                value = b.fadd(b.fmul(value, self.spread(scale, 8), **fused), begin, **fused)
                sums.append((value, [2 * place + odd for place in which]))
            found.append((sums[0], sums[1]))
        return found

    def pairs(self, weights: list[Any]) -> list[Any]:
        """Two weights at a time as integers, eight times over."""
        b, found = self.builder, []
        whole = [b.fptoui(b.fmul(w, self.real(GRID)), self.number) for w in weights]
        for low, high in zip(whole[::2], whole[1::2], strict=True):
            both = b.or_(low, b.shl(high, self.number(16)))
            found.append(b.bitcast(self.spread(both, 8), self.vector(self.word, 16)))
        return found

    def dotted(self, x: Any, y: Any) -> Any:
        """Products of words, added in pairs: one instruction."""
        b, wide = self.builder, self.vector(self.number, 16)
        product = b.mul(b.sext(x, wide), b.sext(y, wide), flags=("nsw",))
        even, odd = (self.picked(product, product, list(range(n, 16, 2))) for n in (0, 1))
        return b.add(even, odd)

    def floats(self, pixels: list[Any], weights: list[Any], first: Any, apart: bool) -> list[_Part]:
        """The same from float32, in the order that takes one instruction; of either half unless `apart`."""
        b, fused = self.builder, {"flags": ("contract",)}
        own = [[0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]] if apart else [[*range(8)], [*range(8, 16)]]
        totals = [self.picked(first, first, lanes) for lanes in own]
        for x, weight in zip(pixels, weights, strict=True):
            terms = [b.fmul(self.picked(x, x, lanes), self.spread(weight, 8), **fused) for lanes in own]
            totals = [b.fadd(total, term, **fused) for total, term in zip(totals, terms, strict=True)]
        return [((totals[0], own[0]), (totals[1], own[1]))]

    def place(self, kind: Any, array: Any, at: Any, element: Any) -> Any:
        data = self.builder.gep(self.context.make_array(kind)(self.context, self.builder, array).data, [at])
        return self.builder.bitcast(data, self.vector(element, self.lanes).as_pointer())

    def load(self, kind: Any, array: Any, at: Any) -> Any:
        width = kind.dtype.bitwidth
        return self.builder.load(self.place(kind, array, at, self.byte if width == 8 else self.real), align=width // 8)

    def store(self, value: Any, kind: Any, array: Any, at: Any, past: bool) -> None:
        b, width = self.builder, kind.dtype.bitwidth // 8
        place = self.place(kind, array, at, value.type.element)
        if not past:
            b.store(value, place, align=width)
            return
        line = min(self.lanes, 64 // width)  # pixels
        lines = b.bitcast(place, self.vector(value.type.element, line).as_pointer())
        for n in range(self.lanes // line):
            if n:  # a line that waits half written while another is begun may go to memory in pieces
                self.in_order()
            part = self.picked(value, value, list(range(n * line, (n + 1) * line)))
            made = b.store(part, b.gep(lines, [self.number(n)]), align=min(64, LANES * width))
            made.set_metadata("nontemporal", b.module.add_metadata([self.number(1)]))

    def in_order(self) -> None:
        """What was written before is written before what comes next."""
        from llvmlite import ir

        self.builder.call(ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", side_effect=True), [])

    def all_of(self, kind: Any, lanes: int, value: int) -> Any:
        return self.constant(self.vector(kind, lanes), [value] * lanes)

    def picked(self, first: Any, second: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(first, second, self.constant(self.vector(self.number, len(lanes)), lanes))

    def spread(self, value: Any, lanes: int) -> Any:
        none = self.constant(self.vector(value.type, lanes), self.undefined)
        one = self.builder.insert_element(none, value, self.number(0))
        return self.picked(one, one, [0] * lanes)

    def flips(self, bits: Any, plane: Any) -> Any:
        """The bit `plane` of each byte, moved to its sign; what a shift of words moves across is masked."""
        b, words = self.builder, self.vector(self.word, self.lanes // 2)
        by = self.spread(b.trunc(b.sub(plane.type(7), plane), self.word), self.lanes // 2)
        moved = b.bitcast(b.shl(b.bitcast(bits, words), by), self.vector(self.byte, self.lanes))
        return b.and_(moved, self.all_of(self.byte, self.lanes, 0x80))

    def widened(self, bits: Any, plane: Any, kind: Any) -> Any:
        """The bit `plane` of each byte as the sign of a `kind`."""
        b, sign = self.builder, kind.width - 1
        by = self.spread(b.trunc(b.sub(plane.type(sign), plane), kind), self.lanes)
        moved = b.shl(b.zext(bits, self.vector(kind, self.lanes)), by)
        return b.and_(moved, self.all_of(kind, self.lanes, 1 << sign))

    def placed(self, signs: Any, places: list[int], kind: Any) -> Any:
        """The signs of the pixels `places` where `kind` has its own."""
        none, width = self.all_of(self.byte, self.lanes, 0), kind.width // 8
        found = self.picked(signs, none, [n for p in places for n in (*([self.lanes] * (width - 1)), p)])
        return self.builder.bitcast(found, self.vector(kind, len(places)))

    def rounded(self, even: Any, odd: Any) -> Any:
        """Float32 of even and of odd pixels as bfloat16: up if what is cut off is above a half, or a half and odd."""
        b, words = self.builder, self.vector(self.word, 16)
        x, y = (b.bitcast(v, self.vector(self.number, 8)) for v in (even, odd))
        by, pairs = self.all_of(self.number, 8, 16), [p + 16 * (p % 2) for p in range(16)]
        upper = self.picked(b.bitcast(b.lshr(x, by), words), b.bitcast(y, words), pairs)
        lower = self.picked(b.bitcast(x, words), b.bitcast(b.shl(y, by), words), pairs)
        less = b.and_(b.not_(upper), self.all_of(self.word, 16, 1))  # a half is not enough for an even number
        none = self.all_of(self.word, 16, 0)
        left = b.select(b.icmp_unsigned("<", lower, less), none, b.sub(lower, less))  # one instruction
        return b.add(upper, b.lshr(left, self.all_of(self.word, 16, 15)))
