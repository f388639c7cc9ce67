"""Connecting to a numeric address."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from socket import SocketType
from time import monotonic
from typing import Any, Final

from twisted.internet.error import UserError, getConnectError
from twisted.internet.interfaces import IAddress, IConnector
from twisted.python.failure import Failure
from zope.interface import implementer

from ..host.routes import own_addresses
from ..interfaces import ITarget
from .connection import Connection
from .deadlines import DeadlineQueue, Unanswered
from .poller import Poller, RetryQueue
from .sockets import (
    TargetFactory,
    bind_as_visitor,
    bind_without_port,
    bound_receive_buffer,
    is_near,
    tune,
    twisted_address,
)

_WRITE: Final = select.EPOLLOUT
_NON_BLOCKING: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK

_SOURCES: Final = 250
"""How many addresses of 127.0.0.0/8 are used as source. Each has the ports of
net.ipv4.ip_local_port_range, 28,232 by default."""

_SOURCE_SECONDS: Final = 60.0
"""Seconds after which the usual source is tried again."""

_IP_FREEBIND: Final = 15
"""ip(7): bind to an address that no interface has."""

_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def _sources(family: int) -> list[str]:
    """The addresses, besides the usual one, from which to connect to a loopback target."""
    if family == socket.AF_INET:
        return [f"127.0.0.{last}" for last in range(2, _SOURCES)]
    try:
        own = own_addresses()
    except OSError:
        return []
    usable = (each for each in own if not each.is_link_local and not each.is_loopback)
    return [str(each) for each in usable if each.version == 6]


def _is_connected(sock: SocketType) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


@implementer(ITarget)
class Dialer:
    """Connects to one numeric address."""

    def __init__(
        self,
        poller: Poller,
        retries: RetryQueue,
        deadlines: DeadlineQueue[Connector],
        family: int,
        address: Any,
    ) -> None:
        """
        @param deadlines: made with L{Connector.expire}.
        @param address: in the socket module's form.
        """
        self.poller = poller
        self.retries = retries
        self.deadlines = deadlines
        self.destination = twisted_address(address)
        self._is_near = is_near(self.destination.host)
        self._sources: deque[str] = deque()
        self._source_ends = 0.0
        self._family = family
        self._address = address

    def connect(self, factory: TargetFactory, first: bytes = b"") -> Connector | None:
        sock, problem, sent = self.dial(first)
        if not problem:
            factory.sent_ahead = sent
            self.establish(sock, factory.buildProtocol(self.destination))
            return None
        connector = Connector(self, factory)
        connector.take(sock, problem)
        return connector

    def dial(self, first: bytes = b"", visitor: str | None = None) -> tuple[Any, int | None, int]:
        """Make a socket, connect it, and send C{first}, as far as that works without waiting.

        @param visitor: the source address, which may be any; C{None}: one of this host's.
        @return: the socket, or C{None}; an C{errno} that prevents the connection, or 0
            (C{EINPROGRESS}: it only takes time); and how many bytes of C{first} were sent.
        """
        sock = None
        try:
            sock = self._socket(visitor)
            problem = sock.connect_ex(self._address)
            if problem == errno.EADDRNOTAVAIL and self._is_near and visitor is None:
                sock.close()
                sock, problem = self._dial_from_another_source()
            if problem and problem != errno.EINPROGRESS:
                return sock, problem, 0
            # Over loopback the socket is connected now, even after EINPROGRESS. To try costs less
            # than to wait; and the target can work while this process makes its own objects.
            return sock, 0, sock.send(first)
        except BlockingIOError:
            return sock, errno.EINPROGRESS, 0
        except OSError as error:
            return sock, error.errno, 0

    def _socket(self, visitor: str | None = None) -> SocketType:
        sock = SocketType(self._family, _NON_BLOCKING)
        # The visitor's bytes follow at once: the last ACK of the handshake goes with them.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        # Before connecting, so that the window scale fits the buffer.
        bound_receive_buffer(sock, is_near=self._is_near)
        if visitor is not None:
            try:
                bind_as_visitor(sock, self._family, visitor)
            except OSError:
                sock.close()
                raise
        elif self._sources:
            if monotonic() > self._source_ends:
                self._sources.clear()
            else:
                bind_without_port(sock, self._sources[0])
        return sock

    def _dial_from_another_source(self) -> tuple[SocketType, int]:
        """All local ports to the target are in use with this source: use another one for a while.

        A loopback target accepts connections from every address of this host, which includes all of
        127.0.0.0/8.
        """
        if not self._sources:
            self._sources.extend(_sources(self._family))
        self._source_ends = monotonic() + _SOURCE_SECONDS
        for _ in range(len(self._sources) or 1):
            sock = self._socket()
            problem = sock.connect_ex(self._address)
            if problem != errno.EADDRNOTAVAIL:
                break
            sock.close()
            self._sources.rotate(-1)
        return sock, problem

    def establish(self, sock: SocketType, protocol: Any) -> Connection | None:
        """Give a connected socket its protocol, if the factory makes one."""
        if protocol is None:
            sock.close()
            return None
        tune(sock, is_near=self._is_near)
        connection = Connection(self.poller, sock, self._address, protocol)
        connection.begin(read=False)
        return connection


class BoundDialer(Dialer):
    """Connects to an address of this host, and from that same address."""

    def _socket(self, visitor: str | None = None) -> SocketType:
        sock = super()._socket()
        # An IPv6 address that is this host's only through a local route is on no interface.
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        bind_without_port(sock, self._address[0], *self._address[2:])
        return sock


@implementer(IConnector)
class Connector:
    """An attempt to connect that has to wait. It ends with a protocol, or with a call of
    C{clientConnectionFailed}."""

    __slots__ = (
        "_connection",
        "_dialer",
        "_factory",
        "_pending",
        "_registered",
        "_socket",
        "_visitor",
    )

    def __init__(self, dialer: Dialer, factory: TargetFactory, visitor: str | None = None) -> None:
        """
        @param visitor: see L{Dialer.dial}.
        """
        self._dialer = dialer
        self._factory = factory
        self._visitor = visitor
        self._pending = self._registered = False
        self._socket: SocketType | None = None
        self._connection: Connection | None = None

    def connect(self) -> None:
        self.take(*self._dialer.dial(b"", self._visitor)[:2])

    def take(self, sock: SocketType | None, problem: int | None) -> None:
        """Go on with the result of L{Dialer.dial}."""
        self._pending = True
        self._dialer.deadlines.add(self)
        self._judge(sock, problem)

    def getDestination(self) -> IAddress:
        return self._dialer.destination

    def stopConnecting(self) -> None:
        self._fail(UserError())

    def disconnect(self) -> None:
        if self._connection is not None:
            self._connection.loseConnection()
        else:
            self.stopConnecting()

    def expire(self) -> None:
        """There was no answer in time."""
        self._fail(Unanswered(f"no answer within {self._dialer.deadlines.seconds:g} s"))

    def ready(self, events: int) -> None:
        if self._socket is None:
            return
        problem = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem or _is_connected(
            self._socket
        ):  # if not, it is another connection's event: see Poller.forget
            self._judge(self._leave_poller(), problem)

    def connectionLost(self, reason: Failure) -> None:
        self._fail(reason.value)

    def _retry(self) -> None:
        if self._pending:
            self._judge(*self._dialer.dial(b"", self._visitor)[:2])

    def _judge(self, sock: SocketType | None, problem: int | None) -> None:
        self._socket = sock
        if problem == errno.EINPROGRESS:
            assert sock is not None
            self._dialer.poller.add(sock.fileno(), self, _WRITE)
            self._registered = True
        elif problem:
            error = OSError(problem, os.strerror(problem))
            if problem in _SHORT:
                self._close()
                self._dialer.retries.report(error)
                self._dialer.retries.add(self._retry)
            else:
                self._fail(getConnectError(error))
        else:
            assert sock is not None
            protocol = self._factory.buildProtocol(self._dialer.destination)
            self._end()
            self._socket = None
            self._connection = self._dialer.establish(sock, protocol)

    def _fail(self, problem: BaseException | None) -> None:
        if self._pending:
            self._end()
            self._close()
            self._factory.clientConnectionFailed(self, Failure(problem))

    def _end(self) -> None:
        self._pending = False
        self._dialer.deadlines.discard(self)

    def _close(self) -> None:
        sock = self._leave_poller()
        self._socket = None
        if sock is not None:
            sock.close()

    def _leave_poller(self) -> SocketType | None:
        if self._registered:
            assert self._socket is not None
            self._registered = False
            self._dialer.poller.remove(self._socket.fileno())
        return self._socket
