"""All attacks by name; a module below `frostglass.attacks` that registers one is found by existing."""

from __future__ import annotations

from typing import Any

from frostglass.core.drive import Attack
from frostglass.core.registry import Registry

ATTACKS: Registry[Attack[Any]] = Registry("attack", "frostglass.attacks", makes=Attack)
