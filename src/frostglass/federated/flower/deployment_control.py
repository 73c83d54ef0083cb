"""A SuperLink's control interface over TLS: nodes, runs and logs.

Flower offers it to its command line alone. `frostglass` speaks the same protocol through Flower's own client, because a
new `flwr` process for every question takes seconds; the names used here are private to Flower and pinned with 1.41.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from frostglass.core.errors import BadInput
from frostglass.federated.flower.deployment_certificates import reason, trusting
from frostglass.federated.flower.deployment_processes import DeploymentFailed

TIMEOUT = 15.0
"""Seconds that one answer may take."""


@dataclass(frozen=True)
class Node:
    """A SuperNode as the SuperLink knows it.

    Args:
        id: given by the SuperLink.
        status: registered, online, offline or unregistered.
        public_key: PEM.
    """

    id: int
    status: str
    public_key: bytes


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Args:
        status: pending, starting, running or finished.
        outcome: of a finished one: completed, failed or stopped.
        details: as Flower words them.
        inbound, outbound: bytes at the SuperLink.
    """

    status: str
    outcome: str
    details: str
    inbound: int
    outbound: int


class Control:
    """A connection to a SuperLink; a context manager.

    Args:
        address: "host:port" of its HTTP port.
        root: certificate of the authority that it was certified by.

    Raises:
        BadInput: nothing answers there, it speaks no TLS, or it is not certified by this authority for this host.
    """

    def __init__(self, address: str, root: Path) -> None:
        self.address = address
        reach(address, root)
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        with _direct(address):
            self._client = ControlHttpClient.from_server_address(
                address, False, root.read_bytes(), [RuntimeVersionHttpInterceptor(component_name="frostglass")]
            )

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, wrong: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def register(self, public_key: bytes, name: str) -> int:
        """Lets the holder of this key take part; the id of its node."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        with _worded(f"node {name}"):
            return int(self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def nodes(self) -> list[Node]:
        """All that are or were known."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with _worded("nodes"):
            answer = self._client.ListNodes(ListNodesRequest())
        return [Node(int(n.node_id), str(n.status), bytes(n.public_key)) for n in answer.nodes_info]

    def start(self, bundle: bytes, config: dict[str, str | int | float | bool]) -> int:
        """Hands over an app and starts it; the id of the run.

        Args:
            bundle: a Flower app bundle (FAB).
            config: values for keys that the app declares.
        """
        import hashlib

        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)))
        with _worded("run"):
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise DeploymentFailed(
                f"the SuperLink at {self.address} did not start the run: {answer.note or 'no reason'}"
            )
        return int(answer.run_id)

    def run(self, run_id: int) -> RunStatus:
        """Where it stands."""
        from flwr.common.serde import run_from_proto
        from flwr.proto.control_pb2 import ListRunsRequest

        with _worded(f"run {run_id}"):
            answer = self._client.ListRuns(ListRunsRequest(run_id=run_id))
        run = run_from_proto(answer.run_dict[run_id])
        return RunStatus(
            str(run.status.status), str(run.status.sub_status), str(run.status.details),
            int(run.bytes_recv), int(run.bytes_sent),
        )  # fmt: skip

    def stop(self, run_id: int) -> None:
        """Ends a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        with _worded(f"run {run_id}"):
            self._client.StopRun(StopRunRequest(run_id=run_id))

    def log(self, run_id: int) -> Iterator[str]:
        """What the server app prints, until the run is over."""
        from flwr.proto.control_pb2 import StreamLogsRequest

        with _worded(f"log of run {run_id}"):
            for part in self._client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=0.0)):
                yield str(part.log_output)


def reach(address: str, root: Path) -> None:
    """Shakes hands with a SuperLink.

    Raises:
        BadInput: no address, nothing answers, no TLS, or another authority or host than expected.
    """
    host, port = parse_address(address)
    context = trusting(root, "root_certificates")
    try:
        with (
            socket.create_connection((host, port), timeout=TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return
    except ssl.SSLCertVerificationError as wrong:
        raise BadInput(
            f"root_certificates: what answers at {address} is not certified by {root} for {host} ({reason(wrong)}); "
            "name the certificate of the authority that its operator uses."
        ) from None
    except ssl.SSLError as wrong:
        raise BadInput(f"address: {address} speaks no TLS ({reason(wrong)}); start the SuperLink with TLS.") from None
    except OSError as wrong:
        words = str(wrong.strerror or wrong).lower()
        raise BadInput(f"address: nothing answers at {address} ({words}); name the SuperLink's HTTP port.") from None


def parse_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; an IPv6 address stands in brackets.

    Raises:
        BadInput: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise BadInput(f"address: {address!r} is not host:port; write for example 127.0.0.1:9093.")
    return host.strip("[]"), int(port)


@contextmanager
def _worded(what: str) -> Iterator[None]:
    """Flower's refusals in one sentence."""
    import httpx
    from flwr.supercore.error import FlowerError

    try:
        yield
    except httpx.HTTPStatusError as wrong:
        told: Any = FlowerError.from_json(wrong.response.text)
        words = f"{told.message} {told.public_details or ''}".strip() if told else f"HTTP {wrong.response.status_code}"
        raise DeploymentFailed(f"{what}: the SuperLink refused it: {words}") from None
    except httpx.HTTPError as wrong:
        raise DeploymentFailed(f"{what}: the SuperLink did not answer ({type(wrong).__name__}: {wrong}).") from None


@contextmanager
def _direct(address: str) -> Iterator[None]:
    """Straight to it, as `reach` went: whatever proxy the environment names, that handshake was not with it."""
    host, _ = parse_address(address)
    before = os.environ.get("NO_PROXY")
    os.environ["NO_PROXY"] = ",".join(p for p in (before, host) if p)
    try:
        yield
    finally:
        if before is None:
            del os.environ["NO_PROXY"]
        else:
            os.environ["NO_PROXY"] = before
