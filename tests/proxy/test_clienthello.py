"""The parser against the corpus, OpenSSL, hand-made hellos and Hypothesis."""

from __future__ import annotations

import itertools
import random
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from acme_alpn_proxy.proxy.clienthello import (
    MAX_MESSAGE,
    MAX_RECORDS,
    NEED_MORE,
    OTHER,
    ClientHello,
    ClientHelloParser,
    NotClientHello,
    Verdict,
)
from acme_alpn_proxy.proxy.routing import ACME_TLS_1

from .. import hellos

ACME_HELLO = hellos.openssl_hello(b"h2", ACME_TLS_1, server_name=b"site.example")
TOO_MANY = NotClientHello("no whole message in 2048 records")


def parse(*pieces: bytes) -> Verdict:
    """The verdict after all pieces; a parser that looks only for the ACME name agrees with it."""
    parser, looking = ClientHelloParser(), ClientHelloParser(ACME_TLS_1)
    for piece in pieces:
        parser.feed(piece)
        looking.feed(piece)
    assert bytes(parser.received) == bytes(looking.received) == b"".join(pieces)
    assert answer(looking.verdict) == answer(parser.verdict)
    return parser.verdict


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    """C{data} in pieces of random sizes."""
    pieces = []
    while data:
        size = rng.choice((1, 2, 3, 5, 50, 500, 5_000))
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def answer(verdict: Verdict) -> str:
    """The verdict in the corpus's words."""
    if verdict is NEED_MORE:
        return "incomplete"
    if isinstance(verdict, ClientHello) and ACME_TLS_1 in verdict.alpn:
        return "acme"
    return "fallback"


def test_corpus() -> None:
    """Every case gets an answer in its C{accept}: whole, byte by byte, in random pieces."""
    rng = random.Random(8737)
    mismatches = []
    assert len(hellos.corpus()) >= 1_200
    for case in hellos.corpus():
        whole = parse(case.data)
        if answer(whole) not in case.accept:
            mismatches.append((case.id, whole))
        assert parse(*bytewise(case.data)) == whole, case.id
        for _ in range(3):
            assert parse(*cut(case.data, rng)) == whole, case.id
    assert mismatches == []


def test_corpus_contents() -> None:
    """If the oracle reports an ALPN list and a server name, the parser finds the same."""
    checked = 0
    for case in hellos.corpus():
        verdict = parse(case.data)
        if isinstance(verdict, ClientHello) and case.alpn is not None and not case.disputed:
            name = case.sni and case.sni.encode("unicode_escape").decode()
            assert (verdict.alpn, verdict.server_name) == (case.alpn, name), case.id
            checked += 1
    assert checked > 200


def test_openssl_hello() -> None:
    """For a hello by OpenSSL, the parser returns its ALPN list in order and its server name."""
    assert parse(ACME_HELLO) == ClientHello((b"h2", b"acme-tls/1"), "site.example")
    assert parse(hellos.openssl_hello()) == ClientHello()


def test_bytes_after_the_hello_are_left_alone() -> None:
    """Bytes after the hello change nothing, however many, and are kept for the replay."""
    verdict = parse(ACME_HELLO)
    assert parse(ACME_HELLO + b"\x14\x03\x03\x00\x01\x01") == verdict
    assert parse(ACME_HELLO, bytes(MAX_MESSAGE)) == verdict
    assert parse(ACME_HELLO + bytes(MAX_MESSAGE)) == verdict


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"G", "not a handshake record"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not a handshake record"),
        (b"\x15\x03\x01\x00\x02\x02\x28", "not a handshake record"),
        (b"\x16\x02", "record version is not 3.x"),
        (b"\x16\x03\x01\x00\x00", "record length is 0"),
        (b"\x16\x03\x01\x40\x01", "record length is 16385"),
        (b"\x16\x03\x01\x00\x04\x02", "handshake message type is 2"),
        (b"\x16\x03\x01\x00\x04\x01\x01\x00\x01", "message length is 65537"),
    ],
)
def test_decided_at_once(data: bytes, reason: str) -> None:
    """Bytes that cannot become a hello are rejected at the first byte that shows it."""
    assert parse(data) == NotClientHello(reason)
    assert parse(data[:-1]) in (NEED_MORE, NotClientHello(reason))


