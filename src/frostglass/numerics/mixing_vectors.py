"""The instructions that `mixing_lanes` is made of where it is compiled, by numba's compiler LLVM.

A compiler that is given the loop over pixels alone takes twice as long for bytes to bfloat16: it converts every byte to
a float before it is weighed, and rounds and masks each half of a vector by itself. Bytes are weighed as integers, two
images in one instruction; their coefficients are multiples of 1 / GRID, so the sums are exact.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from frostglass.numerics.compiled import bfloat, rounds_in_hardware

# ruff: noqa: ARG001 - numba goes by the names of arguments, whether they are used or not

GRID = 1 << 14
"""Coefficients are multiples of 1 / GRID: sums over bytes are exact, as integers or in float32, in any order."""
LANES = 16
"""Pixels that `lanes` makes, two vectors of float32."""
LINE = 64
"""Pixels that `line` makes, a line of memory of bytes."""


def lanes() -> Any:
    """What `mixing_lanes.mix_lanes` is in compiled code."""
    write = _writer(LANES)
    return lambda *_: lambda row, plane, i, at, out, past: write(row, None, plane, i, at, out, past)


def line() -> Any:
    """What `mixing_lanes.mix_line` is in compiled code."""
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
            bytes_in, by_instruction = row[0].dtype.dtype.bitwidth == 8, rounds_in_hardware()
            lanes = min(pixels, (LINE if by_instruction else 2 * LANES) if bytes_in else LANES)
            vectors = _Vectors(context, builder, by_instruction, lanes)
            for first in range(0, pixels, lanes):  # a few lines at a time, as they wait in a short queue
                ask(builder, lines[first // lanes :: pixels // lanes], 3 if bytes_in else 2)
                i_now, now = (builder.add(place, size(first)) for place in (byte, pixel))
                result = vectors.mixed(row, values, bit, i_now, now, out)
                vectors.store(result, out, target, now, not isinstance(past, types.NoneType))
            return context.get_dummy_value()

        return types.none(row, following, types.intp, types.intp, types.intp, out, past), generate

    return write


_Part: TypeAlias = tuple[tuple[Any, list[int]], tuple[Any, list[int]]]
"""Two vectors of values, each with the pixels whose they are."""


class _Vectors:
    """`lanes` pixels as vectors, in the code that `builder` is at.

    Where bfloat16 is rounded `by_instruction` there are vectors of 512 bits, and a line of bytes is mixed in them; in
    halves of them it takes half as long again, as more is under way at once than a processor keeps track of.
    """

    def __init__(self, context: Any, builder: Any, by_instruction: bool, lanes: int) -> None:
        from llvmlite import ir

        self.context, self.builder, self.by_instruction, self.lanes = context, builder, by_instruction, lanes
        self.byte, self.word, self.number, self.real = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
        self.vector, self.constant, self.undefined = ir.VectorType, ir.Constant, ir.Undefined
        self.bfloat = bfloat()
        self.wide = lanes == LINE
        self.values = 16 if self.wide else 8  # in a vector of float32

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
            parts = self.bytes(pixels, weights, b.fmul(scale, self.real(1 / GRID)), first, self.orders(kind))
        signs, made, order = self.load(kinds[4], bits, i), [], []
        for (x, places), (y, others) in parts:
            if by_integers:
                found, places = self.rounded(x, y), [p for both in zip(places, others, strict=True) for p in both]
            else:
                found, places = self.halves(x, y) if kind is self.word else self.joined(x, y), places + others
                found = b.bitcast(found, self.vector(kind, len(places)))
            made.append(found)
            order += places
        at_once = len(made) == 1 or self.wide  # else signs are moved as the sums were, before both are put in order
        if not at_once:
            moved = self.flips(signs, plane)
            made = [b.xor(x, self.placed(moved, order[n : n + 16], kind)) for x, n in zip(made, (0, 16), strict=True)]
        found = self.picked(made[0], made[-1], [order.index(p) for p in range(self.lanes)])
        return b.xor(found, self.widened(signs, plane, kind)) if at_once else found

    def orders(self, kind: Any) -> list[list[int]]:
        """Pairs of pixels that are weighed in one vector, for each of the vectors; results of `kind` are wanted."""
        half = self.lanes // 2
        if half == 8:
            return [list(range(8))]
        if self.wide and kind is self.number:  # even and odd pixels are then woven into their order in one instruction
            first = [n + p for n in range(0, 8, 2) for p in (0, 1, 8, 9)]
            return [first, [16 + n for n in first]]
        # within each 128 bits, which is what weaves two vectors in the fastest one
        return [[n + p for n in range(0, half, 8) for p in range(q, q + 4)] for q in (0, 4)]

    def bytes(
        self, pixels: list[Any], weights: list[Any], scale: Any, first: Any, orders: list[list[int]]
    ) -> list[_Part]:
        """The float32 values of even pixels and of odd ones, a vector at a time, from bytes."""
        b, half = self.builder, self.lanes // 2
        words = [b.bitcast(x, self.vector(self.word, half)) for x in pixels]
        pairs = list(zip(words[::2], words[1::2], self.pairs(weights), strict=True))
        found = []
        for which in orders:
            sums = []
            for odd in (False, True):
                total = None
                for x, y, weight in pairs:
                    woven = self.picked(x, y, [n for place in which for n in (place, place + half)])
                    eight = self.all_of(self.word, 2 * self.values, 8 if odd else 255)
                    term = self.dotted(b.lshr(woven, eight) if odd else b.and_(woven, eight), weight)
                    total = term if total is None else b.add(total, term)
                begin = self.picked(first, first, [2 * place + odd for place in which])
                value = b.sitofp(total, self.vector(self.real, self.values))
                value = self.at_once(value, self.spread(scale, self.values), begin)
                sums.append((value, [2 * place + odd for place in which]))
            found.append((sums[0], sums[1]))
        return found

    def pairs(self, weights: list[Any]) -> list[Any]:
        """Two weights at a time as integers, over and over."""
        b, found = self.builder, []
        whole = [b.fptoui(b.fmul(w, self.real(GRID)), self.number) for w in weights]
        for low, high in zip(whole[::2], whole[1::2], strict=True):
            both = b.or_(low, b.shl(high, self.number(16)))
            found.append(b.bitcast(self.spread(both, self.values), self.vector(self.word, 2 * self.values)))
        return found

    def dotted(self, x: Any, y: Any) -> Any:
        """Products of words, added in pairs: one instruction."""
        b, words = self.builder, 2 * self.values
        wide = self.vector(self.number, words)
        product = b.mul(b.sext(x, wide), b.sext(y, wide), flags=("nsw",))
        even, odd = (self.picked(product, product, list(range(n, words, 2))) for n in (0, 1))
        return b.add(even, odd)

    def halves(self, x: Any, y: Any) -> Any:
        """Both as bfloat16, in one vector."""
        if not self.wide:
            return self.builder.fptrunc(self.joined(x, y), self.vector(self.bfloat, 2 * self.values))
        # the compiler would round each by itself and put them together in a third instruction
        return self.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", self.vector(self.bfloat, 32), y, x)

    def joined(self, x: Any, y: Any) -> Any:
        return self.picked(x, y, list(range(2 * self.values)))

    def call(self, name: str, gives: Any, *given: Any) -> Any:
        from llvmlite import ir
        from numba.core import cgutils

        tools: Any = cgutils
        of = ir.FunctionType(gives, [value.type for value in given])
        return self.builder.call(tools.get_or_insert_function(self.builder.module, of, name), given)

    def floats(self, pixels: list[Any], weights: list[Any], first: Any, apart: bool) -> list[_Part]:
        """The same from float32, in the order that takes one instruction; of either half unless `apart`."""
        own = [[0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]] if apart else [[*range(8)], [*range(8, 16)]]
        totals = [self.picked(first, first, lanes) for lanes in own]
        for x, weight in zip(pixels, weights, strict=True):
            by = self.spread(weight, 8)
            totals = [self.at_once(self.picked(x, x, places), by, t) for places, t in zip(own, totals, strict=True)]
        return [((totals[0], own[0]), (totals[1], own[1]))]

    def at_once(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z, rounded once where the processor can; a product and a sum lose that when vectors are joined."""
        return self.call(f"llvm.fmuladd.v{x.type.count}f32", x.type, x, y, z)

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
