"""No defence: the control that every defended cell is compared with."""

from __future__ import annotations

from frostglass.core.defense import Defense
from frostglass.defenses.registry import DEFENSES


@DEFENSES.register()
def none() -> Defense:
    """Nothing is hidden: the plain update of the private batch."""
    return Defense("none", claim="none")