def test_looking_for_a_name() -> None:
    """A hello is parsed in full if it contains the name anywhere; then its fields decide."""
    plain = hellos.openssl_hello(b"h2", server_name=b"site.example")
    assert ClientHelloParser(ACME_TLS_1).feed(plain) is OTHER
    assert ClientHelloParser(ACME_TLS_1).feed(plain + ACME_TLS_1) is OTHER
    name = ClientHello((b"h2",), "acme-tls/1")
    elsewhere = hellos.message(
        hellos.extension(0, hellos.vector(2, b"\0" + hellos.vector(2, ACME_TLS_1))),
        hellos.alpn_extension(b"h2"),
    )
    assert ClientHelloParser(ACME_TLS_1).feed(hellos.records(elsewhere)) == name
    assert ClientHelloParser(ACME_TLS_1).feed(ACME_HELLO) == parse(ACME_HELLO)


def test_no_extensions() -> None:
    """A hello that ends after its compression methods is whole (TLS 1.2 and older)."""
    body = bytes(34) + b"\0" + b"\0\x02\x13\x01" + b"\x01\0"
    assert parse(hellos.records(b"\x01" + hellos.vector(3, body))) == ClientHello()


@pytest.mark.parametrize(
    ("handshake", "reason"),
    [
        (hellos.message(session_id=bytes(33)), "session id is over 32 bytes"),
        (hellos.message(suites=b"\0\0\0"), "cipher suites have an odd length"),
        (hellos.message(hellos.alpn_extension()), "ALPN list or name is empty"),
        (hellos.message(hellos.alpn_extension(b"h2", b"")), "ALPN list or name is empty"),
        (hellos.message(hellos.extension(16, b"\0\x02\x05a")), "ALPN name is cut short"),
        (
            hellos.message(hellos.extension(16, b"\0\x02\x01a!")),
            "ALPN list does not fill its extension",
        ),
        (
            hellos.message(hellos.extension(0, b"\0\0!")),
            "server name list does not fill its extension",
        ),
        (
            hellos.message(hellos.alpn_extension(b"h2"), hellos.alpn_extension(b"h2")),
            "an extension comes twice",
        ),
        (b"\x01\0\0\x03abc", "a length points behind the end"),
        (b"\x01\0\0\0", "a length points behind the end"),
    ],
)
def test_malformed(handshake: bytes, reason: str) -> None:
    """A field that breaks its rule is named."""
    assert parse(hellos.records(handshake)) == NotClientHello(reason)


def test_every_length_field_wrong() -> None:
    """No wrong two-byte value anywhere in a hello raises, or adds a name that was not offered."""
    plain = bytearray(hellos.openssl_hello(b"h2", server_name=b"site.example"))
    for at in range(len(plain) - 1):
        for value in (b"\0\0", b"\0\x01", b"\xff\xff", b"\x40\x01"):
            damaged = bytes(plain[:at]) + value + bytes(plain[at + 2 :])
            assert answer(parse(damaged)) != "acme"


def test_server_name_is_never_raw() -> None:
    """Names of other types are skipped. What is not printable ASCII is escaped, so that a peer
    cannot write lines or colours of its own into the log."""
    names = b"\x07" + hellos.vector(2, b"x") + b"\0" + hellos.vector(2, b"caf\xe9\r\n\x1b[31m\x7f")
    hello = hellos.message(hellos.extension(0, hellos.vector(2, names)))
    assert parse(hellos.records(hello)) == ClientHello((), r"caf\xe9\r\n\x1b[31m\x7f")


def test_server_name_ends() -> None:
    """Of a server name 255 bytes are kept, the most that a name can have: it goes to the log."""
    for size in (255, 256, 60_000):
        name = hellos.extension(0, hellos.vector(2, b"\0" + hellos.vector(2, bytes(size))))
        assert parse(hellos.records(hellos.message(name))) == ClientHello((), r"\x00" * 255)
    name = hellos.extension(0, hellos.vector(2, b"\0" + hellos.vector(2, b"a" * 254)))
    assert parse(hellos.records(hellos.message(name))) == ClientHello((), "a" * 254)


def test_largest_message() -> None:
    """A message of 65,536 bytes is taken, in whole records and in as many as are accepted."""
    handshake = hellos.padded_message(MAX_MESSAGE, hellos.alpn_extension(ACME_TLS_1))
    for size in (16_384, 33):
        data = hellos.records(handshake, size)
        assert parse(data) == ClientHello((ACME_TLS_1,))
        assert parse(data[:-1]) == NEED_MORE


