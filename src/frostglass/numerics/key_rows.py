"""What one encoding's one-time key is made of, and how each part is drawn from a keystream.

A key row is (indices, coefficients, mask bits). Nothing here draws from a torch, numpy or `random` generator: their
states can be rewound from a checkpoint or searched from published coefficients, which is how the InstaHide challenge
fell.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from frostglass.core.errors import BadInput
from frostglass.numerics.compiled import fastest, kernel
from frostglass.numerics.key_loops import choose_distinct, share_out
from frostglass.numerics.keystream import Keystream
from frostglass.numerics.mixing_vectors import GRID

Law: TypeAlias = Literal["folded_normal", "dirichlet"]

_RAREST = 1e-3
_AT_ONCE = 1 << 22
"""Values drawn at a time, 32 MiB of each array: where few rows are accepted, candidates are far more than rows."""
MOST = 1024
"""Images in one encoding at the most: far beyond what could be trained on, and a bound on what a check costs."""


@dataclass(frozen=True)
class MixLaw:
    """How coefficients of one encoding are drawn: normalised, then whole rows rejected until both bounds hold.

    They are multiples of 2^-14 (see `on_grid`).

    Args:
        k: images in one encoding.
        private: how many of them are private (slots 0 .. private - 1); k for encoding inside one set.
        c1: no coefficient exceeds it.
        c2: the private coefficients sum to at least this; without effect if all are private.
        law: "folded_normal" normalises k values |N(0, 1)|, as the released InstaHide does; "dirichlet" draws
            Dirichlet(3, 1, ..., 1), which gives slot 0 more weight, as GradAttack does.
        first: slot 0 gets at least this (used for encoded inference); drawn from that part of the simplex where
            rejection of whole rows would take longer, with the same distribution.
    """

    k: int = 4
    private: int = 4
    c1: float = 0.65
    c2: float = 0.3
    law: Law = "folded_normal"
    first: float = 0.0

    def check(self) -> None:
        """Raises BadInput if no draw, or fewer than one in 1000, would be accepted: rejection must end."""
        k, p = self.k, self.private
        if self.law not in ("folded_normal", "dirichlet"):
            raise BadInput(f"law: {self.law!r} is not known; use 'folded_normal' or 'dirichlet'.")
        if k < 1 or not 1 <= p <= k:
            raise BadInput(f"private: {p} private images among k = {k} is not possible; give 1 <= private <= k.")
        if k > MOST:
            raise BadInput(f"k: {k} images in one encoding are more than the {MOST} that can be mixed; lower k.")
        names = {"c1": self.c1, "c2": self.c2, "min_private": self.first}
        found = [f"{name}: {v!r} is no number." for name, v in names.items() if not isinstance(v, Real)]
        if found:
            raise BadInput(found)
        if k == 1 and self.c1 < 1:
            found.append(f"c1: {self.c1} cannot be kept by the only coefficient of k = 1; set c1 = 1, or raise k.")
        elif not 1 / k <= self.c1 <= 1:
            found.append(f"c1: {self.c1} is outside [1/k, 1] = [{1 / k:.4g}, 1]; {k} coefficients sum to 1.")
        if not 0 <= self.c2 <= 1:
            found.append(f"c2: {self.c2} is not a share; give a number in [0, 1].")
        elif p < k and self.c2 > p * self.c1:
            found.append(f"c2: {self.c2} cannot be reached by {p} private coefficients of at most c1 = {self.c1}.")
        if not 0 <= self.first <= self.c1:
            found.append(f"min_private: {self.first} cannot be reached by a coefficient of at most c1 = {self.c1}.")
        if found:
            raise BadInput(found)
        if max(acceptance(self), acceptance_above(self)) < _RAREST:
            least = f", min_private = {self.first}" if self.first else ""
            raise BadInput(
                f"c1, c2: with k = {k}, private = {p}, c1 = {self.c1}, c2 = {self.c2}{least} fewer than one draw in "
                "1000 would be accepted; raise c1 or lower the bounds on the private share."
            )

    def shares(self, weights: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """`on_grid` of |weights| [n, k], of which only rows that keep the bounds; compiled where numba is installed."""
        run = kernel(share_out)
        if run is None:
            rows = on_grid(np.abs(weights.astype(np.float64)))
            return np.compress(self.accepts(rows), rows, 0)  # rows[...] takes seven times as long
        rows = np.empty(weights.shape, np.float32)
        least = self.c2 if self.private < self.k else 0.0
        most, first = float(np.float32(self.c1)), float(np.float32(self.first))
        return rows[: run(weights, most, self.private, least, first, rows)]

    def accepts(self, rows: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which coefficient rows [n, k] keep the bounds (as stored, in float32)."""
        # Column by column: numpy is several times slower along a short last axis.
        ok: NDArray[np.bool_] = functools.reduce(np.maximum, rows.T) <= self.c1
        if self.private < self.k:
            ok &= rows[:, : self.private].sum(1, dtype=np.float64) >= self.c2
        if self.first:
            ok &= rows[:, 0] >= self.first
        return ok


