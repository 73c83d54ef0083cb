"""Which small seed gives the coefficients that the labels publish: compiled search over ranges of 32-bit seeds.

A label of an encoding holds the private coefficients at their classes. A seed is refused at the first row that it does
not give, so one costs the start of a Mersenne Twister and a few draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from frostglass.core.errors import BadInput
from frostglass.numerics.compiled import kernel
from frostglass.numerics.key_rows import MixLaw
from frostglass.numerics.mixing import Labels
from frostglass.numerics.prng_search_kernels import scan_numpy, scan_torch
from frostglass.numerics.prng_search_released import released_coefficients

TOLERANCE = 2e-6
"""Labels are float32: two of them differ by less than this if they come from the same coefficients."""
ROWS = 96
"""Rows that a seed must give before it is looked at in full."""
SKIP, PARTS, MASS = 0, 1, 2


@dataclass(frozen=True)
class Clues:
    """What the labels of the first rows say about the coefficients, whatever the classes are.

    Args:
        kinds: [m] SKIP, PARTS (each private slot has a class of its own, so the sorted values are the coefficients) or
            MASS (two share a class, so only their sum is known).
        parts: [m, private] sorted descending, as labels have them.
        mass: [m] sum of the label.
        labels: how labels were coarsened.
    """

    kinds: NDArray[np.int64]
    parts: NDArray[np.float64]
    mass: NDArray[np.float64]
    labels: Labels

    @property
    def bits(self) -> float:
        """About how many bits of evidence they hold: a search over 2^b seeds needs more than b."""
        each = 17.0 if self.labels != "quantised" else 1.5
        return each * float((self.kinds == PARTS).sum()) + each * 0.8 * float((self.kinds == MASS).sum())


def label_mode(targets: NDArray[np.float32], law: MixLaw) -> Labels | None:
    """How the labels were coarsened, as their values show; None if they hold no coefficients (one-hot)."""
    values = targets[targets > 0]
    if not len(values) or bool(np.all((values == 1) | (values == 0))):
        return None
    if bool(np.all(np.abs(values * 4 - np.round(values * 4)) < 1e-6)):
        return "quantised"
    if law.private < law.k and bool(np.all(np.abs(targets.sum(1) - 1) < 1e-5)):
        return "renormalised"
    return "exact"


def clues_of(targets: NDArray[np.float32], law: MixLaw, rows: int = ROWS) -> Clues:
    """Clues in the first `rows` labels.

    Raises:
        BadInput: the labels hold no coefficients, or more classes than private slots.
    """
    mode = label_mode(targets, law)
    if mode is None:
        raise BadInput("labels: they hold no coefficients (one-hot or empty), so no seed can be told by them.")
    held = targets[:rows].astype(np.float64)
    count = (held > 0).sum(1)
    if int(count.max()) > law.private:
        raise BadInput(
            f"private: a label names {int(count.max())} classes and an encoding would hold {law.private} private "
            "images; give the right k and number of private slots."
        )
    parts = -np.sort(-held, axis=1)[:, : law.private]
    if parts.shape[1] < law.private:
        parts = np.pad(parts, ((0, 0), (0, law.private - parts.shape[1])))
    whole = count == law.private
    summed = (law.private < law.k) & (mode != "renormalised")
    missing = (count == 0) & (mode != "quantised")  # no label at all; quarters may round to none
    kinds = np.where(whole, PARTS, np.where(summed & ~missing, MASS, SKIP))
    return Clues(kinds.astype(np.int64), parts, held.sum(1), mode)


def fits(rows: NDArray[np.float32], clues: Clues) -> bool:
    """Whether coefficient rows [m, private] (their private slots) explain the clues."""
    m = min(len(rows), len(clues.kinds))
    code = {"exact": 0, "quantised": 1, "renormalised": 2}[clues.labels]
    for i in range(m):
        kind, mass = int(clues.kinds[i]), float(clues.mass[i])
        if not _row_fits(rows[i].astype(np.float64), kind, clues.parts[i], mass, code):
            return False
    return True


def _row_fits(values: NDArray[np.float64], kind: int, parts: NDArray[np.float64], mass: float, code: int) -> bool:
    total = float(values.sum())
    if code == 1:
        values, total = _quarters(values), round(total * 4) / 4
    elif code == 2:
        values = values / max(total, 1e-12)
    if kind == MASS:
        return abs(total - mass) <= TOLERANCE
    ordered: NDArray[np.float64] = -np.sort(-values)
    return kind == SKIP or bool(np.all(np.abs(ordered - parts) <= TOLERANCE))


def _quarters(values: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled = values * 4
    whole = np.floor(scaled)
    spare = int(round(float(scaled.sum())) - whole.sum())
    order = np.argsort(-(scaled - whole), kind="stable")
    whole[order[:spare]] += 1
    made: NDArray[np.float64] = whole / 4
    return made


def search_released(clues: Clues, law: MixLaw, images: int, start: int, stop: int) -> int:
    """The first seed in [start, stop) whose numpy coefficients explain the clues, -1 if none does.

    Args:
        clues: of the first rows of the set, in the order of the private images.
        images: rows of a round: row i < images takes draws i k .. (i + 1) k - 1.

    Raises:
        BadInput: numba is not installed (a search in plain Python would take weeks).
    """
    run = kernel(scan_numpy)
    if run is None:
        raise BadInput("prng_attack: numba is not installed, and without it the search is hopeless; install numba.")
    rows = min(images, len(clues.kinds))
    code = {"exact": 0, "quantised": 1, "renormalised": 2}[clues.labels]
    c2 = law.c2 if law.private < law.k else -1.0
    while start < stop:
        found = np.full(1, -1, np.int64)
        bounds = (law.c1, c2)
        held = (clues.kinds, clues.parts, clues.mass)
        run(start, stop, law.k, law.private, *bounds, rows, rows == images, *held, code, TOLERANCE, found)
        seed = int(found[0])
        if seed < 0:
            return -1
        # rows beyond the clues, and refused ones of a round longer than they are, said nothing so far: look at all
        drawn = released_coefficients(seed, images, -(-len(clues.kinds) // images), law)
        if fits(drawn[:, : law.private], clues):
            return seed
        start = seed + 1
    return -1


def search_permutation(first: NDArray[np.int64], second: NDArray[np.int64], start: int, stop: int) -> int:
    """The first torch seed in [start, stop) whose first permutation sends every row to an image of the right class.

    Args:
        first: [n] class of image i (of slot 0 of row i); second: [n] class of the partner in row i; -1 for unknown.

    Returns:
        The seed, -1 if none is.
    """
    run = kernel(scan_torch)
    if run is None:
        raise BadInput("prng_attack: numba is not installed, and without it the search is hopeless; install numba.")
    found = np.full(1, -1, np.int64)
    run(start, stop, first, second, min(len(first) - 1, 200), found)
    return int(found[0])
