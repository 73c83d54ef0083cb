"""Whether the Flower that this package works with is installed; and its telemetry, off."""

from __future__ import annotations

import os
import sys
from importlib import import_module, metadata, util

from frostglass.core.errors import BadInput

WORKS_WITH = "1.41"
"""The in-process grid and the simulation need names that are not public: another version may lack them."""

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Nothing is reported to anybody."""

_INSTALL = "run pip install 'frostglass[flower]'"


def require_flower() -> None:
    """Turns telemetry off, and looks whether Flower can be used.

    Raises:
        BadInput: flwr is not installed, does not import, or is of another version.
    """
    os.environ.update(QUIET)
    telemetry = sys.modules.get("flwr.supercore.telemetry")
    if telemetry is not None:  # imported by somebody before: it has read the environment already
        telemetry.FLWR_TELEMETRY_ENABLED = "0"  # type: ignore[attr-defined]
    try:
        import_module("flwr.app")
        found = metadata.version("flwr")
    except (ImportError, metadata.PackageNotFoundError) as wrong:
        raise BadInput(f"engine: Flower does not import ({wrong}); {_INSTALL}.") from None
    if not found.startswith(f"{WORKS_WITH}."):
        raise BadInput(f"engine: flwr {found} is installed and this works with {WORKS_WITH}; {_INSTALL}.")


def require_ray() -> None:
    """Looks whether Flower's simulation can be used.

    Raises:
        BadInput: ray is not installed.
    """
    if sys.modules.get("ray", ...) is None or util.find_spec("ray") is None:
        raise BadInput(f'engine: "ray" needs Ray, which is not installed; {_INSTALL}, or use --engine local.')
