"""A visitor's first bytes: the parser."""

from __future__ import annotations

import random
import tempfile
import time
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from OpenSSL import SSL

from acme_alpn_proxy.proxy.clienthello import (
    MAX_SERVER_NAME,
    NEED_MORE,
    ClientHello,
    ClientHelloParser,
    NotClientHello,
    Verdict,
)
from acme_alpn_proxy.proxy.routing import ACME_TLS_1

from ... import hellos
from ...integration.pki import Authority

SEEDS = [
    *(case.data for case in hellos.corpus()[::8] if len(case.data) < 4_096),
    hellos.records(hellos.padded_message(2_000, hellos.alpn_extension(b"h2", ACME_TLS_1)), 1),
    hellos.records(hellos.padded_message(40_000, hellos.alpn_extension(ACME_TLS_1)), 33),
]

_BYTEWISE = 500
"""Bytes of the longest input that is also fed byte by byte."""


def check(data: bytes) -> None:
    """The parser raises nothing. Its verdict is the same, however the bytes are cut into pieces. It
    sends to the ACME client only what OpenSSL accepts as a hello with the ACME name. Its time is
    linear in the number of bytes and pieces."""
    whole = _parse(data, b"")
    rng = random.Random(zlib.crc32(data))
    at = rng.randrange(len(data) + 1)
    bytewise = [data[at : at + 1] for at in range(len(data))]
    for pieces in (
        [data[:at], data[at:]],
        bytewise if len(data) <= _BYTEWISE else _cut(data, rng),
    ):
        assert _parse(data, b"", pieces) == whole, "another cut, another verdict"
    acme = _offers(whole)
    assert _offers(_parse(data, ACME_TLS_1)) == acme, "another verdict where a name is looked for"
    if isinstance(whole, ClientHello) and whole.server_name is not None:
        assert len(whole.server_name) <= 4 * MAX_SERVER_NAME
        assert whole.server_name.isascii()
        assert whole.server_name.isprintable()
    offered = _offered_to_openssl(data)
    if acme:
        assert offered is None or ACME_TLS_1 in offered, "to the ACME client, but OpenSSL differs"
    elif offered and ACME_TLS_1 in offered:
        assert isinstance(whole, NotClientHello), "to the web server, but OpenSSL differs"


def _parse(data: bytes, name: bytes, pieces: Sequence[bytes] | None = None) -> Verdict:
    """The verdict; the cost is linear in bytes and pieces."""
    pieces = [data] if pieces is None else pieces
    limit = 0.005 + len(data) * 2e-7 + len(pieces) * 1e-4
    for _ in range(5):
        parser, began = ClientHelloParser(name), time.process_time()
        verdict: Verdict = NEED_MORE
        for piece in pieces:
            before, verdict = verdict, parser.feed(piece)
            assert before is NEED_MORE or verdict is before, "a verdict changes"
        spent = time.process_time() - began
        if spent < limit:
            break
    else:
        raise AssertionError(f"{spent} s of CPU for {len(data)} bytes in {len(pieces)} pieces")
    assert bytes(parser.received) == data, "what is replayed is not what came"
    return verdict


def _cut(data: bytes, rng: random.Random) -> list[bytes]:
    pieces = []
    while data:
        size = rng.choice((1, 2, 5, 50, 500, 500, 500))
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def _offers(verdict: Verdict) -> bool:
    return isinstance(verdict, ClientHello) and ACME_TLS_1 in verdict.alpn


def _offered_to_openssl(data: bytes) -> list[bytes] | None:
    """The names that a server of OpenSSL's finds; C{None} if it does not take the hello."""
    context, names = _server()
    names.clear()
    connection = SSL.Connection(context, None)
    connection.set_accept_state()
    try:
        connection.bio_write(data)
        connection.do_handshake()
    except SSL.Error:
        pass
    try:
        answer = connection.bio_read(5)
    except SSL.Error:
        answer = b""
    goes_on = answer[:1] == b"\x16"
    return list(names) if names or goes_on else None


@cache
def _server() -> tuple[SSL.Context, list[bytes]]:
    """A server, and where it puts the names that it was offered last."""
    names: list[bytes] = []

    def choose(connection: SSL.Connection, offered: list[bytes]) -> SSL._NoOverlappingProtocols:
        names[:] = offered
        return SSL.NO_OVERLAPPING_PROTOCOLS

    context = SSL.Context(SSL.TLS_METHOD)
    with tempfile.TemporaryDirectory() as directory:
        pair = Authority(Path(directory)).issue("site", "site.example")
        context.use_certificate_file(str(pair.certificate))
        context.use_privatekey_file(str(pair.key))
    context.set_alpn_select_callback(choose)
    return context, names