def test_too_many_records() -> None:
    """A hello of 2,048 records is accepted; one more record is refused as soon as it begins."""
    for size in (1, 10, 32, 33, 100):
        for first in (0, 1, 40):
            length = first + size * (MAX_RECORDS - (first > 0))
            if length - 4 > MAX_MESSAGE:
                continue
            for more, verdict in ((0, ClientHello()), (1, TOO_MANY)):
                handshake = hellos.padded_message(length - 4 + more)
                data = hellos.records(handshake[first:], size)
                if first:
                    data = hellos.records(handshake[:first]) + data
                assert parse(data) == verdict
                assert parse(data, bytes(MAX_MESSAGE)) == verdict
            assert parse(data[: -5 - more]) == NEED_MORE
            assert parse(data[: -4 - more]) == TOO_MANY


def test_no_more_is_kept_than_a_message_in_the_most_records() -> None:
    """After 75,780 bytes there is always a verdict, so the bytes that wait for one are limited."""
    most = 4 + MAX_MESSAGE + MAX_RECORDS * 5
    handshake = hellos.padded_message(MAX_MESSAGE)
    ones = hellos.records(handshake[: MAX_RECORDS - 4], 1)
    data = ones + hellos.records(handshake[MAX_RECORDS - 4 :])
    assert len(data) == most
    assert parse(data) == ClientHello()
    assert parse(data[:-1]) == NEED_MORE


def lines_run(*pieces: bytes) -> int:
    """How many lines of the parser run when these pieces come."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    parser = ClientHelloParser()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for piece in pieces:
            parser.feed(piece)
    finally:
        sys.settrace(before)
    assert parser.verdict == ClientHello()
    return count


def bytewise(data: bytes) -> list[bytes]:
    """C{data} byte by byte."""
    return [data[at : at + 1] for at in range(len(data))]


def test_work_is_linear() -> None:
    """Twice the bytes are twice the work: nothing is gone through again for each byte."""
    once = lines_run(*bytewise(hellos.records(hellos.padded_message(2_000), 8)))
    twice = lines_run(*bytewise(hellos.records(hellos.padded_message(4_000), 8)))
    assert 1.9 < twice / once < 2.1


@pytest.mark.parametrize("sizes", [(1,), (1, 2), (5, 1, 32)])
def test_tiny_records_cost_little(sizes: tuple[int, ...]) -> None:
    """A hello in thousands of tiny records costs a visitor's neighbours next to nothing: they are
    taken many at a time, not one by one."""
    sizes_of_all = [*itertools.islice(itertools.cycle(sizes), 2_000)]
    rest, wire = hellos.padded_message(sum(sizes_of_all) - 4), b""
    for size in sizes_of_all:
        wire += hellos.records(rest[:size])
        rest = rest[size:]
    halves = wire[: len(wire) // 2], wire[len(wire) // 2 :]
    assert lines_run(*halves) < 200
    assert parse(*halves) == ClientHello()


@given(st.binary(max_size=2_000), st.randoms(use_true_random=False))
@example(ACME_HELLO[:100], random.Random(1))
def test_any_bytes_any_chunks(data: bytes, rng: random.Random) -> None:
    """Never an exception, never another answer for another cut."""
    assert parse(*cut(data, rng)) == parse(data)


@given(st.data())
def test_damaged_hellos(data: st.DataObject) -> None:
    """A real hello with a few bytes changed: the same for every cut, nothing raised."""
    damaged = bytearray(ACME_HELLO)
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    rng = data.draw(st.randoms(use_true_random=False))
    assert parse(*cut(bytes(damaged), rng)) == parse(bytes(damaged))


@given(
    st.lists(st.binary(min_size=1, max_size=255), min_size=1, max_size=20, unique=True),
    st.integers(1, 400),
)
def test_alpn_round_trip(names: list[bytes], size: int) -> None:
    """Any ALPN list, in records of any size, comes out as it went in."""
    hello = hellos.message(hellos.alpn_extension(*names))
    data = hellos.records(hello, size)
    assert parse(data) == ClientHello(tuple(names))


@given(st.binary(min_size=1, max_size=400))
def test_decision_never_changes(data: bytes) -> None:
    """Once there is a verdict, more bytes do not change it."""
    parser = ClientHelloParser()
    decided: Verdict = NEED_MORE
    for at in range(len(data)):
        verdict = parser.feed(data[at : at + 1])
        assert decided is NEED_MORE or verdict is decided
        decided = verdict
