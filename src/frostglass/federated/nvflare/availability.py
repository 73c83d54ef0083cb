"""Whether the NVFlare that this package works with is installed."""

from __future__ import annotations

from importlib import metadata

from frostglass.core.errors import BadInput

WORKS_WITH = "2.9"

_INSTALL = "run pip install 'frostglass[nvflare]'"


def require_nvflare() -> None:
    """Looks whether NVFlare can be used.

    Raises:
        BadInput: it is not installed, or of another version.
    """
    try:
        found = metadata.version("nvflare")
    except metadata.PackageNotFoundError:
        raise BadInput(f"engine: nvflare is not installed; {_INSTALL}.") from None
    if not found.startswith(f"{WORKS_WITH}."):
        raise BadInput(f"engine: nvflare {found} is installed and this works with {WORKS_WITH}; {_INSTALL}.")
