"""Small federations for tests: plans as text, and runs of Flower's apps in this process."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

SMALL = """
name = "small"
[data]
limit = 250
[model]
options = { width = 8 }
[split]
clients = 3
[client]
lr = 0.05
minibatch = 16
[server]
rounds = 2
"""
"""Three clients with 66 or 67 digits each, five steps a round."""


def plan(extra: str = "", **replaced: str) -> str:
    """SMALL with lines replaced by their key, and more tables behind it."""
    lines = SMALL.splitlines()
    for key, value in replaced.items():
        assert any(line.startswith(f"{key} =") for line in lines), key
        lines = [f"{key} = {value}" if line.startswith(f"{key} =") else line for line in lines]
    return "\n".join(lines) + "\n" + extra


def federate(text: str, out: Path, *, mods: Sequence[Any] = (), client: Any = None, grid: Any = None) -> dict[str, Any]:
    """Runs the plan in this process and returns its history; the record is in out / "recorded"."""
    from flwr.app import Context, RecordDict

    from frostglass.federated.federate_plan import plan_of
    from frostglass.federated.flower import plan_client_app, plan_server_app, run_local
    from frostglass.federated.flower.engines import flower_quiet
    from frostglass.federated.flower.local_grid import _identity

    out.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    server = plan_server_app(text, out, "local", said.append)
    app = client or plan_client_app(text, mods=mods)
    clients = plan_of(text).split.clients
    logging.getLogger("flwr").propagate = False
    with flower_quiet(False):
        if grid is None:
            run_local(server, app, clients)
        else:
            with _identity():
                context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
                server(grid(app, clients), context)
    history: dict[str, Any] = json.loads((out / "history.json").read_text())
    return history | {"said": said}


def weights(out: Path) -> dict[str, Tensor]:
    """Of the last round."""
    from safetensors.torch import load_file

    return dict(load_file(out / "model.safetensors"))
