"""Challenge certificates (RFC 8737 section 3), made here or read from a folder, and their rules.

The rules are those of Boulder, Let's Encrypt's CA, which is stricter than the RFC in places.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.x509.oid import NameOID, ObjectIdentifier
from OpenSSL import SSL, crypto

from ..proxy.routing import ACME_TLS_1

ACME_IDENTIFIER: Final = ObjectIdentifier("1.3.6.1.5.5.7.1.31")
"""id-pe-acmeIdentifier (RFC 8737 section 3)."""

_OCTET_STRING: Final = b"\x04\x20"
"""The DER header of an OCTET STRING with 32 bytes."""

_SUBJECT: Final = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "TLS-ALPN-01 challenge")])
"""The subject of every certificate. It does not have the identifier, because a common name has at
most 64 characters (RFC 5280, ub-common-name)."""

_VALID_FROM: Final = datetime.timedelta(days=1)
_VALID_UNTIL: Final = datetime.timedelta(days=7)
"""The dates do not matter to a CA; clocks may differ, and the certificate is used for less than a
day."""


def general_name(identifier: str) -> x509.GeneralName:
    """The only entry of the certificate's subjectAltName."""
    try:
        return x509.IPAddress(ipaddress.ip_address(identifier))
    except ValueError:
        return x509.DNSName(identifier)


class ChallengeCertificates:
    """Makes all certificates with the same key, which exists as long as the process."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    def certificate(self, identifier: str, digest: bytes) -> x509.Certificate:
        """The certificate that answers the challenge of C{identifier}.

        @param digest: SHA-256 of the key authorization, 32 bytes.
        """
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder(_SUBJECT, _SUBJECT, self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _VALID_FROM)
            .not_valid_after(now + _VALID_UNTIL)
            .add_extension(x509.SubjectAlternativeName([general_name(identifier)]), critical=False)
            .add_extension(
                x509.UnrecognizedExtension(ACME_IDENTIFIER, _OCTET_STRING + digest), critical=True
            )
            .sign(self._key, hashes.SHA256())
        )

    def context(self, identifier: str, digest: bytes) -> SSL.Context:
        """The TLS context of the server in a validation of C{identifier}."""
        context = _context()
        context.use_certificate(crypto.X509.from_cryptography(self.certificate(identifier, digest)))
        context.use_privatekey(crypto.PKey.from_cryptography_key(self._key))
        return context


@functools.cache
def own_certificates() -> ChallengeCertificates:
    """The only L{ChallengeCertificates} of this process."""
    return ChallengeCertificates()


class UnusableFile(Exception):
    """A certificate or key in the folder cannot be used; the message says which, and why."""


def context_from_folder(folder: Path, server_name: str) -> SSL.Context | None:
    """The TLS context with a certificate that an ACME client has put into C{folder}, in
    dehydrated's layout: C{NAME.crt.pem} and C{NAME.key.pem}.

    @return: L{None} if there is no certificate for C{server_name}.

    Raises L{UnusableFile}.
    """
    try:
        # The name is compared with the existing files: a path is never made from what a peer sends.
        for file in folder.iterdir():
            if file.name == f"{server_name}.crt.pem":
                context = _context()
                context.use_certificate_chain_file(str(file))
                context.use_privatekey_file(str(folder / f"{server_name}.key.pem"))
                return context
    except OSError as problem:
        raise UnusableFile(f"{problem.filename}: {problem.strerror}") from None
    except SSL.Error as problem:
        raise UnusableFile(f"certificate and key of {server_name}: {in_words(problem)}") from None
    return None


def in_words(problem: BaseException | None) -> str:
    """The reasons from OpenSSL, whose errors hold tuples of library, function and reason."""
    if isinstance(problem, SSL.Error) and problem.args and problem.args[0]:
        return ", ".join(str(words[-1]) for words in problem.args[0])
    return str(problem)


def _context() -> SSL.Context:
    """TLS 1.2 and 1.3, only C{acme-tls/1}, no session resumption (RFC 8737 section 3)."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)
    context.set_alpn_select_callback(_choose_acme)
    return context


def _choose_acme(connection: object, offered: list[bytes]) -> Any:
    return ACME_TLS_1 if ACME_TLS_1 in offered else SSL.NO_OVERLAPPING_PROTOCOLS


def faults(certificate: x509.Certificate, identifier: str, digest: bytes | None) -> Iterator[str]:
    """The faults for which a CA would refuse a challenge certificate, in words; none if it is
    right.

    The rules are those of Boulder's C{va/tlsalpn.go}: self-signed, each extension once, one
    subjectAltName with only the identifier, a critical acmeIdentifier.

    @param digest: L{None} if the digest is unknown; then any digest is accepted.
    """
    if certificate.issuer.public_bytes() != certificate.subject.public_bytes():
        yield "issuer and subject differ: it is not self-signed"
    elif not _is_signed_by_itself(certificate):
        yield "its signature is not made with its own key"
    try:
        extensions = certificate.extensions
    except x509.DuplicateExtension as problem:
        yield f"an extension comes twice: {problem.oid.dotted_string}"
        return
    except ValueError as problem:
        yield f"its extensions cannot be read: {problem}"
        return
    yield from _faults_of_names(extensions, identifier)
    yield from _faults_of_digest(extensions, digest)


def _faults_of_names(extensions: x509.Extensions, identifier: str) -> Iterator[str]:
    try:
        names = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        yield "it has no subjectAltName"
        return
    if names != [general_name(identifier)]:
        shown = ", ".join(str(name.value) for name in names)
        yield f"its subjectAltName is {shown or 'empty'}, not {identifier} alone"


def _faults_of_digest(extensions: x509.Extensions, digest: bytes | None) -> Iterator[str]:
    try:
        extension = extensions.get_extension_for_oid(ACME_IDENTIFIER)
    except x509.ExtensionNotFound:
        yield "it has no acmeIdentifier: it is a web server's, and answers no challenge"
        return
    if not extension.critical:
        yield "its acmeIdentifier is not critical"
    assert isinstance(extension.value, x509.UnrecognizedExtension)
    value = extension.value.value
    if len(value) != len(_OCTET_STRING) + 32 or not value.startswith(_OCTET_STRING):
        yield "its acmeIdentifier is no OCTET STRING of 32 bytes"
    elif digest is not None and value[len(_OCTET_STRING) :] != digest:
        yield "its acmeIdentifier is for another key authorization"


def _is_signed_by_itself(certificate: x509.Certificate) -> bool:
    key = certificate.public_key()
    algorithm = certificate.signature_hash_algorithm
    signed = (certificate.signature, certificate.tbs_certificate_bytes)
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            assert algorithm is not None
            key.verify(*signed, ec.ECDSA(algorithm))
        elif isinstance(key, rsa.RSAPublicKey):
            assert algorithm is not None
            key.verify(*signed, PKCS1v15(), algorithm)
        else:
            return False
    except InvalidSignature:
        return False
    return True
