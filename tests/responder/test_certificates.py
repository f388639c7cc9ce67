"""Challenge certificates, and the faults of others."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from acme_alpn_proxy.responder.certificates import (
    ACME_IDENTIFIER,
    ChallengeCertificates,
    UnusableFile,
    context_from_folder,
    faults,
    general_name,
)

DIGEST = hashlib.sha256(b"key authorization").digest()
NAME = "site.example"
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
OCTETS = b"\x04\x20" + DIGEST


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certificate(
    names: list[x509.GeneralName] | None = None,
    acme: bytes | None = OCTETS,
    critical: bool = True,
    issuer: str = "one",
    key: Any = None,
    signer: Any = None,
) -> x509.Certificate:
    """A correct challenge certificate, except for the given changes."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder(_name(issuer), _name("one"), key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
    )
    if names is None:
        names = [x509.DNSName(NAME)]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if acme is not None:
        value = x509.UnrecognizedExtension(ACME_IDENTIFIER, acme)
        builder = builder.add_extension(value, critical=critical)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(signer or key, algorithm)


@pytest.mark.parametrize("identifier", [NAME, "192.0.2.7", "2001:db8::1", f"{'a' * 63}.{'b' * 63}"])
def test_made_here(identifier: str) -> None:
    """A certificate made here has no fault, also for names too long for a common name."""
    made = ChallengeCertificates().certificate(identifier, DIGEST)
    assert list(faults(made, identifier, DIGEST)) == []
    assert list(faults(made, identifier, None)) == []
    assert identifier not in made.subject.rfc4514_string()


def test_right() -> None:
    """Any other correct certificate has no fault either, also with an RSA key."""
    assert list(faults(certificate(), NAME, DIGEST)) == []
    key = rsa.generate_private_key(65_537, 2_048)
    assert list(faults(certificate(key=key), NAME, DIGEST)) == []


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: certificate(issuer="another"), "not self-signed"),
        (lambda: certificate(signer=ec.generate_private_key(ec.SECP256R1())), "signature"),
        (lambda: certificate(key=ed25519.Ed25519PrivateKey.generate()), "signature"),
        (lambda: certificate(names=[]), "no subjectAltName"),
        (lambda: certificate(names=[x509.DNSName("other.example")]), "other.example"),
        (lambda: certificate(names=[x509.DNSName(NAME.upper())]), "SITE.EXAMPLE"),
        (lambda: certificate(names=[x509.DNSName(NAME)] * 2), "alone"),
        (lambda: certificate(names=[general_name("192.0.2.7")]), "192.0.2.7"),
        (lambda: certificate(acme=None), "no acmeIdentifier"),
        (lambda: certificate(critical=False), "not critical"),
        (lambda: certificate(acme=DIGEST), "OCTET STRING"),
        (lambda: certificate(acme=OCTETS + b"\0"), "OCTET STRING"),
        (lambda: certificate(acme=b"\x04\x20" + bytes(32)), "another key authorization"),
    ],
)
def test_fault(make: Callable[[], x509.Certificate], fault: str) -> None:
    """For each broken rule of a CA there is a fault, and only that one."""
    (told,) = faults(make(), NAME, DIGEST)
    assert fault in told


def test_extension_twice() -> None:
    """An extension that comes twice is a fault (Boulder refuses it, pebble does not)."""
    builder = x509.CertificateBuilder()
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), False)
    builder._extensions *= 2
    key = ec.generate_private_key(ec.SECP256R1())
    twice = (
        builder.subject_name(_name("one"))
        .issuer_name(_name("one"))
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .sign(key, hashes.SHA256())
    )
    (told,) = faults(twice, NAME, DIGEST)
    assert "twice" in told


def _write(folder: Path, made: x509.Certificate, key: Any, name: str = NAME) -> None:
    pem = serialization.Encoding.PEM
    (folder / f"{name}.crt.pem").write_bytes(made.public_bytes(pem))
    (folder / f"{name}.key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def test_folder(tmp_path: Path) -> None:
    """A client's files are found by name; a name that is a path finds none; for files that do not
    belong together there is an error."""
    key = ec.generate_private_key(ec.SECP256R1())
    _write(tmp_path, certificate(key=key), key)
    assert isinstance(context_from_folder(tmp_path, NAME), SSL.Context)
    inner = tmp_path / "inner"
    inner.mkdir()
    assert context_from_folder(inner, f"../{NAME}") is None
    assert context_from_folder(inner, NAME) is None
    _write(inner, certificate(), key)
    with pytest.raises(UnusableFile, match="certificate and key"):
        context_from_folder(inner, NAME)
    (inner / f"{NAME}.key.pem").unlink()
    with pytest.raises(UnusableFile):
        context_from_folder(inner, NAME)
    with pytest.raises(UnusableFile, match="No such file"):
        context_from_folder(tmp_path / "none", NAME)
