"""What a load balancer sends before the visitor's bytes: the header of the PROXY protocol."""

from __future__ import annotations

from acme_alpn_proxy.proxy.balancer import addresses_in
from acme_alpn_proxy.proxy.clienthello import NeedMore
from acme_alpn_proxy.proxy.header import (
    ENCODERS,
    MAX_HEADER,
    UNKNOWN,
    BadHeader,
    encode_v1,
    encode_v2,
    size_of,
)
from acme_alpn_proxy.proxy.protocols import end_of

_V4 = (("192.0.2.7", 50_000), ("198.51.100.1", 443))
_V6 = (("2001:db8::7", 50_000), ("2001:db8:1::1", 443))

SEEDS = [
    encode_v1(*_V4) + b"\x16\x03\x01",
    encode_v1(*_V6),
    encode_v2(*_V4) + b"\x16\x03\x01",
    encode_v2(*_V6)[:15] + b"\x2a" + encode_v2(*_V6)[16:] + b"\x04\x00\x03end",
    *UNKNOWN.values(),
    b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n",
    b"PROXY TCP4 " + b"1" * 107,
    b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\xd8" + bytes(216),
]


def check(data: bytes) -> None:
    """Each input is a header, the beginning of one, or refused. The verdict is the same, and not
    later, if the bytes come one by one. The addresses in a header can be encoded again."""
    whole = _size(data)
    verdicts = [_size(data[:count]) for count in range(min(len(data), MAX_HEADER) + 1)]
    decided = [each for each in verdicts if not isinstance(each, NeedMore)]
    if isinstance(whole, NeedMore):
        assert not decided
        assert len(data) < MAX_HEADER
        return
    assert decided[:1] == [whole], "another verdict byte by byte"
    if not isinstance(whole, int):
        return
    assert 0 < whole <= min(len(data), MAX_HEADER)
    try:
        visitor, dialled = addresses_in(data[:whole])
    except BadHeader:
        return
    if visitor is not None:
        for encode in ENCODERS.values():
            again = addresses_in(encode(end_of(visitor), end_of(dialled)))
            assert tuple(map(end_of, again)) == (end_of(visitor), end_of(dialled))


def _size(data: bytes) -> int | NeedMore | str:
    try:
        return size_of(data)
    except BadHeader as problem:
        return str(problem)
