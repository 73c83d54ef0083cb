"""Flower: apps that train under Frostglass defences, and taps that record the updates that are really sent.

Importing this package turns Flower's telemetry off. Where flwr is missing or of another version, importing it raises
`BadInput` with one sentence.
"""

from frostglass.federated.flower.availability import require_flower

require_flower()

from frostglass.federated.flower.client_apps import client_app, plan_client_app  # noqa: E402
from frostglass.federated.flower.gate_mod import gate_mod  # noqa: E402
from frostglass.federated.flower.local_grid import LocalGrid, run_local  # noqa: E402
from frostglass.federated.flower.mods import audit_mod, protect_mod  # noqa: E402
from frostglass.federated.flower.server_app import plan_server_app  # noqa: E402
from frostglass.federated.flower.strategy import AuditedFedAvg, AuditTap, OrderedFedAvg  # noqa: E402

__all__ = [
    "AuditTap",
    "AuditedFedAvg",
    "LocalGrid",
    "OrderedFedAvg",
    "audit_mod",
    "client_app",
    "gate_mod",
    "plan_client_app",
    "plan_server_app",
    "protect_mod",
    "require_flower",
    "run_local",
]
