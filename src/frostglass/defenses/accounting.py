"""Epsilon of Gaussian mechanisms: Opacus' accountants, asked in one place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from frostglass.core.opacus_import import import_opacus

Accountant = Literal["rdp", "prv"]


def epsilon_of(sigma: float, delta: float, steps: int, accountant: Accountant = "rdp", rate: float = 1.0) -> float:
    """Epsilon at `delta` of `steps` Gaussian releases with noise multiplier `sigma` above 0.

    Args:
        sigma: standard deviation of the noise over the sensitivity.
        delta: above 0.
        steps: releases, composed.
        accountant: "rdp" (Mironov 2017; an upper bound, loose by a few per cent) or "prv" (Gopi et al. 2021; tighter).
        rate: of Poisson sampling before each release; 1 for none.
    """
    import_opacus()
    from opacus.accountants import PRVAccountant, RDPAccountant

    made = RDPAccountant() if accountant == "rdp" else PRVAccountant()
    made.history = [(sigma, rate, steps)]
    with opacus_quiet():
        return float(made.get_epsilon(delta))


@contextmanager
def opacus_quiet() -> Iterator[None]:
    """Opacus warns of orders at the end of its range and of hooks on inputs; neither concerns the numbers shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
