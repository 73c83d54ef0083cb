"""Whether the NVFlare that this package works with is installed."""

from __future__ import annotations

from importlib import import_module, metadata

from frostglass.core.errors import BadInput

WORKS_WITH = "2.9"

_INSTALL = "run pip install 'frostglass[nvflare]'"


def require_nvflare() -> None:
    """Looks whether NVFlare can be used.

    Raises:
        BadInput: it is not installed, does not import, or is of another version.
    """
    try:
        found = metadata.version("nvflare")
    except metadata.PackageNotFoundError:
        raise BadInput(f"engine: nvflare is not installed; {_INSTALL}.") from None
    if not found.startswith(f"{WORKS_WITH}."):
        raise BadInput(f"engine: nvflare {found} is installed and this works with {WORKS_WITH}; {_INSTALL}.")
    try:
        import_module("nvflare.apis.filter")
    except ImportError as wrong:  # a part that it needs is missing, or another module has its name
        raise BadInput(f"engine: NVFlare does not import ({wrong}); {_INSTALL}.") from None
