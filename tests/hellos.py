"""ClientHellos for tests: real ones by pyOpenSSL, the corpus, and hand-made ones."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from OpenSSL import SSL

CORPUS = Path(__file__).parent / "data" / "clienthellos.jsonl"


@dataclass(frozen=True)
class Case:
    """One line of the corpus; see C{tests/data/README.md}."""

    id: str
    data: bytes
    accept: tuple[str, ...]
    alpn: tuple[bytes, ...] | None
    sni: str | None
    disputed: bool


def _name(text: str) -> bytes:
    return bytes.fromhex(text[4:]) if text.startswith("hex:") else text.encode()


@cache
def corpus() -> tuple[Case, ...]:
    """All cases, in file order."""
    cases = []
    for line in CORPUS.read_text().splitlines():
        raw = json.loads(line)
        alpn = None if raw["alpn"] is None else tuple(map(_name, raw["alpn"]))
        cases.append(
            Case(
                raw["id"],
                bytes.fromhex(raw["hex"]),
                tuple(raw["accept"]),
                alpn,
                raw["sni"],
                raw["disputed"],
            )
        )
    return tuple(cases)


def openssl_hello(*alpn: bytes, server_name: bytes | None = None) -> bytes:
    """A ClientHello that OpenSSL writes to a memory BIO."""
    context = SSL.Context(SSL.TLS_METHOD)
    if alpn:
        context.set_alpn_protos(list(alpn))
    connection = SSL.Connection(context, None)
    if server_name is not None:
        connection.set_tlsext_host_name(server_name)
    connection.set_connect_state()
    try:
        connection.do_handshake()
    except SSL.WantReadError:
        pass
    return connection.bio_read(65_536)


def vector(width: int, content: bytes) -> bytes:
    """C{content} with its length in C{width} bytes before it (RFC 8446 section 3.4)."""
    return len(content).to_bytes(width, "big") + content


def extension(kind: int, content: bytes) -> bytes:
    """One extension (RFC 8446 section 4.2)."""
    return struct.pack("!H", kind) + vector(2, content)


def alpn_extension(*names: bytes) -> bytes:
    """The ALPN extension (RFC 7301 section 3.1)."""
    return extension(16, vector(2, b"".join(vector(1, name) for name in names)))


def message(*extensions: bytes, session_id: bytes = b"", suites: bytes = b"\x13\x01") -> bytes:
    """A ClientHello handshake message with these extensions."""
    body = bytes(2 + 32) + vector(1, session_id) + vector(2, suites) + vector(1, b"\x00")
    body += vector(2, b"".join(extensions))
    return b"\x01" + vector(3, body)


def records(handshake: bytes, size: int = 16_384) -> bytes:
    """C{handshake} in records of C{size} bytes."""
    return b"".join(
        b"\x16\x03\x01" + vector(2, handshake[at : at + size])
        for at in range(0, len(handshake), size)
    )


def padded_message(total: int, *extensions: bytes) -> bytes:
    """A ClientHello with a body of C{total} bytes, padded with a few private extensions."""
    short = len(message(*extensions)) - 4
    padding, left, kind = [], total - short, 0xFF01
    while left:
        chunk = min(left, 30_000)
        if 0 < left - chunk < 4:
            chunk -= 4
        padding.append(extension(kind, bytes(chunk - 4)))
        left -= chunk
        kind += 1
    whole = message(*padding, *extensions)
    assert len(whole) - 4 == total
    return whole


ACME_HELLO = openssl_hello(b"acme-tls/1", server_name=b"site.example")
WEB_HELLO = openssl_hello(b"h2", b"http/1.1", server_name=b"site.example")
