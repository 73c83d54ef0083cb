"""A few pixels of one encoding at a time, as vector instructions: what `fused_mixing` spends its time in.

A compiler that is given the loop over pixels alone takes half as long again for bytes to bfloat16: it rounds and masks
each half of a vector by itself, and keeps fewer of the constants in registers.

The functions share these arguments.

    row         of an encoding, (sources, weights, start, bits): k rows of d pixels, uint8 or float32, in a tuple; k
                float32 in a tuple; what to add them to, float32 or [d] float32; [m] bytes of keystream
    plane       0 to 7: the sign of a pixel flips where this bit of its byte is set
    i, at       first of the bytes and of the pixels
    out         [d] uint32 for float32, or uint16 for bfloat16 (rounded to nearest even)
    past        not None to write past the caches, to a place aligned to a vector: for what is larger than they are, an
                ordinary store first reads the line that it overwrites. Other threads see it once they hold the
                interpreter's lock, as ever
"""

from __future__ import annotations

from typing import Any

import numpy as np

from frostglass.numerics.compiled import as_it_is, bfloat, rounds_in_hardware, stored, taught

# ruff: noqa: ARG001 - numba goes by the names of arguments, whether they are used or not

LANES = 16  # pixels that `mix_lanes` makes, two vectors of float32
LINE = 64  # pixels that `mix_line` makes, a line of memory of bytes


@taught(lambda: _begin)
def begin(start, at):  # type: ignore[no-untyped-def]
    """What pixel `at` begins with."""
    return start[at] if np.ndim(start) else start


def _begin(start, at):  # type: ignore[no-untyped-def]
    return (lambda start, at: start[at]) if hasattr(start, "dtype") else lambda start, at: start


