"""Notices that steered visitors do not arrive, whatever the reason.

A client that gets no answer to its SYN sends the same SYN again after about a second, and again
after two more (RFC 6298). So repeated SYNs to :443, while the listener accepts nothing, mean that
visitors are being lost. A flood of forged SYNs looks different, and so do the half-open connections
of a scanner: their SYNs are not repeated, or not at these intervals.

Packet sockets (packet(7)) read the SYNs; they receive nothing while many connections are accepted.
A filter that cannot be removed lets only the headers of SYNs to :443 through: a process that has
dropped its privileges cannot use the sockets for anything else.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ..addresses import HTTPS, is_ours
from .bpf import attach_filter

SEVERAL: Final = 2
"""The number of repeated SYNs that means a loss: the second and third SYN of one visitor, after
three seconds, or the second SYN of two visitors, after one second."""

LEAST_AGE: Final = 1.5
"""Seconds that must have passed since the first of the repeated SYNs."""

_LEAST_INTERVAL: Final = 0.7
"""Seconds between two SYNs of one visitor."""

_MOST_COPIES: Final = 4
"""How often the same SYN may be seen at shorter intervals: once for each interface that it passes
(a bridge, a VLAN). More are a flood."""

_LIFETIME: Final = 10.0
"""Seconds for which a SYN is remembered."""

_BUSY: Final = 100
"""The number of connections accepted between two checks after which no SYNs are received until the
next check."""

_MOST: Final = 4_096
"""How many SYNs are remembered, and how many are read at a time."""

_IPV4: Final = 0x0800
_IPV6: Final = 0x86DD
_NO_PACKETS: Final = 0x88B5
"""EtherTypes. The last one is for local experiments (IEEE 802): a socket that is bound to it
receives nothing."""

_SO_TIMESTAMPNS: Final = 35
_SO_LOCK_FILTER: Final = 44

_PACKET_TYPE: Final = 0xFFFFF004
"""SKF_AD_PKTTYPE of linux/filter.h: 0 is a packet for this host."""

_SYN_BY_IPV4: Final = (
    (0x20, 0, 0, _PACKET_TYPE),  # load it
    (0x15, 0, 11, 0),  # not for this host: drop
    (0x30, 0, 0, 9),  # load the protocol
    (0x15, 0, 9, socket.IPPROTO_TCP),
    (0x28, 0, 0, 6),  # load flags and fragment offset
    (0x45, 7, 0, 0x1FFF),  # not the first fragment: drop
    (0xB1, 0, 0, 0),  # x = length of the IP header
    (0x48, 0, 0, 2),  # load the destination port
    (0x15, 0, 4, HTTPS),
    (0x50, 0, 0, 13),  # load the flags of TCP
    (0x54, 0, 0, 0x17),  # FIN, SYN, RST and ACK of them
    (0x15, 0, 1, 0x02),  # not SYN alone: drop
    (0x06, 0, 0, 128),  # keep this number of bytes
    (0x06, 0, 0, 0),  # drop
)
_SYN_BY_IPV6: Final = (
    (0x20, 0, 0, _PACKET_TYPE),
    (0x15, 0, 8, 0),
    (0x30, 0, 0, 6),  # load the next header
    (0x15, 0, 6, socket.IPPROTO_TCP),
    (0x28, 0, 0, 42),  # load the destination port
    (0x15, 0, 4, HTTPS),
    (0x30, 0, 0, 53),  # load the flags of TCP
    (0x54, 0, 0, 0x17),
    (0x15, 0, 1, 0x02),
    (0x06, 0, 0, 128),
    (0x06, 0, 0, 0),
)
"""Classic BPF programs (linux/filter.h): opcode, jump if true, jump if false, operand. The packet
begins with the IP header."""


class Syn(NamedTuple):
    """The fields that are the same in a SYN and its repetitions."""

    family: int
    source: bytes
    destination: bytes
    port: int
    sequence: int


@dataclass(slots=True)
class _Seen:
    first: float
    last: float
    repeated: int = 0
    copies: int = 0


@dataclass
class Repetitions:
    """The SYNs since the last connection was accepted. No I/O."""

    _seen: dict[Syn, _Seen] = field(default_factory=dict)

    def forget(self) -> None:
        """Forget all SYNs: a connection was accepted."""
        self._seen.clear()

    def add(self, syn: Syn, now: float) -> None:
        """Add C{syn}, which arrived at C{now}, in seconds since the epoch."""
        seen = self._seen.get(syn)
        if seen is None:
            if len(self._seen) < _MOST:
                self._seen[syn] = _Seen(now, now)
        elif now - seen.last < _LEAST_INTERVAL:
            seen.copies += 1
        else:
            seen.last = now
            seen.repeated += 1

    def show_loss(self, now: float) -> bool:
        """Whether visitors are being lost."""
        for syn in [syn for syn, seen in self._seen.items() if now - seen.last > _LIFETIME]:
            del self._seen[syn]
        real = [
            seen for seen in self._seen.values() if seen.repeated and seen.copies <= _MOST_COPIES
        ]
        several = sum(seen.repeated for seen in real) >= SEVERAL
        return several and now - min(seen.first for seen in real) >= LEAST_AGE


class SynSockets:
    """Reads SYNs to :443 of both families while it is listening."""

    def __init__(self) -> None:
        """Raises C{OSError}, C{EPERM} without CAP_NET_RAW."""
        self._sockets: list[tuple[socket.socket, int]] = []
        self._listening = False
        try:
            for protocol, program in ((_IPV4, _SYN_BY_IPV4), (_IPV6, _SYN_BY_IPV6)):
                packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
                self._sockets.append((packets, protocol))
                packets.setblocking(False)
                packets.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
                attach_filter(packets, program)
                packets.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
        except OSError:
            self.close()
            raise

    def listen(self, listening: bool) -> None:
        """Receive SYNs from now on, or stop receiving them."""
        if listening is not self._listening:
            self._listening = listening
            for packets, protocol in self._sockets:
                _bind(packets, protocol if listening else _NO_PACKETS)

    def read(self) -> Iterator[tuple[Syn, float]]:
        """The SYNs received for connections to this host from outside.

        @return: pairs of a SYN and its time of arrival, in seconds since the epoch.
        """
        for packets, protocol in self._sockets:
            for _ in range(_MOST):
                try:
                    data, control, _, address = packets.recvmsg(128, 64)
                except OSError:  # nothing left to read
                    break
                syn = _syn(data)
                if syn is not None and address[:2] != ("lo", protocol) and _is_to_us(syn):
                    yield syn, _time(control)

    def close(self) -> None:
        for packets, _ in self._sockets:
            packets.close()


def _bind(packets: socket.socket, protocol: int) -> None:
    """Receive packets of this protocol from all interfaces. (The socket module's C{bind} can only
    name one interface.)"""
    address = struct.pack("@HHiHBB8s", socket.AF_PACKET, socket.htons(protocol), 0, 0, 0, 0, b"")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.bind(packets.fileno(), address, len(address)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _syn(packet: bytes) -> Syn | None:
    """Parse an IP packet that passed the filter; L{None} if it is cut short."""
    try:
        if packet[0] >> 4 == 4:
            at = 4 * (packet[0] & 0xF)
            family, source, destination = socket.AF_INET, packet[12:16], packet[16:20]
        else:
            at = 40
            family, source, destination = socket.AF_INET6, packet[8:24], packet[24:40]
        port, _, sequence = struct.unpack_from("!HHI", packet, at)
    except (IndexError, struct.error):
        return None
    return Syn(family, source, destination, port, sequence)


def _is_to_us(syn: Syn) -> bool:
    return is_ours(syn.family, (socket.inet_ntop(syn.family, syn.destination),))


def _time(control: list[tuple[int, int, bytes]]) -> float:
    """When the kernel received a packet, in seconds since the epoch (SCM_TIMESTAMPNS)."""
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, nanoseconds = struct.unpack("@ll", data)
            return float(seconds + nanoseconds / 1e9)
    return time.time()


class LostVisitorsWatch:
    """Finds out, when asked every second, whether steered visitors are being lost."""

    def __init__(
        self,
        accepted: Callable[[], int],
        full: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        @param accepted: returns how many connections have been accepted so far.
        @param full: whether connections wait to be accepted.
        @param clock: seconds since the epoch.
        """
        self._accepted = accepted
        self._full = full
        self._clock = clock
        self._before = -1
        self._repetitions = Repetitions()
        self._sockets: SynSockets | None = None

    def open(self) -> None:
        """Begin, while the process still has its privileges; raises C{OSError}."""
        self._sockets = SynSockets()
        self._sockets.listen(True)
        self._before = self._accepted()

    def look(self) -> bool:
        """Whether visitors are being lost."""
        if self._sockets is None:
            return False
        arrived = self._accepted() - self._before
        self._before += arrived
        for syn, when in self._sockets.read():
            self._repetitions.add(syn, when)
        self._sockets.listen(arrived < _BUSY)
        if arrived or self._full():
            self._repetitions.forget()
        return self._repetitions.show_loss(self._clock())

    def close(self) -> None:
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None
