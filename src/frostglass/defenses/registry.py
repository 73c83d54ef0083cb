"""All defences by name; a module below `frostglass.defenses` that registers one is found by existing."""

from __future__ import annotations

from frostglass.core.defense import Defense
from frostglass.core.registry import Registry

DEFENSES: Registry[Defense] = Registry("defense", "frostglass.defenses", makes=Defense)