@as_it_is
def mix_pixels(row, plane, i, at, out, count):  # type: ignore[no-untyped-def]
    """out[at ...] = flip(start[at ...] + sum_j weights[j] sources[j][at ...]), `count` pixels."""
    sources, weights, start, bits = row
    for p in range(count):
        x = begin(start, at + p)
        for j in range(len(sources)):
            x = x + weights[j] * np.float32(sources[j][at + p])
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
            level = 3 if row[0].dtype.dtype.bitwidth == 8 else 2
            vectors = _Vectors(context, builder, rounds_in_hardware())
            for first in range(0, pixels, LANES):  # a few lines at a time, as they wait in a short queue
                ask(builder, lines[first // LANES :: pixels // LANES], level)
                i_now, now = (builder.add(place, size(first)) for place in (byte, pixel))
                result = vectors.mixed(row, values, bit, i_now, now, out)
                vectors.store(result, out, target, now, not isinstance(past, types.NoneType))
            return context.get_dummy_value()

        return types.none(row, following, types.intp, types.intp, types.intp, out, past), generate

    return write


class _Vectors:
    """LANES pixels as vectors of two halves, in the code that `builder` is at."""

    def __init__(self, context: Any, builder: Any, by_instruction: bool) -> None:
        from llvmlite import ir

        self.context, self.builder, self.by_instruction = context, builder, by_instruction
        self.byte, self.word, self.number, self.real = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
        self.vector, self.constant, self.undefined = ir.VectorType, ir.Constant, ir.Undefined

        self.bfloat = bfloat()

    def mixed(self, kinds: Any, row: Any, plane: Any, i: Any, at: Any, out: Any) -> Any:
        """The pixels from `at` on, in order, as `out` holds them."""
        b, fused = self.builder, {"flags": ("contract",)}
        sources, weights, start, bits = (b.extract_value(row, n) for n in range(4))
        short = out.dtype.bitwidth == 16
        apart = short and not self.by_instruction
        if hasattr(kinds[2], "dtype"):
            sums = self.halves(self.load(kinds[2], start, at), apart)
        else:
            sums = [self.spread(start, LANES // 2)] * 2
        for j in range(kinds[0].count):
            pixels, weight = self.load(kinds[0].dtype, b.extract_value(sources, j), at), b.extract_value(weights, j)
            terms = [b.fmul(x, self.spread(weight, LANES // 2), **fused) for x in self.floats(pixels, apart)]
            sums = [b.fadd(s, t, **fused) for s, t in zip(sums, terms, strict=True)]
        kind = self.word if short else self.number
        if apart:
            found = self.rounded(sums[0], sums[1])
        else:
            found = self.picked(sums[0], sums[1], list(range(LANES)))
            found = b.fptrunc(found, self.vector(self.bfloat, LANES)) if short else found
            found = b.bitcast(found, self.vector(kind, LANES))
        return b.xor(found, self.flips(self.load(kinds[3], bits, i), plane, kind))

    def place(self, kind: Any, array: Any, at: Any, element: Any) -> Any:
        data = self.builder.gep(self.context.make_array(kind)(self.context, self.builder, array).data, [at])
        return self.builder.bitcast(data, self.vector(element, LANES).as_pointer())

    def load(self, kind: Any, array: Any, at: Any) -> Any:
        width = kind.dtype.bitwidth
        return self.builder.load(self.place(kind, array, at, self.byte if width == 8 else self.real), align=width // 8)

    def store(self, value: Any, kind: Any, array: Any, at: Any, past: bool) -> None:
        width = kind.dtype.bitwidth // 8
        place = self.place(kind, array, at, value.type.element)
        made = self.builder.store(value, place, align=LANES * width if past else width)
        if past:
            made.set_metadata("nontemporal", self.builder.module.add_metadata([self.number(1)]))

    def all_of(self, kind: Any, lanes: int, value: int) -> Any:
        return self.constant(self.vector(kind, lanes), [value] * lanes)

    def picked(self, first: Any, second: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(first, second, self.constant(self.vector(self.number, len(lanes)), lanes))

    def spread(self, value: Any, lanes: int) -> Any:
        none = self.constant(self.vector(value.type, lanes), self.undefined)
        one = self.builder.insert_element(none, value, self.number(0))
        return self.picked(one, one, [0] * lanes)

    @staticmethod
    def own(apart: bool) -> list[range]:
        """The even lanes and the odd ones if `apart`, else the first half and the last."""
        return [range(0, LANES, 2), range(1, LANES, 2)] if apart else [range(LANES // 2), range(LANES // 2, LANES)]

    def halves(self, vector: Any, apart: bool) -> list[Any]:
        return [self.picked(vector, vector, list(lanes)) for lanes in self.own(apart)]

    def floats(self, pixels: Any, apart: bool) -> list[Any]:
        """Halves in float32. A byte is moved to the lowest of four, the others are zero, by one shuffle."""
        if pixels.type.element is self.real:
            return self.halves(pixels, apart)
        b, found = self.builder, []
        for lanes in self.own(apart):
            four = [lane for p in lanes for lane in (p, LANES, LANES, LANES)]
            moved = self.picked(pixels, self.all_of(self.byte, LANES, 0), four)
            found.append(
                b.sitofp(b.bitcast(moved, self.vector(self.number, LANES // 2)), self.vector(self.real, LANES // 2))
            )
        return found

    def flips(self, bits: Any, plane: Any, kind: Any) -> Any:
        """The bit `plane` of each byte, moved to the sign of a `kind`."""
        b, sign = self.builder, kind.width - 1
        by = self.spread(b.trunc(b.sub(plane.type(sign), plane), kind), LANES)
        moved = b.shl(b.zext(bits, self.vector(kind, LANES)), by)
        return b.and_(moved, self.all_of(kind, LANES, 1 << sign))

    def rounded(self, even: Any, odd: Any) -> Any:
        """Float32 of even and of odd lanes as bfloat16: up if what is cut off is above a half, or a half and odd."""
        b, words = self.builder, self.vector(self.word, LANES)
        x, y = (b.bitcast(v, self.vector(self.number, LANES // 2)) for v in (even, odd))
        by, pairs = self.all_of(self.number, LANES // 2, 16), [p + LANES * (p % 2) for p in range(LANES)]
        upper = self.picked(b.bitcast(b.lshr(x, by), words), b.bitcast(y, words), pairs)
        lower = self.picked(b.bitcast(x, words), b.bitcast(b.shl(y, by), words), pairs)
        less = b.and_(b.not_(upper), self.all_of(self.word, LANES, 1))  # a half is not enough for an even number
        none = self.all_of(self.word, LANES, 0)
        left = b.select(b.icmp_unsigned("<", lower, less), none, b.sub(lower, less))  # one instruction
        return b.add(upper, b.lshr(left, self.all_of(self.word, LANES, 15)))
