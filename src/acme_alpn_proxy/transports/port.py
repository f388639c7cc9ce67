"""Accepting connections from a listening socket, and taking over accepted ones."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from socket import SocketType
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IListeningPort, IPushProducer
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from .connection import DONE, Connection
from .poller import Poller, RetryQueue
from .sockets import UNSENT, bound_unsent, tune, twisted_address

_log = Logger()

_READ: Final = select.EPOLLIN

_ACCEPTS: Final = 32
"""Connections to accept before other events are handled."""

_INFO_SIZE: Final = 28
"""Bytes of C{struct tcp_info} (<linux/tcp.h>) up to and including C{tcpi_unacked}, which for a
listening socket is the number of connections that wait to be accepted (tcp_get_info in
net/ipv4/tcp.c)."""


_backlog: Final = struct.Struct("I").unpack_from


_VISITOR_GONE: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENONET,
        errno.EOPNOTSUPP,
    }
)
"""accept(2): errors of the connection that would have been accepted."""


def adopt(poller: Poller, visitor: socket.socket, factory: Factory) -> None:
    """Take over a connection that the caller has accepted."""
    sock = SocketType(visitor.family, visitor.type, visitor.proto, visitor.detach())
    tune(sock)
    try:
        address = sock.getpeername()
    except OSError:  # the visitor has left
        sock.close()
    else:
        _take(poller, sock, address, factory)


def _take(poller: Poller, sock: SocketType, address: Any, factory: Factory) -> None:
    """Give an accepted socket its protocol, and give the protocol the bytes that have arrived."""
    try:
        protocol = factory.buildProtocol(twisted_address(address))
    except Exception:
        _log.failure("Error in a factory")
        protocol = None
    if protocol is None:
        sock.close()
    else:
        connection = Connection(poller, sock, address, protocol)
        connection.unsent = UNSENT
        connection.begin(read=True)


@implementer(IListeningPort, IPushProducer)
class Port:
    """Accepts connections from the caller's listening socket, and gives each a protocol of the
    factory.

    It is a producer of connections: while it is paused, new connections wait in the backlog.
    """

    def __init__(
        self, poller: Poller, retries: RetryQueue, listener: socket.socket, factory: Factory
    ) -> None:
        """
        @param listener: non-blocking.
        """
        self._poller = poller
        self._retries = retries
        self._family = listener.family
        # socket.socket makes an object of a Python class for each accepted connection. This object
        # is of the C class below it, which does not.
        self._socket = SocketType(
            listener.family, listener.type, listener.proto, os.dup(listener.fileno())
        )
        self._socket.setblocking(False)
        self._factory = factory
        self._listening = False
        self._paused = False
        self._waiting = False

    def startListening(self) -> None:
        # On Linux, accepted sockets inherit both options.
        tune(self._socket)
        bound_unsent(self._socket, UNSENT)
        self._factory.doStart()
        self._poller.add(self._socket.fileno(), self, _READ)
        self._listening = True

    def stopListening(self) -> Deferred[None]:
        self.connectionLost(DONE)
        return succeed(None)

    def connectionLost(self, reason: Failure) -> None:
        if self._listening:
            self._listening = False
            self._poller.remove(self._socket.fileno())
            self._socket.close()
            self._factory.doStop()

    def getHost(self) -> IAddress:
        return twisted_address(self._socket.getsockname())

    def pauseProducing(self) -> None:
        self._paused = True
        self._update()

    def resumeProducing(self) -> None:
        self._paused = False
        self._update()

    def stopProducing(self) -> None:
        self.stopListening()

    def _update(self) -> None:
        if self._listening:
            idle = self._paused or self._waiting
            self._poller.change(self._socket.fileno(), select.EPOLLET if idle else _READ)

    def _wait(self) -> None:
        self._waiting = True
        self._update()
        self._retries.add(self._go_on)

    def _go_on(self) -> None:
        self._waiting = False
        self._update()

    def ready(self, events: int) -> None:
        if not self._accept() or not self._listening:
            return
        if self._poller.alone and not self._retries.reported:
            return  # probably no other connection waits; if one does, it is reported again
        # The number of waiting connections is read once the first one is accepted: that takes a
        # tenth of the time of an accept(2) without a result.
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
        (more,) = _backlog(info, _INFO_SIZE - 4)
        for _ in range(min(more, _ACCEPTS)):
            if not self._accept():
                return
        if more <= _ACCEPTS:
            self._retries.over()

    def _accept(self) -> bool:
        """Accept one visitor; return whether to go on with the next."""
        if self._paused or not self._listening:
            return False
        if self._retries.waiting:  # first accept the visitors that already wait for a retry
            self._wait()
            return False
        try:
            descriptor, address = self._socket._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            return False
        except OSError as problem:
            if problem.errno in _VISITOR_GONE:
                return True
            self._retries.report(problem)
            self._wait()
            return False
        sock = SocketType(self._family, socket.SOCK_STREAM, 0, descriptor)
        _take(self._poller, sock, address, self._factory)
        return True
