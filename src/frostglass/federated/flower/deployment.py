"""A Flower deployment: a SuperLink and its SuperNodes as processes that speak TLS, and runs handed to it.

    with Deployment("trial", nodes=3) as deployment:
        done = deployment.run(plan_text, limit=600)

`submit` hands a run to a SuperLink that somebody else runs. Flower 1.41 serves all its interfaces on one HTTP port.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from frostglass.core.errors import BadInput
from frostglass.federated.flower.deployment_app import bundle, require_deployment
from frostglass.federated.flower.deployment_certificates import LOOPBACK, Certificates, check, issue, node_key
from frostglass.federated.flower.deployment_control import Control
from frostglass.federated.flower.deployment_processes import (
    DeploymentFailed,
    Processes,
    WaitClock,
    free_port,
    last_line,
    require_free,
)
from frostglass.federated.flower.deployment_run import FinishedRun, carried_out

SUPERLINK = "superlink"
HOST = LOOPBACK[0]


class Deployment:
    """SuperLink and SuperNodes on this machine, with TLS and SuperNode authentication; a context manager.

    Every process ends with the block, and when this process is killed. Logs are `superlink.log` and `node-0.log`, ...

    Args:
        folder: new or empty, for keys, certificates, logs and Flower's own files; made readable by its owner alone.
        nodes: how many; number i gets "partition-id" i and "num-partitions" in its node configuration.
        port: of the SuperLink; None takes a free one.
        node_ports: of the SuperNodes' own interfaces; None takes free ones.
        certificates: of the SuperLink for 127.0.0.1; None issues some for three days.
        start_limit: seconds until all must be up.
        environment: for all processes, beyond this one's own.

    Raises:
        BadInput: on entering: flwr is missing or of another version, the folder holds something, a port is taken, a
            certificate is missing, expired, for another host or of another key.
        DeploymentFailed: on entering: a process ended or was not ready in time.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        nodes: int = 3,
        port: int | None = None,
        node_ports: tuple[int, ...] | None = None,
        certificates: Certificates | None = None,
        start_limit: float = 180.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if nodes < 1:
            raise BadInput(f"nodes: {nodes} must be at least 1.")
        if node_ports is not None and len(node_ports) != nodes:
            raise BadInput(f"node_ports: {len(node_ports)} ports for {nodes} nodes; give one to each.")
        self.folder = Path(folder).resolve()
        self.nodes, self.start_limit = nodes, start_limit
        self._port, self._node_ports, self._certificates = port, node_ports, certificates
        self._environment = dict(environment or {})
        self.processes = Processes(self.folder, self.folder / "flwr-home")

    @property
    def address(self) -> str:
        """Of the SuperLink, "host:port"."""
        return f"{HOST}:{self._port}"

    @property
    def certificates(self) -> Certificates:
        """Of the SuperLink.

        Raises:
            BadInput: none were given, and the deployment has not started.
        """
        if self._certificates is None:
            raise BadInput("deployment: has no certificates before it starts.")
        return self._certificates

    def __enter__(self) -> Deployment:
        require_deployment()
        self._prepare()
        try:
            clock = WaitClock(self.start_limit, 0.3)
            self._start_superlink(clock)
            self._start_nodes(clock)
        except BaseException:
            self.processes.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, wrong: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.processes.stop()

    def run(
        self, plan: str, *, app: Path | None = None, limit: float = 3600.0, on_log: Callable[[str], None] | None = None
    ) -> FinishedRun:
        """Hands over a run and waits for its end.

        Args:
            plan: text of the plan, which the apps find in their run configuration under "plan".
            app: a Flower app folder; None for `frostglass.federated.flower.apps`.
            limit: seconds.
            on_log: gets what the server app prints.

        Raises:
            BadInput: the app folder is none.
            DeploymentFailed: the run failed, was stopped or took too long, or the SuperLink ended.
        """
        with Control(self.address, self.certificates.root) as control:
            try:
                return carried_out(control, bundle(app), plan, limit, on_log, self._watch)
            except DeploymentFailed as wrong:
                raise DeploymentFailed(f"{wrong}{self._lost()}") from None

    def online(self) -> int:
        """SuperNodes that the SuperLink believes to be there; it gives one that vanished up after a minute."""
        with Control(self.address, self.certificates.root) as control:
            return sum(node.status == "online" for node in control.nodes())

    def _prepare(self) -> None:
        folder = self.folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"folder: {folder} holds something already; name a new one.")
        for field, port in [("port", self._port), *[("node_ports", p) for p in self._node_ports or ()]]:
            if port is not None:
                require_free(HOST, port, field)
        if self._certificates is not None:
            check(self._certificates, HOST)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as wrong:
            raise BadInput(f"folder: {folder} cannot be written ({wrong.strerror}); name another one.") from None
        if self._certificates is None:
            self._certificates = issue(folder / "tls", LOOPBACK)
        self._port = self._port or free_port(HOST)

    def _start_superlink(self, clock: WaitClock) -> None:
        self.processes.start(
            SUPERLINK, "superlink",
            [
                "--host", HOST, "--port", str(self._port), *_tls(self.certificates),
                "--enable-supernode-auth", "--disable-runtime-dependency-installation",
            ],
            self._environment,
        )  # fmt: skip
        reason = ""
        while clock.tick():
            self.processes.require(SUPERLINK)
            try:
                with Control(self.address, self.certificates.root) as control:
                    control.nodes()
                return
            except (BadInput, DeploymentFailed) as wrong:
                reason = str(wrong)
        raise DeploymentFailed(f"the SuperLink was not ready after {clock.limit:.0f} s: {reason}")

    def _start_nodes(self, clock: WaitClock) -> None:
        # What a node's own processes tell each other stays on this machine, and speaks TLS of its own authority.
        inner = issue(self.folder / "node-tls", LOOPBACK)
        with Control(self.address, self.certificates.root) as control:
            for i in range(self.nodes):
                control.register(node_key(self.folder / "keys" / f"{node_name(i)}.key"), node_name(i))
                self.start_node(i, inner=inner)
            while clock.tick():
                for i in range(self.nodes):
                    self.processes.require(node_name(i))
                online = sum(node.status == "online" for node in control.nodes())
                if online == self.nodes:
                    return
        tails = "; ".join(f"{node_name(i)}: {last_line(self.processes.log(node_name(i)))}" for i in range(self.nodes))
        raise DeploymentFailed(f"{online} of {self.nodes} SuperNodes were online after {clock.limit:.0f} s ({tails})")

    def start_node(
        self, index: int, *, key: Path | None = None, root: Path | None = None, inner: Certificates | None = None,
        name: str | None = None,
    ) -> None:  # fmt: skip
        """Starts one SuperNode, also again after it was killed; does not wait for it.

        Args:
            index: its partition.
            key: with which it signs; None for the one registered for it.
            root: authority that it trusts; None for the SuperLink's.
            inner: certificates of its own interface; None for those of this deployment.
            name: of its log; None for "node-INDEX".
        """
        port = self._node_ports[index] if self._node_ports is not None else free_port(HOST)
        folder = self.folder / "node-tls"
        inner = inner or Certificates(folder / "ca.pem", folder / "server.pem", folder / "server-key.pem")
        self.processes.start(
            name or node_name(index), "supernode",
            [
                "--superlink", self.address, "--root-certificates", str(root or self.certificates.root),
                "--auth-supernode-private-key", str(key or self.folder / "keys" / f"{node_name(index)}.key"),
                "--host", HOST, "--port", str(port), *_tls(inner),
                "--node-config", f"partition-id={index} num-partitions={self.nodes}",
            ],
            self._environment,
        )  # fmt: skip

    def _watch(self) -> None:
        """A SuperNode that ended is the server's to get over; without the SuperLink there is no run."""
        for name in self._names():
            self.processes.ended(name)  # collects its status: its children wait for that to end themselves
        self.processes.require(SUPERLINK)

    def _names(self) -> list[str]:
        return [SUPERLINK, *(node_name(i) for i in range(self.nodes))]

    def _lost(self) -> str:
        """What has ended, for the end of a sentence about a failure."""
        gone = [name for name in self._names() if self.processes.ended(name) is not None]
        told = "; ".join(f"{name} has ended: {last_line(self.processes.log(name))}" for name in gone)
        return f" ({told})" if told else ""


