"""The Flower app that is handed to a SuperLink: a description; the code is `frostglass.federated.flower.apps`."""

from __future__ import annotations

from importlib import util
from pathlib import Path

from frostglass.core.errors import BadInput
from frostglass.federated.flower.availability import require_flower

DESCRIPTION = """\
[project]
name = "frostglass-federation"
version = "1.0.0"
description = "Federated training with Frostglass's defences and its audit tap"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41,<1.42", "frostglass[flower]"]

[tool.flwr.app]
publisher = "frostglass"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "frostglass.federated.flower.apps:server"
clientapp = "frostglass.federated.flower.apps:client"

[tool.flwr.app.config]
plan = ""
out = ""
"""
"""pyproject.toml of the app; `plan` is the text of a federate plan in TOML, `out` the server's run folder."""

LICENSE = "Apache-2.0\n\nLicensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0\n"


def require_deployment() -> None:
    """Looks whether a deployment can be started or spoken to.

    Raises:
        BadInput: flwr or psutil is missing, or flwr is of another version.
    """
    require_flower()
    if util.find_spec("psutil") is None:
        raise BadInput("engine: psutil is not installed; run pip install 'frostglass[flower]'.")


def bundle(app: Path | None = None) -> bytes:
    """A Flower app bundle (FAB).

    Args:
        app: folder of an app; None for Frostglass's own.

    Raises:
        BadInput: the folder holds no Flower app.
    """
    from flwr.cli.build import build_fab_from_disk, build_fab_from_files

    if app is None:
        files: dict[str, bytes | Path] = {"pyproject.toml": DESCRIPTION.encode(), "LICENSE": LICENSE.encode()}
        return bytes(build_fab_from_files(files)[0])
    if not (app / "pyproject.toml").is_file():
        raise BadInput(f"app: {app} holds no pyproject.toml; name the folder of a Flower app.")
    try:
        return bytes(build_fab_from_disk(app))
    except (ValueError, OSError) as wrong:
        raise BadInput(f"app: {app} is no Flower app ({' '.join(str(wrong).split())}).") from None
