"""What the sockets of all transports have in common."""

from __future__ import annotations

import socket
from socket import SocketType
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import ITCPTransport, IUNIXTransport
from twisted.internet.protocol import ClientFactory


def twisted_address(address: Any) -> IPv4Address | IPv6Address:
    """Twisted's form of a socket's address."""
    return IPv4Address("TCP", *address) if len(address) == 2 else IPv6Address("TCP", *address)


def tune(sock: SocketType | socket.socket, *, is_near: bool = False) -> None:
    """Send without Nagle's delay, and find peers that vanished (TCP keepalive).

    @param is_near: the peer is on this host, where the kernel reports its end in any case.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not is_near:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def tune_transport(transport: Any) -> None:
    """The same for one of Twisted's transports; does nothing if that is not TCP."""
    if ITCPTransport.providedBy(transport) and not IUNIXTransport.providedBy(transport):
        transport.setTcpNoDelay(True)
        transport.setTcpKeepAlive(True)


class TargetFactory(ClientFactory):
    """Makes the protocol of one connection to a target.

    @ivar sent_ahead: set before C{buildProtocol} is called: how many of the bytes that were given
        to L{acme_alpn_proxy.interfaces.ITarget.connect} have been sent already.
    """

    noisy = False
    sent_ahead = 0