def submit(
    plan: str,
    *,
    address: str,
    root_certificates: str | Path,
    app: Path | None = None,
    limit: float = 24 * 3600.0,
    on_log: Callable[[str], None] | None = None,
) -> FinishedRun:
    """Hands a run to a SuperLink that is there already, and waits for its end.

    Args:
        plan: text of the plan, which the apps find in their run configuration under "plan".
        address: "host:port" of the SuperLink.
        root_certificates: PEM file of the authority that certified it.
        app: a Flower app folder; None for `frostglass.federated.flower.apps`, which must be installed at the SuperLink
            and at every SuperNode.
        limit: seconds; a run that takes longer is stopped.
        on_log: gets what the server app prints.

    Raises:
        BadInput: flwr is missing or of another version, nothing answers at the address, its certificate is of another
            authority or for another host, the app folder is none.
        DeploymentFailed: the run failed, was stopped or took too long, or the connection broke.
    """
    require_deployment()
    with Control(address, Path(root_certificates)) as control:
        return carried_out(control, bundle(app), plan, limit, on_log)


def node_name(index: int) -> str:
    """Of a SuperNode, its log and its key."""
    return f"node-{index}"


def _tls(certificates: Certificates) -> list[str]:
    return [
        "--ssl-ca-certfile", str(certificates.root), "--ssl-certfile", str(certificates.certificate),
        "--ssl-keyfile", str(certificates.key),
    ]  # fmt: skip
