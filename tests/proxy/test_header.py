"""The header of the PROXY protocol, byte for byte as the specification has it."""

from __future__ import annotations

import struct

import pytest

from acme_alpn_proxy.proxy.clienthello import NEED_MORE
from acme_alpn_proxy.proxy.header import (
    MAX_HEADER,
    BadHeader,
    encode_v1,
    encode_v2,
    size_of,
    unknown_v1,
    unknown_v2,
    version_of,
)

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
V4 = (("192.0.2.7", 50_000), ("198.51.100.1", 443))
V6 = (("2001:db8::7", 50_000), ("2001:db8:1::1", 443))
V2_OF_V4 = SIGNATURE + bytes.fromhex("2111000cc0000207c6336401c35001bb")


def test_version_1() -> None:
    """A line of text (section 2.1)."""
    assert encode_v1(*V4) == b"PROXY TCP4 192.0.2.7 198.51.100.1 50000 443\r\n"
    assert encode_v1(*V6) == b"PROXY TCP6 2001:db8::7 2001:db8:1::1 50000 443\r\n"
    assert unknown_v1() == b"PROXY UNKNOWN\r\n"


def test_version_2() -> None:
    """Bytes in network order (section 2.2)."""
    assert encode_v2(*V4) == V2_OF_V4
    addresses = bytes.fromhex("20010db8" + "0" * 23 + "7" + "20010db80001" + "0" * 19 + "1")
    assert encode_v2(*V6) == SIGNATURE + b"\x21\x21\0\x24" + addresses + b"\xc3\x50\x01\xbb"
    assert unknown_v2() == SIGNATURE + b"\x20\0\0\0"


@pytest.mark.parametrize("encode", [encode_v1, encode_v2])
def test_no_pair(encode: object) -> None:
    """Addresses of two families are no pair; the interface of a link-local one is left out."""
    assert callable(encode)
    assert encode(V4[0], V6[1]) in (unknown_v1(), unknown_v2())
    assert encode(("fe80::1%eth0", 1), ("fe80::2", 2)) == encode(("fe80::1", 1), ("fe80::2", 2))


@pytest.mark.parametrize(
    ("header", "version"),
    [
        (encode_v1(*V4), "v1"),
        (encode_v1(*V6), "v1"),
        (unknown_v1(), "v1"),
        (b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n", "v1"),
        (encode_v2(*V4), "v2"),
        (encode_v2(*V6), "v2"),
        (unknown_v2(), "v2"),
        (V2_OF_V4[:14] + b"\0\x11" + V2_OF_V4[16:] + b"\x04\0\x02..", "v2"),
        (V2_OF_V4[:14] + struct.pack("!H", MAX_HEADER - 16) + bytes(MAX_HEADER - 16), "v2"),
    ],
)
def test_size(header: bytes, version: str) -> None:
    """The size of a header is known when its last byte has come, and not before; the bytes after it
    do not change it."""
    for count in range(len(header)):
        assert size_of(header[:count]) is NEED_MORE
    assert size_of(header) == size_of(header + b"\x16\x03\x01\r\n") == len(header)
    assert version_of(header) == version


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x16", "other bytes came first"),
        (b"GET / HTTP/1.1\r\n\r\n", "other bytes came first"),
        (b"PROXX", "other bytes came first"),
        (b"PROXY\r\n", "other bytes came first"),
        (b"\r\n\r\nX", "other bytes came first"),
        (SIGNATURE[:-1] + b"X", "other bytes came first"),
        (b"PROXY TCP4 " + b"1" * 96, "its line does not end within 107 bytes"),
        (b"PROXY UNKNOWN " + b"f" * 92 + b"\r\n", "its line does not end within 107 bytes"),
        (SIGNATURE + b"\x11\x11\0\x0c", "its version is 1"),
        (SIGNATURE + b"\x31\x11\0\x0c", "its version is 3"),
        (SIGNATURE + b"\x21\x11\xff\xff", "it has 65551 bytes; 4096 are taken"),
    ],
)
def test_no_header(data: bytes, why: str) -> None:
    """Bytes that cannot become a header are refused."""
    with pytest.raises(BadHeader, match=why.replace(".", r"\.")):
        size_of(data)
