"""The kernel's connection tracking table, through ctnetlink
(linux/netfilter/nfnetlink_conntrack.h).

When the last user of connection tracking is removed, its entries stay until their timeouts. If
tracking comes back, a connection that began in between from the same address and port meets the old
entry, with its translation, and breaks. So entries that were translated to the proxy's port are
deleted before tracking may be switched off, and before it may be switched on.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final, NamedTuple

from .netlink import NETFILTER, Netlink, attribute, attributes, nested

_GET: Final = 0x0101
_DELETE: Final = 0x0102
"""IPCTNL_MSG_CT_GET and _DELETE of the subsystem NFNL_SUBSYS_CTNETLINK (1)."""

_ORIGINAL: Final = 1
_REPLY: Final = 2
_ID: Final = 12
"""Attributes of an entry: CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID."""

_PROTOCOL: Final = 2
_NUMBER: Final = 1
_SOURCE_PORT: Final = 2
_DESTINATION_PORT: Final = 3
"""CTA_TUPLE_PROTO of a tuple, and in it CTA_PROTO_NUM, _SRC_PORT and _DST_PORT."""

_GENERIC: Final = struct.Struct("!BBH")
"""struct nfgenmsg: address family, version, resource."""


class Entry(NamedTuple):
    """An entry of the table.

    @ivar name: the attributes that identify it to the kernel.
    """

    family: int
    name: bytes


def translated(port: int) -> list[Entry]:
    """The entries of TCP connections that were translated to C{port} of this host.

    They are recognized by the source port of their replies: in an untranslated entry, it is the
    port that the visitor connected to. Empty if there is no connection tracking.
    """
    found: list[Entry] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError), Netlink(NETFILTER) as kernel:
            found += _translated(kernel, family, port)
    return found


def forget(entries: Iterable[Entry]) -> None:
    """Delete the entries; those that do not exist any more are skipped."""
    with suppress(OSError), Netlink(NETFILTER) as kernel:
        for entry in entries:
            body = _GENERIC.pack(entry.family, 0, 0) + entry.name
            with suppress(OSError):  # the entry no longer exists
                kernel.do(_DELETE, body)


def _translated(kernel: Netlink, family: int, port: int) -> Iterator[Entry]:
    packed = struct.pack("!H", port)
    # This search skips most entries; it takes far less time than parsing them.
    sign = attribute(_SOURCE_PORT, packed)[:6]
    for body in kernel.dump(_GET, _GENERIC.pack(family, 0, 0)):
        if sign not in body:
            continue
        entry = attributes(body[_GENERIC.size :])
        reply = attributes(attributes(entry.get(_REPLY, b"")).get(_PROTOCOL, b""))
        dialled = attributes(attributes(entry.get(_ORIGINAL, b"")).get(_PROTOCOL, b""))
        is_tcp = reply.get(_NUMBER) == bytes([socket.IPPROTO_TCP])
        if is_tcp and reply.get(_SOURCE_PORT) == packed != dialled.get(_DESTINATION_PORT):
            identity = attribute(_ID, entry[_ID]) if _ID in entry else b""
            yield Entry(family, nested(_ORIGINAL, entry[_ORIGINAL]) + identity)
