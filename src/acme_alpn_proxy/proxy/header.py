"""The header of the PROXY protocol: the addresses of a connection, sent before its first byte.

Bytes in, values out. The specification is HAProxy's "The PROXY protocol, Versions 1 & 2".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, TypeAlias

from .clienthello import NEED_MORE, NeedMore

End: TypeAlias = tuple[str, int]
"""A numeric address and a port."""

MAX_HEADER: Final = 4_096
"""Bytes of a header that are accepted, as many as nginx accepts. The addresses need 52; the rest is
for other fields of a load balancer, such as the name of a client's certificate."""

_Address: TypeAlias = IPv4Address | IPv6Address

_V1_START: Final = b"PROXY "
_V1_END: Final = b"\r\n"
_V1_MAX: Final = 107
"""Bytes of a header of version 1 (section 2.1)."""

_V2_START: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED: Final = struct.Struct("!12sBBH")
"""Signature, version and command, family and protocol, and the number of bytes that follow."""

_V2: Final = 0x20
_LOCAL: Final = 0x20
_PROXY: Final = 0x21
_UNSPECIFIED: Final = 0x00
_TCP: Final = {4: 0x11, 6: 0x21}


class BadHeader(ValueError):
    """The bytes are not a header that this program accepts; the message says why."""


def encode_v1(visitor: End, dialled: End) -> bytes:
    """The header of version 1 (section 2.1): a line of text."""
    pair = _pair(visitor, dialled)
    if pair is None:
        return unknown_v1()
    source, destination = pair
    words = f"TCP{source.version} {source} {destination} {visitor[1]} {dialled[1]}"
    return _V1_START + words.encode("ascii") + _V1_END


def encode_v2(visitor: End, dialled: End) -> bytes:
    """The header of version 2 (section 2.2): bytes."""
    pair = _pair(visitor, dialled)
    if pair is None:
        return unknown_v2()
    source, destination = pair
    ports = struct.pack("!HH", visitor[1], dialled[1])
    body = source.packed + destination.packed + ports
    return _V2_FIXED.pack(_V2_START, _PROXY, _TCP[source.version], len(body)) + body


def unknown_v1() -> bytes:
    """A header of version 1 without addresses: the connection is the sender's own (section 2.1)."""
    return _V1_START + b"UNKNOWN" + _V1_END


def unknown_v2() -> bytes:
    """A header of version 2 without addresses: the command LOCAL (section 2.2)."""
    return _V2_FIXED.pack(_V2_START, _LOCAL, _UNSPECIFIED, 0)


ENCODERS: Final[Mapping[str, Callable[[End, End], bytes]]] = {"v1": encode_v1, "v2": encode_v2}
UNKNOWN: Final[Mapping[str, bytes]] = {"v1": unknown_v1(), "v2": unknown_v2()}


def version_of(header: bytes) -> str:
    """C{v1} or C{v2}."""
    return "v1" if header.startswith(_V1_START) else "v2"


def size_of(data: bytes) -> int | NeedMore:
    """The size of the header that a connection begins with, in bytes.

    @return: L{NEED_MORE} if C{data} may be the beginning of a header and is not all of it. The
        addresses in the header are not checked. Raises L{BadHeader}.
    """
    if data.startswith(_V1_START):
        end = data.find(_V1_END, 0, _V1_MAX)
        if end < 0 and len(data) >= _V1_MAX:
            raise BadHeader(f"its line does not end within {_V1_MAX} bytes")
        return NEED_MORE if end < 0 else end + len(_V1_END)
    if data.startswith(_V2_START) and len(data) >= _V2_FIXED.size:
        _, version, _, length = _V2_FIXED.unpack_from(data)
        size: int = _V2_FIXED.size + length
        if version & 0xF0 != _V2:
            raise BadHeader(f"its version is {version >> 4}")
        if size > MAX_HEADER:
            raise BadHeader(f"it has {size} bytes; {MAX_HEADER} are taken")
        return size if len(data) >= size else NEED_MORE
    if any(start.startswith(data[: len(start)]) for start in (_V1_START, _V2_START)):
        return NEED_MORE
    raise BadHeader("other bytes came first")


def _pair(visitor: End, dialled: End) -> tuple[_Address, _Address] | None:
    """Both addresses, if they are of one family; without the interface of a link-local address."""
    source, destination = (ip_address(host.partition("%")[0]) for host, _ in (visitor, dialled))
    return (source, destination) if source.version == destination.version else None
