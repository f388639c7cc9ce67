"""ClientHellos that test the path: a visitor's and a CA validator's."""

from __future__ import annotations

import os
import re
import socket
import ssl
import struct
from typing import Final

from ..proxy.routing import ACME_TLS_1

ACME_HELLO_BYTES: Final = 1_700
"""The size of a validator's hello with an ML-KEM key share: real ones have 1,490 to 1,770 bytes,
more than a segment."""

TLS_ANSWERS: Final = (b"\x15\x03", b"\x16\x03")
"""The first bytes of an alert and of a ServerHello."""

_X25519MLKEM768: Final = 0x11EC
_MLKEM_SHARE_BYTES: Final = 1_216
_X25519: Final = 0x001D
_X25519_SHARE_BYTES: Final = 32

_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}(\.[A-Za-z0-9][A-Za-z0-9-]{0,62})*")


def server_name() -> str | None:
    """The host's name, if it can be sent in SNI (RFC 6066 section 3)."""
    name = socket.gethostname()
    return name if _HOST_NAME.fullmatch(name) else None


def tls_client(name: str | None, *alpn: str) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    """A client that accepts any certificate, with its incoming and outgoing bytes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(alpn)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    return context.wrap_bio(incoming, outgoing, server_hostname=name), incoming, outgoing


def visitor_hello(name: str | None) -> bytes:
    """An ordinary hello, made by OpenSSL."""
    client, _, outgoing = tls_client(name)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


def acme_hello(name: str | None) -> bytes:
    """A validator's hello, L{ACME_HELLO_BYTES} long (RFC 8446 section 4.1.2, RFC 8737 section
    3)."""
    shares = b"".join(
        struct.pack("!H", group) + _vector(2, os.urandom(size))
        for group, size in ((_X25519MLKEM768, _MLKEM_SHARE_BYTES), (_X25519, _X25519_SHARE_BYTES))
    )
    extensions = [
        _extension(0x0000, _vector(2, b"\x00" + _vector(2, (name or "localhost").encode()))),
        _extension(0x000A, _vector(2, struct.pack("!HH", _X25519MLKEM768, _X25519))),
        _extension(0x000D, _vector(2, bytes.fromhex("0804 0403 0807 0805 0503"))),
        _extension(0x0010, _vector(2, _vector(1, ACME_TLS_1))),
        _extension(0x002B, _vector(1, b"\x03\x04")),
        _extension(0x0033, _vector(2, shares)),
    ]
    bare = len(_hello([*extensions, _extension(0x0015, b"")]))
    padding = _extension(0x0015, bytes(max(0, ACME_HELLO_BYTES - bare)))  # RFC 7685
    return _hello([*extensions, padding])


def _hello(extensions: list[bytes]) -> bytes:
    body = b"\x03\x03" + os.urandom(32) + _vector(1, os.urandom(32))
    body += _vector(2, bytes.fromhex("1301 1303 1302")) + _vector(1, b"\x00")
    body += _vector(2, b"".join(extensions))
    return b"\x16\x03\x01" + _vector(2, b"\x01" + _vector(3, body))


def _extension(kind: int, content: bytes) -> bytes:
    return struct.pack("!H", kind) + _vector(2, content)


def _vector(width: int, content: bytes) -> bytes:
    return len(content).to_bytes(width, "big") + content
