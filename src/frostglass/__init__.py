"""Frostglass: hide private training images, see through what gradients give away, and say it honestly.

    import frostglass
    report = frostglass.audit(model=my_module, images=x, labels=y, attacks=["spear"])
    print(report)

Everything is imported on first use, so that `frostglass.core`, `numerics` and `attacks` need torch, numpy and
jaxtyping alone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# On a busy machine spinning OpenMP threads are 20 to 60 times slower; must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Matrix products that repeat on CUDA; cuBLAS reads it when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from frostglass._version import __version__

if TYPE_CHECKING:
    from frostglass.auditing.api import audit
    from frostglass.auditing.recorded_api import audit_updates
    from frostglass.auditing.scorecard import AuditReport
    from frostglass.auditing.unmixing_api import unmix
    from frostglass.core.errors import AttackFailed, BadInput, FrostglassError

_PLACES = {
    "audit": "frostglass.auditing.api",
    "AuditReport": "frostglass.auditing.scorecard",
    "audit_updates": "frostglass.auditing.recorded_api",
    "unmix": "frostglass.auditing.unmixing_api",
    "BadInput": "frostglass.core.errors",
    "AttackFailed": "frostglass.core.errors",
    "FrostglassError": "frostglass.core.errors",
}

__all__ = [
    "AttackFailed",
    "AuditReport",
    "BadInput",
    "FrostglassError",
    "__version__",
    "audit",
    "audit_updates",
    "unmix",
]


def __getattr__(name: str) -> Any:
    """Imports public names on first use (PEP 562)."""
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'frostglass' has no attribute {name!r}")
