"""Certificates, keys, ports and addresses of a deployment: what is refused before any process starts, and how."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import stat
import threading
import time
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'frostglass[flower]' brings it")

from frostglass.core.errors import BadInput
from frostglass.federated.flower import deployment_app
from frostglass.federated.flower.deployment import Deployment, submit
from frostglass.federated.flower.deployment_certificates import Certificates, check, issue, node_key
from frostglass.federated.flower.deployment_control import parse_address, reach
from frostglass.federated.flower.deployment_processes import free_port, last_line, require_free

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flower_deployment"


@pytest.fixture
def made(tmp_path: Path) -> Certificates:
    return issue(tmp_path / "tls")


def refused(wrong: pytest.ExceptionInfo[BadInput], *words: str) -> None:
    (problem,) = wrong.value.problems
    assert "\n" not in problem
    assert all(word in problem for word in words), problem


# ---- certificates and keys


def test_what_is_issued_is_private_and_a_client_accepts_it(made: Certificates) -> None:
    for host in ("127.0.0.1", "localhost"):
        check(made, host)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (made.root, made.certificate, made.key)} == {0o600}
    assert stat.S_IMODE(made.root.parent.stat().st_mode) == 0o700


def test_a_node_key_is_one_that_flower_reads_and_registers(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes, uses_nist_ec_curve

    public = node_key(tmp_path / "node.key")
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    private = load_ssh_private_key((tmp_path / "node.key").read_bytes(), None)
    assert public_key_to_bytes(private.public_key()) == public
    assert try_load_public_key(tmp_path / "node.pub") == public
    assert uses_nist_ec_curve(bytes_to_public_key(public))


@pytest.mark.parametrize("field", ["root", "certificate", "key"])
def test_a_missing_file_is_named(made: Certificates, field: str) -> None:
    path: Path = getattr(made, field)
    path.unlink()
    with pytest.raises(BadInput) as wrong:
        check(made, "127.0.0.1")
    refused(wrong, field, str(path), "is missing")


@pytest.mark.parametrize("field", ["root", "certificate", "key"])
def test_a_file_that_is_no_pem_is_named(made: Certificates, field: str) -> None:
    path: Path = getattr(made, field)
    path.write_text("not a certificate\n")
    with pytest.raises(BadInput) as wrong:
        check(made, "127.0.0.1")
    refused(wrong, str(path), "PEM")


def test_an_expired_certificate_is_refused_with_its_date(tmp_path: Path) -> None:
    old = issue(tmp_path / "old", days=-1 / 1000)
    with pytest.raises(BadInput) as wrong:
        check(old, "127.0.0.1")
    refused(wrong, "expired on", time.strftime("%Y-", time.gmtime(time.time() - 87)), "issue a new one")


def test_a_certificate_for_another_host_is_refused(tmp_path: Path) -> None:
    other = issue(tmp_path / "other", hosts=("superlink.example", "192.0.2.7"))
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(BadInput) as wrong:
            check(other, host)
        refused(wrong, "superlink.example, 192.0.2.7", f"not for {host}")


def test_the_key_of_another_certificate_is_refused(made: Certificates, tmp_path: Path) -> None:
    mixed = dataclasses.replace(made, key=issue(tmp_path / "other").key)
    with pytest.raises(BadInput) as wrong:
        check(mixed, "127.0.0.1")
    refused(wrong, "key:", "is not the key of")


def test_another_authority_is_refused(made: Certificates, tmp_path: Path) -> None:
    mixed = dataclasses.replace(made, root=issue(tmp_path / "other").root)
    with pytest.raises(BadInput) as wrong:
        check(mixed, "127.0.0.1")
    refused(wrong, "is not signed by", str(mixed.root))


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(made: Certificates) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(made.key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    made.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)  # type: ignore[union-attr]
    )
    with pytest.raises(BadInput) as wrong:
        check(made, "127.0.0.1")
    refused(wrong, str(made.key), "without a password")


# ---- ports, folders, addresses


def test_a_port_in_use_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadInput) as wrong:
            Deployment(tmp_path / "new", port=port).__enter__()
        refused(wrong, f"port {port} on 127.0.0.1", "in use")
        with pytest.raises(BadInput) as wrong:
            Deployment(tmp_path / "new", nodes=2, node_ports=(free_port("127.0.0.1"), port)).__enter__()
        refused(wrong, "node_ports", f"port {port}")
    assert not (tmp_path / "new").exists()
    require_free("127.0.0.1", port, "port")


@pytest.mark.parametrize("port", [0, -1, 70000])
def test_what_is_no_port_is_refused(tmp_path: Path, port: int) -> None:
    with pytest.raises(BadInput, match="is no port"):
        Deployment(tmp_path / "new", port=port).__enter__()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="holds something already"):
        Deployment(tmp_path).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_certificates_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    given = issue(tmp_path / "tls", hosts=("elsewhere.example",))
    with pytest.raises(BadInput, match=r"not for 127\.0\.0\.1"):
        Deployment(tmp_path / "new", certificates=given).__enter__()
    assert not (tmp_path / "new").exists()


def test_numbers_of_nodes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nodes: 0"):
        Deployment(tmp_path, nodes=0)
    with pytest.raises(BadInput, match="2 ports for 3 nodes"):
        Deployment(tmp_path, nodes=3, node_ports=(1, 2))


@pytest.mark.parametrize(
    "text", ["", "127.0.0.1", "host:", "host:0", "host:70000", "https://host:1", ":9093", "host:x"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is not host:port"):
        parse_address(text)


def test_addresses_are_taken_apart() -> None:
    assert parse_address("superlink.example:9093") == ("superlink.example", 9093)
    assert parse_address("[::1]:9093") == ("::1", 9093)


# ---- submitting


def test_submitting_where_nothing_answers(made: Certificates) -> None:
    with pytest.raises(BadInput) as wrong:
        submit("", address=f"127.0.0.1:{free_port('127.0.0.1')}", root_certificates=made.root)
    refused(wrong, "address", "nothing answers", "refused")


def test_submitting_with_a_missing_root(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as wrong:
        submit("", address="127.0.0.1:9", root_certificates=tmp_path / "none.pem")
    refused(wrong, "root_certificates", "none.pem is missing")


def test_submitting_to_what_speaks_no_tls(made: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            plain, _ = server.accept()
            with plain:
                plain.recv(4096)
                plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(BadInput) as wrong:
            reach(f"127.0.0.1:{server.getsockname()[1]}", made.root)
        thread.join(10)
    refused(wrong, "speaks no TLS")


# ---- the app


def test_the_example_is_the_app_that_is_submitted() -> None:
    example = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))
    assert example == tomllib.loads(deployment_app.DESCRIPTION)


def test_bundles_are_made_of_the_package_and_of_a_folder() -> None:
    import io
    import zipfile

    for app in (None, EXAMPLE):
        names = set(zipfile.ZipFile(io.BytesIO(deployment_app.bundle(app))).namelist())
        assert {"pyproject.toml", "LICENSE"} <= names


def test_the_apps_that_the_description_names_exist() -> None:
    from importlib import import_module

    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    parts = tomllib.loads(deployment_app.DESCRIPTION)["tool"]["flwr"]["app"]["components"]
    for part, kind in (("clientapp", ClientApp), ("serverapp", ServerApp)):
        module, name = parts[part].split(":")
        assert isinstance(getattr(import_module(module), name), kind)


def test_a_folder_that_is_no_app_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no pyproject\.toml"):
        deployment_app.bundle(tmp_path)
    shutil.copy(EXAMPLE / "pyproject.toml", tmp_path)  # without its licence
    with pytest.raises(BadInput) as wrong:
        deployment_app.bundle(tmp_path)
    refused(wrong, "is no Flower app", "license.file")


def test_without_psutil_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment_app.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"frostglass\[flower\]"):
        deployment_app.require_deployment()


# ---- logs


def test_the_last_line_is_the_one_that_tells(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    assert last_line(log) == "node.log has not been written"
    log.write_text("")
    assert last_line(log) == "node.log is empty"
    log.write_text("\x1b[92mINFO \x1b[0m: started\n\x1b[91mERROR \x1b[0m: no route\nINFO: shutdown\n=====\n\n")
    assert last_line(log) == "ERROR : no route"
    log.write_bytes(b"INFO: one\n" + os.urandom(4) + b"\nINFO: two\n----\n")
    assert last_line(log) == "INFO: two"