def on_grid(weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows [..., k] of non-negative weights as multiples of 1 / GRID that sum to 1.

    What the shares before a slot and with it come to is rounded, and their difference taken, so that errors do not
    add up: each is below 1 / GRID, and 0 on average. A share below 1 / GRID may become 0.
    """
    columns = np.ascontiguousarray(np.moveaxis(weights, -1, 0))  # numpy takes three times as long along short rows
    scale = GRID / functools.reduce(np.add, columns)
    reached, before = np.zeros_like(scale), np.zeros_like(scale)
    shares = np.empty(columns.shape, np.float32)
    for share, weight in zip(shares, columns, strict=True):
        reached += weight * scale
        edge = np.rint(reached)
        np.subtract(edge, before, out=share, casting="same_kind")
        before = edge
    shares /= GRID
    return np.ascontiguousarray(np.moveaxis(shares, 0, -1))


@functools.lru_cache(maxsize=256)
def acceptance(law: MixLaw) -> float:
    """Share of coefficient rows that the bounds accept, estimated once from up to 2^16 rows (no key material)."""
    g, n = np.random.Generator(np.random.Philox(key=1)), min(1 << 16, (1 << 22) // law.k)
    if law.law == "dirichlet":
        weights = g.standard_gamma([3.0] + [1.0] * (law.k - 1), (n, law.k))
    else:
        weights = g.standard_normal((n, law.k))
    return len(law.shares(weights)) / n


def _above(law: MixLaw, uniforms: NDArray[np.float64]) -> NDArray[np.float32]:
    """Those of the candidates [n, k + 1] (uniform in (0, 1)) that `law` keeps, as rows, slot 0 above `first`.

    On the simplex the normalised |N(0, 1)| have a density proportional to |row|^-k (the length of the normal vector
    integrates out), and Dirichlet(3, 1, ..., 1) one proportional to row_0^2. Candidates are uniform on the part where
    first <= row_0 <= c1: row_0 by its inverse distribution function, the others a share of what is left. They are kept
    in the ratio of the density to its greatest value there, which is exact, as rejection from the whole simplex is.
    """
    k, f = law.k, law.first
    least = ((1 - law.c1) / (1 - f)) ** (k - 1)
    rest = (1 - f) * (least + (1 - least) * uniforms[:, 0]) ** (1 / (k - 1))  # 1 - row_0
    shares = -np.log(uniforms[:, 1:k])
    rows = np.empty((len(uniforms), k))
    rows[:, 0] = 1 - rest
    rows[:, 1:] = shares * (rest / shares.sum(1))[:, None]
    if law.law == "dirichlet":
        keep = uniforms[:, k] <= (rows[:, 0] / law.c1) ** 2
    else:
        shortest = f * f + (1 - f) ** 2 / (k - 1)  # squared length, at row_0 = first and the others alike
        keep = uniforms[:, k] <= (shortest / np.square(rows).sum(1)) ** (k / 2)
    return law.shares(rows[keep])


@functools.lru_cache(maxsize=256)
def acceptance_above(law: MixLaw) -> float:
    """Share of the candidates of `_above` that are kept, estimated once; 0 where they cannot be drawn that way."""
    if law.k < 2 or not 1 / law.k <= law.first < law.c1:
        return 0.0
    g, n = np.random.Generator(np.random.Philox(key=1)), min(1 << 16, (1 << 22) // law.k)
    return len(_above(law, 1 - g.random((n, law.k + 1)))) / n


def candidates(law: MixLaw, missing: int, rate: float) -> int:
    """Rows to draw at a time for `missing` more, where a share of about `rate` is accepted."""
    return min(int(missing / max(rate, _RAREST) * 1.05) + 8, max(1, _AT_ONCE // law.k))


def draw_coefficients(stream: Keystream, law: MixLaw, count: int) -> NDArray[np.float32]:
    """[count, k] coefficient rows under `law`, from keystream bits; rows are rejected whole.

    Memory stays bounded however few rows are accepted. The caller has run `law.check()`, so this ends.
    """
    kept: list[NDArray[np.float32]] = []
    above = acceptance_above(law) if law.first else 0.0
    above = above if above > acceptance(law) else 0.0
    missing = count
    while missing > 0:
        n = candidates(law, missing, above or acceptance(law))
        if above:
            rows = _above(law, stream.uniforms(n * (law.k + 1)).reshape(n, law.k + 1))
        else:
            if law.law == "dirichlet":  # Gamma(3) is the sum of three exponentials
                e = stream.exponentials(n * (law.k + 2)).reshape(n, law.k + 2)
                weights = np.concatenate([e[:, :3].sum(1, keepdims=True), e[:, 3:]], 1)
            else:
                weights = stream.normals(n * law.k).reshape(n, law.k)
            rows = law.shares(weights)
        rows = rows[:missing]
        kept.append(rows)
        missing -= len(rows)
    return kept[0] if len(kept) == 1 else np.concatenate(kept or [np.empty((0, law.k), np.float32)])


def draw_distinct(stream: Keystream, population: int, slots: int, count: int) -> NDArray[np.int64]:
    """[count, slots] integers in [0, population), distinct within each row, every such row equally likely.

    Slot j is a rank among the population - j values not yet used in its row (`key_loops.choose_distinct`), so no row is
    ever redrawn, whatever the size of the population.

    Raises:
        BadInput: population < slots, or a population of 2^32 or more.
    """
    if population < slots:
        raise BadInput(f"k: {slots} distinct partners cannot be drawn from {population} images; lower k or add images.")
    if population >= 1 << 32:
        raise BadInput(f"k: partners from {population} images cannot be drawn; the most is 2^32 - 1.")
    made: list[NDArray[np.int64]] = []
    missing = count
    while missing > 0:
        rows, wanted = np.empty((missing, slots), np.int64), missing * slots
        spare = wanted >> 6 if population < 1 << 24 else wanted  # of huge populations half of the words are rejected
        words = stream.bytes(4 * (wanted + spare + 16)).view("<u4").astype(np.uint32, copy=False)
        made.append(rows[: fastest(choose_distinct)(words, population, rows)])
        missing -= len(made[-1])
    return made[0] if len(made) == 1 else np.concatenate(made or [np.empty((0, slots), np.int64)])


def draw_partner_permutations(stream: Keystream, n: int, slots: int) -> NDArray[np.int64]:
    """[slots, n]: permutations of 0 .. n - 1 such that i, p_1[i], p_2[i], ... are distinct for every i.

    The paper's partners (each image exactly once per slot and epoch), without the repeats of independent
    permutations: conflicts are removed by random swaps. Small sets, where swaps may find no way out, get cyclic
    shifts of one random order.

    Raises:
        BadInput: n <= slots.
    """
    if n <= slots:
        raise BadInput(f"k: {slots + 1} distinct images cannot be drawn from {n}; lower k or add images.")
    if n >= 16 * (slots + 1):
        taken = [np.arange(n, dtype=np.int64)]
        for _ in range(slots):
            order = stream.permutation(n)
            if not _swap_apart(stream, order, np.stack(taken)):
                break
            taken.append(order)
        else:
            return np.stack(taken[1:]) if slots else np.empty((0, n), np.int64)
    order = stream.permutation(n)
    place = np.argsort(order)
    shifts = 1 + draw_distinct(stream, n - 1, slots, 1)[0]
    return np.stack([order[(place + s) % n] for s in shifts]) if slots else np.empty((0, n), np.int64)


def _swap_apart(stream: Keystream, order: NDArray[np.int64], taken: NDArray[np.int64]) -> bool:
    """Swaps entries of `order` until it agrees nowhere with any row of `taken`; False if 100 sweeps do not do it."""
    for _ in range(100):
        clashes = np.flatnonzero((taken == order).any(0))
        if not len(clashes):
            return True
        for i, s in zip(clashes, stream.integers(len(order), len(clashes)), strict=True):
            if order[s] not in taken[:, i] and order[i] not in taken[:, s]:
                order[i], order[s] = order[s], order[i]
    return False


@dataclass(frozen=True, repr=False)
class KeyRows:
    """One-time keys of b encodings. Holding them equals holding the images: never printed, pickled or kept.

    Args:
        indices: [b, k] rows of the private table (slots below `private`) or of the public one.
        coefficients: [b, k] float32.
        bits: [b, ceil(d / 8)] keystream of the sign mask, or None.
    """

    indices: NDArray[np.int64]
    coefficients: NDArray[np.float32]
    bits: NDArray[np.uint8] | None = field(default=None)

    def __repr__(self) -> str:
        return f"KeyRows({len(self.indices)} secret rows)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("KeyRows hold key material and are never pickled, copied or saved")


def mask_width(d: int) -> int:
    """Bytes of keystream that the sign mask of d pixels takes."""
    return (d + 7) // 8


def draw_mask(stream: Keystream, count: int, d: int) -> NDArray[np.uint8]:
    """[count, ceil(d / 8)] fresh mask bits."""
    return stream.bytes(count * mask_width(d)).reshape(count, -1)
