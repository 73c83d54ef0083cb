"""Accounting over sampled steps: Opacus's accountants, of which nothing is rewritten here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from frostglass.core.opacus_import import import_opacus
from frostglass.guarantees.domain import check

Accountant = Literal["rdp", "prv"]


def accounted_epsilon(
    noise_multiplier: float, *, steps: int, rate: float = 1.0, delta: float = 1e-5, accountant: Accountant = "rdp"
) -> float:
    """epsilon at `delta` of `steps` Poisson-sampled Gaussian steps, for adding or removing one unit.

    Args:
        noise_multiplier: standard deviation of the noise on the sum, in clipping norms.
        steps: releases that are composed.
        rate: probability with which a unit takes part in a step; 1: always.
        delta: of (epsilon, delta).
        accountant: "rdp" is an upper bound; "prv" is numerical, about .01 above the optimum.

    Raises:
        BadInput: a parameter that is out of range.
    """
    check(noise_multiplier=noise_multiplier, steps=steps, rate=rate, delta=delta)
    import_opacus()
    from opacus.accountants import PRVAccountant, RDPAccountant

    chosen = RDPAccountant() if accountant == "rdp" else PRVAccountant()
    chosen.history = [(noise_multiplier, rate, steps)]
    with quiet():
        return float(chosen.get_epsilon(delta))


def noise_for_epsilon(
    epsilon: float, *, steps: int, rate: float, delta: float, accountant: Accountant = "rdp"
) -> float:
    """The noise multiplier that Opacus finds for a target epsilon.

    Raises:
        BadInput: a parameter that is out of range.
    """
    check(epsilon=epsilon, steps=steps, rate=rate, delta=delta)
    import_opacus()
    from opacus.accountants.utils import get_noise_multiplier

    with quiet():
        return float(
            get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant=accountant
            )
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Opacus warns and logs where its best order is the last one that it tries."""
    log = logging.getLogger("opacus")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
