"""The TCP sockets of this network namespace: listeners, and handshakes that are under way.

They come from the sock_diag(7) family of netlink (linux/inet_diag.h), which can return only the
wanted states: a busy host has many thousands of sockets in others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..errors import StartError
from .netlink import SOCK_DIAG, Netlink, attributes

ESTABLISHED: Final = 1
SYN_RECEIVED: Final = 3
LISTENING: Final = 10
"""States (tcp_states.h)."""

_BY_FAMILY: Final = 20
_REQUEST: Final = struct.Struct("=BBBBI48s")
"""struct inet_diag_req_v2: family, protocol, extensions, padding, states, which socket (any)."""

_ANSWER: Final = struct.Struct("=BBBB2s2s16s16sIIIIIIII")
"""struct inet_diag_msg: family, state, timer, retransmissions; source and destination port, source
and destination address, interface, cookie (two); expiry, queues (two), UID, inode."""

_CGROUP: Final = 21
"""INET_DIAG_CGROUP_ID, Linux 5.9."""


class TCPSocket(NamedTuple):
    """A TCP socket.

    @ivar local: address and port.
    @ivar remote: address and port of the peer.
    @ivar uid: its owner.
    @ivar inode: identifies the socket, as in C{/proc/PID/fd}.
    @ivar cgroup: the number of the control group (version 2) that it was made in; 0 if unknown.
    """

    family: int
    state: int
    local: tuple[str, int]
    remote: tuple[str, int]
    uid: int
    inode: int
    cgroup: int = 0


def tcp_sockets(*states: int) -> Iterator[TCPSocket]:
    """The sockets in one of C{states}, both families; raises C{OSError} if they cannot be read."""
    mask = sum(1 << state for state in states)
    with Netlink(SOCK_DIAG) as kernel:
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, mask, b"")
            for body in kernel.dump(_BY_FAMILY, request):
                yield _parsed(body)


def _parsed(body: bytes) -> TCPSocket:
    family, state, _, _, *ends, uid, inode = _ANSWER.unpack_from(body)
    sport, dport, source, destination = ends[:4]
    size = 4 if family == socket.AF_INET else 16

    def end(address: bytes, port: bytes) -> tuple[str, int]:
        return socket.inet_ntop(family, address[:size]), int.from_bytes(port, "big")

    ends_shown = end(source, sport), end(destination, dport)
    cgroup = int.from_bytes(attributes(body[_ANSWER.size :]).get(_CGROUP, b""), sys.byteorder)
    return TCPSocket(family, state, *ends_shown, uid, inode, cgroup)


Handshake = tuple[tuple[str, int], tuple[str, int]]
"""Both ends of a connection whose handshake is under way."""


def half_open(*ports: int) -> set[Handshake]:
    """The handshakes with one of C{ports} that are under way."""
    return {
        (found.local, found.remote)
        for found in tcp_sockets(SYN_RECEIVED)
        if found.local[1] in ports
    }


def listeners(port: int) -> list[str]:
    """The addresses at which sockets listen on C{port}, as C{host:port}; empty if unknown."""
    try:
        return sorted(
            {shown(found.local) for found in tcp_sockets(LISTENING) if found.local[1] == port}
        )
    except OSError:
        return []


def taken_by_another_user(port: int) -> bool:
    """Whether a program of a user other than root and this one listens on C{port}."""
    try:
        owners = {found.uid for found in tcp_sockets(LISTENING) if found.local[1] == port}
    except OSError:
        return False
    return bool(owners - {0, os.geteuid()})


def port_taken(port: int) -> StartError:
    """The error if the proxy cannot listen on its port; it names what uses the port."""
    if not listeners(port) and (peers := connections_from(port)):
        return StartError(
            f"port {port} is in use by a connection with {peers[0]}; wait until it ends, and"
            f" reserve the port: sysctl -w net.ipv4.ip_local_reserved_ports={port} (if ports are"
            " reserved already, name them, too)",
            os.EX_UNAVAILABLE,
        )
    return StartError(
        f"port {port} is taken by another program; stop that one (see: ss -ltnp 'sport = :{port}')",
        os.EX_UNAVAILABLE,
    )


def connections_from(port: int) -> list[str]:
    """The peers of connections from or to C{port} of this host, as C{host:port}."""
    try:
        found = tcp_sockets(ESTABLISHED)
        return sorted({shown(each.remote) for each in found if each.local[1] == port})
    except OSError:
        return []


def shown(end: tuple[str, int]) -> str:
    """C{host:port}, as the options take it."""
    host, port = end
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def served_from_elsewhere(port: int) -> bool:
    """Whether a process of another PID namespace, not visible from this one, listens on C{port}.

    Also L{False} if that cannot be found out: this process may not inspect others (ptrace(2)).
    """
    try:
        os.readlink("/proc/1/exe")
        wanted = {
            f"socket:[{found.inode}]"
            for found in tcp_sockets(LISTENING)
            if found.local[1] == port and found.inode
        }
    except OSError:
        return False
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for name in os.listdir(f"/proc/{process}/fd"):
                with contextlib.suppress(OSError):
                    wanted.discard(os.readlink(f"/proc/{process}/fd/{name}"))
    return bool(wanted)
