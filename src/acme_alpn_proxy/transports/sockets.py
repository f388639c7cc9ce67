"""What the sockets of all transports have in common."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import ip_address
from socket import SocketType
from typing import Any, Final

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import ISystemHandle, ITCPTransport, IUNIXTransport
from twisted.internet.protocol import ClientFactory

_SO_ORIGINAL_DST: Final = 80
"""SO_ORIGINAL_DST of C{linux/netfilter_ipv4.h}; IP6T_SO_ORIGINAL_DST has the same number."""

_TCP_NOTSENT_LOWAT: Final = 25

_BIND_ADDRESS_NO_PORT: Final = 24
"""IP_BIND_ADDRESS_NO_PORT of ip(7), Linux 4.2; for IPv6, too."""

_TRANSPARENT: Final[dict[int, tuple[int, int]]] = {
    socket.AF_INET: (socket.IPPROTO_IP, 19),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 75),
}
"""IP_TRANSPARENT of ip(7), and IPV6_TRANSPARENT of C{linux/in6.h}. They take CAP_NET_RAW or
CAP_NET_ADMIN."""

NEAR_BUFFER: Final = 262_144
"""Bytes to ask for; the kernel doubles them (socket(7)). With less, a target on this host has to
wait, which costs CPU time with each gigabyte."""

UNSENT: Final = 131_072
"""Bytes that may wait to be sent to a visitor, besides those in flight, until the visitor has shown
that it reads. At 1 Gbit/s they last for a millisecond, which is longer than a turn takes."""

FAR_BUFFER: Final = 1_048_576
"""Enough for 800 Mbit/s from a target 10 ms away."""


def twisted_address(address: Any) -> IPv4Address | IPv6Address:
    """Twisted's form of a socket's address."""
    return IPv4Address("TCP", *address) if len(address) == 2 else IPv6Address("TCP", *address)


def tune(sock: SocketType | socket.socket, *, is_near: bool = False) -> None:
    """Send without Nagle's delay, and detect peers that have vanished (TCP keepalive).

    @param is_near: whether the peer is on this host, where the kernel always reports its end.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not is_near:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def is_near(host: str) -> bool:
    """Whether this numeric address is on this host's loopback."""
    return ip_address(host).is_loopback


def bind_without_port(sock: SocketType | socket.socket, host: str, *more: int) -> None:
    """Bind the socket to C{host}, but not to a port. The kernel chooses the port at connect(2): one
    that is free for connections to this target.

    @param more: what follows the port in an IPv6 address of the socket module.
    """
    sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
    sock.bind((host, 0, *more))


def bind_as_visitor(sock: SocketType | socket.socket, family: int, host: str) -> None:
    """Bind the socket to the address of a visitor, which this host need not have, but not to a
    port. Raises C{OSError}."""
    sock.setsockopt(*_TRANSPARENT[family], 1)
    bind_without_port(sock, host)


def bound_receive_buffer(sock: SocketType | socket.socket, *, is_near: bool) -> None:
    """Limit the bytes from a target that wait here for a visitor that has stopped reading.

    The kernel lets a receive buffer grow to 6 MiB or more (net.ipv4.tcp_rmem), and all buffers
    share the host's memory for TCP (net.ipv4.tcp_mem). net.core.rmem_max may be lower than this
    limit.
    """
    size = NEAR_BUFFER if is_near else FAR_BUFFER
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def bound_unsent(sock: SocketType | socket.socket, size: int) -> None:
    """Report the socket as writable only while fewer than C{size} bytes are unsent
    (TCP_NOTSENT_LOWAT of tcp(7)); 0: whenever its buffer has room."""
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, size)


def tune_transport(transport: Any, *, is_target: bool = False) -> None:
    """Tune one of Twisted's transports in the same way; does nothing if it is not TCP."""
    if ITCPTransport.providedBy(transport) and not IUNIXTransport.providedBy(transport):
        transport.setTcpNoDelay(True)
        transport.setTcpKeepAlive(True)
        if is_target and ISystemHandle.providedBy(transport):
            handle: Any = transport.getHandle()
            bound_receive_buffer(handle, is_near=is_near(transport.getPeer().host))


@dataclass(frozen=True, slots=True)
class Arrival:
    """The addresses of a visitor's connection: numeric, each with its port.

    @ivar visitor: where it comes from.
    @ivar dialled: the address that it connected to.
    @ivar here: the address of this host to which its connection came. It differs from C{dialled}
        if a load balancer has sent the latter.
    @ivar header: the load balancer's header (PROXY protocol), unchanged; empty if there is none.
    """

    visitor: tuple[str, int]
    dialled: tuple[str, int]
    here: tuple[str, int]
    header: bytes = b""


class TargetFactory(ClientFactory):
    """Makes the protocol of one connection to a target.

    @ivar sent_ahead: set before C{buildProtocol} is called: how many of the bytes that were given
        to L{acme_alpn_proxy.interfaces.ITarget.connect} have been sent already.
    @ivar visitor: the numeric address of the visitor that it is for; empty if unknown.
    """

    noisy = False
    sent_ahead = 0
    visitor = ""

    def tell(self, answer: str) -> None:
        """Receive the result of a validation, in words, from a target that knows it."""

    def arrival(self) -> Arrival:
        """The addresses of the visitor's connection. This makes system calls."""
        raise NotImplementedError

    def lead_with(self, header: bytes) -> None:
        """The target is sent C{header} before the visitor's bytes."""
        raise NotImplementedError


def original_destination(descriptor: int, host: str) -> tuple[str, int] | None:
    """The address that a visitor connected to, before connection tracking translated it
    (SO_ORIGINAL_DST)."""
    is_v6 = ":" in host and not host.startswith("::ffff:")
    level, size = (socket.IPPROTO_IPV6, 28) if is_v6 else (socket.IPPROTO_IP, 16)
    same = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, descriptor)
    try:
        told = same.getsockopt(level, _SO_ORIGINAL_DST, size)
    except OSError:
        return None
    finally:
        same.detach()
    port = int.from_bytes(told[2:4], "big")
    if is_v6:
        return socket.inet_ntop(socket.AF_INET6, told[8:24]), port
    return socket.inet_ntop(socket.AF_INET, told[4:8]), port
