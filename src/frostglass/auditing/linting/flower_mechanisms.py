"""Flower's mechanisms: LocalDpMod on the client, DifferentialPrivacy... strategies on the server.

Parameters in the order of flwr 1.41: flwr.clientapp.mod.LocalDpMod, flwr.serverapp.strategy.DifferentialPrivacy*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from frostglass.auditing.linting.facts import Facts, as_number

_FIXED = ("strategy", "noise_multiplier", "clipping_norm", "num_sampled_clients")
_ADAPTIVE = (
    "strategy", "noise_multiplier", "num_sampled_clients", "initial_clipping_norm", "target_clipped_quantile",
    "clip_norm_lr", "clipped_count_stddev",
)  # fmt: skip

MECHANISMS: dict[str, tuple[str, ...]] = {
    "LocalDpMod": ("clipping_norm", "sensitivity", "epsilon", "delta"),
    "DifferentialPrivacyServerSideFixedClipping": _FIXED,
    "DifferentialPrivacyClientSideFixedClipping": _FIXED,
    "DifferentialPrivacyServerSideAdaptiveClipping": _ADAPTIVE,
    "DifferentialPrivacyClientSideAdaptiveClipping": _ADAPTIVE,
}


def flower_facts(name: str, held: Mapping[str, Any], lines: Mapping[str, int], config: Mapping[str, Any]) -> Facts:
    """One mechanism from its parameters.

    Args:
        name: a key of `MECHANISMS`.
        held: parameters; None for what is not known.
        lines: of the parameters.
        config: the run configuration: rounds and clients.
    """

    def number(*keys: str, among: Mapping[str, Any] = held) -> float | None:
        return as_number(next((among[k] for k in keys if among.get(k) is not None), None))

    rounds = number("num_server_rounds", "num_rounds", "rounds", among=config)
    spelled = {_FACT.get(k, k): v for k, v in lines.items()}
    local = name == "LocalDpMod"
    clients, sampled = number("num_clients", "num_supernodes", among=config), number("num_sampled_clients")
    drawn: Literal["fixed"] | None = "fixed" if not local and clients and sampled and sampled < clients else None
    return Facts(
        framework="Flower",
        name=name,
        lines=spelled,
        clip=number("clipping_norm", "initial_clipping_norm"),
        sensitivity=number("sensitivity"),
        noise_multiplier=number("noise_multiplier"),
        epsilon=number("epsilon"),
        delta=number("delta"),
        epsilon_is="release" if local else None,
        classical=local,
        clip_unit="client",
        claim_unit="client" if local else None,
        steps=None if rounds is None or not math.isfinite(rounds) else int(rounds),
        sampling=drawn,
        accounted=held.get("accountant") is not None,
        secure_generator=False,
        unnoised=("the count of clipped clients",) if _bare_count(name, held) else (),
    )


_FACT = {"clipping_norm": "clip", "initial_clipping_norm": "clip", "num_server_rounds": "steps"}


def _bare_count(name: str, held: Mapping[str, Any]) -> bool:
    """Adaptive clipping releases how many clients were clipped; Flower noises it unless told 0."""
    return "Adaptive" in name and held.get("clipped_count_stddev") == 0


def flower_object_facts(thing: Any, *, rounds: int | None = None) -> Facts | None:
    """Of a live LocalDpMod or strategy; None if it is neither.

    Args:
        thing: the object; only its attributes are read.
        rounds: server rounds that it will take part in.
    """
    name = next((c.__name__ for c in type(thing).__mro__ if c.__name__ in MECHANISMS), None)
    if name is None:
        return None
    held = {p: getattr(thing, p, None) for p in (*MECHANISMS[name], "clipping_norm", "accountant")}
    return flower_facts(name, held, {}, {"num_server_rounds": rounds})
