"""Questions to the kernel by netlink(7), without a program."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

ROUTE: Final = 0
SOCK_DIAG: Final = 4
NETFILTER: Final = 12
"""Protocols of C{linux/netlink.h}."""

_REQUEST: Final = 0x01
_ACKNOWLEDGE: Final = 0x04
_DUMP: Final = 0x300
_MULTI: Final = 0x02
_ERROR: Final = 2
_DONE: Final = 3
_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF
"""Without the flags that say "nested" and "network byte order"."""
_LARGEST: Final = 1 << 18
_PATIENCE: Final = 2.0
"""Seconds; the kernel answers within milliseconds."""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute that is made of attributes."""
    return attribute(kind | _NESTED, b"".join(inner))


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in C{data}, by type; of several of one type the last."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4
    return found


class Netlink:
    """A socket to one part of the kernel. A context manager; its methods raise L{OSError}."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._socket.settimeout(_PATIENCE)
        self._number = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def ask(self, kind: int, body: bytes) -> bytes:
        """What the kernel answers to a question with one answer."""
        return next(self._answers(kind, body, _REQUEST))

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """Everything of that kind."""
        return self._answers(kind, body, _REQUEST | _DUMP)

    def do(self, kind: int, body: bytes) -> None:
        """Have something done, and wait until it is."""
        for _ in self._answers(kind, body, _REQUEST | _ACKNOWLEDGE):
            pass

    def _answers(self, kind: int, body: bytes, flags: int) -> Iterator[bytes]:
        self._number += 1
        length = _HEADER.size + len(body)
        self._socket.send(_HEADER.pack(length, kind, flags, self._number, 0) + body)
        while True:
            for kind, flags, answer in self._received():
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    (code,) = struct.unpack_from("=i", answer)
                    if code == 0:
                        return
                    raise OSError(-code, os.strerror(-code))
                yield answer
                if not flags & _MULTI:
                    return

    def _received(self) -> Iterable[tuple[int, int, bytes]]:
        """The messages of one datagram that belong to the question asked last."""
        data = self._socket.recv(_LARGEST)
        found = []
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, flags, number, _ = _HEADER.unpack_from(data, at)
            if length < _HEADER.size:
                break
            if number == self._number:
                found.append((kind, flags, data[at + _HEADER.size : at + length]))
            at += length + -length % 4
        return found
