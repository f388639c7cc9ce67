"""Requests to the kernel through netlink(7), without a program."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

ROUTE: Final = 0
SOCK_DIAG: Final = 4
NETFILTER: Final = 12
"""Protocols of C{linux/netlink.h}."""

REQUEST: Final = 0x01
ACKNOWLEDGE: Final = 0x04
EXCLUSIVE: Final = 0x200
CREATE: Final = 0x400
APPEND: Final = 0x800
"""Flags of a message. EXCLUSIVE: fail if the object exists already."""

_DUMP: Final = 0x300
_MULTI: Final = 0x02
_ERROR: Final = 2
_DONE: Final = 3
_HEADER: Final = struct.Struct("=IHHII")
_END: Final = struct.Struct("=IHHIIi")
"""The message that ends a dump: a header and a status."""
_ATTRIBUTE: Final = struct.Struct("=HH")
_NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF
"""Masks out the flags "nested" and "network byte order" of an attribute's type."""
_SOL_NETLINK: Final = 270
_CAP_ACK: Final = 10
_EXT_ACK: Final = 11
"""Options of a socket: answers do not repeat the message, and they say which attribute is wrong."""
_ANSWER_OFFSET: Final = 2
"""NLMSGERR_ATTR_OFFS."""
_LARGEST: Final = 1 << 18
_PATIENCE: Final = 2.0
"""Seconds to wait; the kernel answers within milliseconds."""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, with its padding."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """An attribute that contains attributes."""
    return attribute(kind | _NESTED, b"".join(inner))


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in C{data}, by type; if a type occurs more than once, the last one."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4
    return found


class Message(NamedTuple):
    """One of several messages that are sent together."""

    kind: int
    flags: int
    body: bytes


class Refused(OSError):
    """The kernel refuses one of several messages.

    @ivar message: the refused message.
    @ivar offset: where in its body the wrong attribute begins; L{None} if the kernel does not say.
    """

    def __init__(self, number: int, message: Message, offset: int | None) -> None:
        super().__init__(number, os.strerror(number))
        self.message = message
        self.offset = offset


class Netlink:
    """A socket to one part of the kernel. A context manager; its methods raise L{OSError}."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._socket.settimeout(_PATIENCE)
        self._number = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def ask(self, kind: int, body: bytes) -> bytes:
        """The kernel's answer to a request that has one answer."""
        return next(self._answers(kind, body, REQUEST))

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """Everything of that kind."""
        return self._answers(kind, body, REQUEST | _DUMP)

    def dump_packets(self, kind: int, body: bytes) -> Iterator[bytes]:
        """Everything of that kind, in packets as the kernel sends them: each has many answers, with
        their headers.

        Searching a packet takes a fraction of the time that splitting it takes.
        """
        self._number += 1
        self._socket.send(_packed(self._number, kind, REQUEST | _DUMP, body))
        while True:
            data = self._socket.recv(_LARGEST)
            _raise_error(data)
            yield data
            if len(data) >= _END.size and _END.unpack(data[-_END.size :])[:2] == (_END.size, _DONE):
                return

    def do(self, kind: int, body: bytes) -> None:
        """Send a command, and wait until the kernel has carried it out."""
        for _ in self._answers(kind, body, REQUEST | ACKNOWLEDGE):
            pass

    def send(self, messages: Sequence[Message]) -> None:
        """Send all messages in one packet, and wait for the acknowledgements that they request.

        Raises L{Refused} for the first one that the kernel refuses.
        """
        for option in (_CAP_ACK, _EXT_ACK):
            with suppress(OSError):  # Linux before 4.12 has no EXT_ACK
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
        sent = dict(enumerate(messages, self._number + 1))
        self._number += len(messages)
        self._socket.send(b"".join(_packed(number, *message) for number, message in sent.items()))
        unanswered = {number for number, each in sent.items() if each.flags & ACKNOWLEDGE}
        while unanswered:
            for kind, _, number, answer in self._received():
                if kind == _ERROR and number in sent:
                    (code,) = struct.unpack_from("=i", answer)
                    if code:
                        raise Refused(-code, sent[number], _offset(answer))
                    unanswered.discard(number)

    def _answers(self, kind: int, body: bytes, flags: int) -> Iterator[bytes]:
        self._number += 1
        self._socket.send(_packed(self._number, kind, flags, body))
        while True:
            for kind, flags, number, answer in self._received():
                if number != self._number:
                    continue
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

    def _received(self) -> Iterable[tuple[int, int, int, bytes]]:
        """The messages of one packet: kind, flags, sequence number of the request, and body."""
        data = self._socket.recv(_LARGEST)
        found = []
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, flags, number, _ = _HEADER.unpack_from(data, at)
            if length < _HEADER.size:
                break
            found.append((kind, flags, number, data[at + _HEADER.size : at + length]))
            at += length + -length % 4
        return found


def _raise_error(packet: bytes) -> None:
    """Raise L{OSError} if the kernel's answer is an error."""
    _, kind, *_ = _HEADER.unpack_from(packet)
    if kind == _ERROR:
        (code,) = struct.unpack_from("=i", packet, _HEADER.size)
        raise OSError(-code, os.strerror(-code))


def _packed(number: int, kind: int, flags: int, body: bytes) -> bytes:
    header = _HEADER.pack(_HEADER.size + len(body), kind, flags, number, 0)
    return header + body + bytes(-len(body) % 4)


def _offset(error: bytes) -> int | None:
    """Where the wrong attribute begins in the body of the message that was refused."""
    told = attributes(error[4 + _HEADER.size :]).get(_ANSWER_OFFSET)
    return None if told is None else int(struct.unpack("=I", told)[0]) - _HEADER.size
