"""Certificates and node keys of a deployment: made for a trial on one machine, and checked wherever they come from."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from frostglass.core.errors import BadInput

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

LOOPBACK = ("127.0.0.1", "localhost")
_EXPIRED, _NOT_YET, _OTHER_NAME, _OTHER_ADDRESS = 10, 9, 62, 64  # X509_V_ERR_* of OpenSSL


@dataclass(frozen=True)
class Certificates:
    """What a SuperLink speaks TLS with; PEM files.

    Args:
        root: certificate of the authority, which every SuperNode and everybody who submits must hold.
        certificate: of the server, for the host names and addresses that clients use.
        key: of that certificate, readable by its owner alone.
    """

    root: Path
    certificate: Path
    key: Path


def issue(folder: Path, hosts: tuple[str, ...] = LOOPBACK, days: float = 3) -> Certificates:
    """A new authority and a server certificate of it, P-256, for trials; the authority's key is forgotten at once.

    Args:
        folder: gets ca.pem, server.pem and server-key.pem, each readable by its owner alone.
        hosts: names and addresses that the server will be called by.
        days: until both expire.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = (
        _builder("Frostglass trial authority", "Frostglass trial authority", authority_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    server = (
        _builder(hosts[0], "Frostglass trial authority", server_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server-key.pem")
    _write_private(made.root, _pem(authority))
    _write_private(made.certificate, _pem(server))
    _write_private(made.key, _key_pem(server_key))
    return made


def node_key(path: Path) -> bytes:
    """A new P-384 key of a SuperNode; the public key as PEM.

    Args:
        path: gets the private key, in OpenSSH's format and readable by its owner alone; the public one lies beside it
            as `.pub`, as `flwr supernode register` wants it.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key()
    _write_private(path, private)
    _write_private(
        path.with_suffix(".pub"),
        public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n",
    )
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def check(certificates: Certificates, host: str) -> None:
    """Lets a TLS client that trusts the root meet a server with this certificate, in memory.

    Args:
        certificates: files of any origin.
        host: name or address that clients will use.

    Raises:
        BadInput: a file is missing or unreadable, the key is of another certificate, or a client would refuse it
            (expired, for another host, signed by another authority).
    """
    server = _serving(certificates)
    client = trusting(certificates.root, "root")
    try:
        _meet(server, client, host)
    except ssl.SSLCertVerificationError as wrong:
        raise BadInput(_refusal(certificates, host, wrong)) from None
    except ssl.SSLError as wrong:
        raise BadInput(
            f"certificate: no TLS can be spoken with {certificates.certificate} ({reason(wrong)})."
        ) from None


def trusting(root: Path, field: str) -> ssl.SSLContext:
    """A client's settings that trust this authority and no other.

    Args:
        root: certificates in PEM.
        field: what the sentence calls it.

    Raises:
        BadInput: the file is missing or holds no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with _readable(field, root):
        context.load_verify_locations(cafile=str(root))
    return context


def reason(wrong: ssl.SSLError) -> str:
    """OpenSSL's words without its bookkeeping."""
    return (getattr(wrong, "verify_message", "") or wrong.reason or str(wrong)).lower().replace("_", " ")


def _serving(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with _readable("certificate", certificates.certificate):
        certificates.certificate.read_bytes()
    with _readable("key", certificates.key):
        certificates.key.read_bytes()
    try:
        # An empty password: a key that asks for one would otherwise be asked for on the terminal.
        context.load_cert_chain(certificates.certificate, certificates.key, password="")
    except ssl.SSLError as wrong:
        if wrong.reason == "KEY_VALUES_MISMATCH":
            raise BadInput(
                f"key: {certificates.key} is not the key of {certificates.certificate}; name the key it was made with."
            ) from None
        raise BadInput(
            f"certificate: {certificates.certificate} and {certificates.key} are no certificate and key in PEM "
            f"without a password ({reason(wrong)}); convert them."
        ) from None
    return context


@contextmanager
def _readable(field: str, path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise BadInput(f"{field}: {path} is missing; name the PEM file, or leave it out for a trial's own.") from None
    except OSError as wrong:  # an SSLError is one, too
        words = reason(wrong) if isinstance(wrong, ssl.SSLError) else wrong.strerror or str(wrong)
        raise BadInput(f"{field}: {path} cannot be read as PEM ({words}); name another file.") from None


def _meet(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> None:
    """A whole handshake without a network."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    waiting = list(ends)
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass


def _refusal(certificates: Certificates, host: str, wrong: ssl.SSLCertVerificationError) -> str:
    from cryptography import x509

    name = certificates.certificate
    held = x509.load_pem_x509_certificates(name.read_bytes())[0]
    if wrong.verify_code == _EXPIRED:
        root = x509.load_pem_x509_certificates(certificates.root.read_bytes())[0]
        old = "root" if root.not_valid_after_utc < datetime.now(UTC) else "certificate"
        path, until = (certificates.root, root) if old == "root" else (name, held)
        return f"{old}: {path} expired on {until.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; issue a new one."
    if wrong.verify_code == _NOT_YET:
        return (
            f"certificate: {name} is not valid before {held.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; check the clock."
        )
    if wrong.verify_code in (_OTHER_NAME, _OTHER_ADDRESS):
        return f"certificate: {name} is for {_hosts(held)}, not for {host}; issue one for {host}."
    return (
        f"certificate: {name} is not signed by {certificates.root} ({reason(wrong)}); name the root it was signed by."
    )


def _hosts(held: x509.Certificate) -> str:
    from cryptography import x509

    try:
        names = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "no host at all"
    return ", ".join(str(name.value) for name in names) or "no host at all"


def _builder(subject: str, issuer: str, public: ec.EllipticCurvePublicKey, days: float) -> x509.CertificateBuilder:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    def called(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(called(subject))
        .issuer_name(called(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks of two machines differ a little
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_private(path: Path, content: bytes) -> None:
    """Mode 600 from the first byte on; refuses to overwrite."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as out:
        out.write(content)
