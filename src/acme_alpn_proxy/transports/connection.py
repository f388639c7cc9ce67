"""A TCP connection on Linux with few system calls and objects, for Twisted's protocols.

It does what Twisted's own transport does, with these differences: all descriptors are in one
L{Poller}; a protocol learns of a reset at once, whether its transport is being read or not;
C{connectionLost} is called before the call that ends the connection returns; a producer is paused
as soon as the kernel does not take all bytes; every connection has TCP_NODELAY from the start, and
SO_KEEPALIVE unless its peer is this host.
"""

from __future__ import annotations

import fcntl
import functools
import os
import select
import socket
import struct
import sys
from collections.abc import Callable
from socket import SocketType
from typing import Any, Final

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IConsumer,
    IHalfCloseableDescriptor,
    IHalfCloseableProtocol,
    IPushProducer,
    IReadDescriptor,
    ITCPTransport,
    IWriteDescriptor,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from .interfaces import IDescriptorTransport
from .poller import Poller
from .sockets import bound_unsent, twisted_address

READ_SIZE: Final = 65_536
"""Bytes read at once: a read that fills this finds a sender at full speed."""

_READ: Final = select.EPOLLIN
_WRITE: Final = select.EPOLLOUT
_RESET: Final = select.EPOLLERR
_FINISHED: Final = select.EPOLLRDHUP
_ENDED: Final = select.EPOLLERR | select.EPOLLHUP
_READ_OR_ENDED: Final = _READ | _ENDED
_WRITE_OR_ENDED: Final = _WRITE | _ENDED
_OVER: Final = _FINISHED | _ENDED
_CHANGES: Final = _READ | _FINISHED | select.EPOLLET
"""What a connection is registered for. Edge-triggered: each change is reported once. A connection
that ignored an event asks again later with EPOLL_CTL_MOD, which reports what is there by then
(epoll(7))."""

_AT_ONCE: Final = int(socket.MSG_DONTWAIT)
"""accept(2) returns blocking sockets; passing MSG_DONTWAIT to each call saves one fcntl(2) per
connection."""

_NOT_REGISTERED: Final = 0

_GOES_ON, _FINISHES, _CLOSES = range(3)
"""Whether and how a connection is to end once all has been sent."""

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""socket(7): SO_LINGER of 0 seconds."""

_SO_MEMINFO: Final = 55
_MEMORY: Final = struct.Struct("12x3I")
"""Of <asm-generic/socket.h>, and what it gives (<linux/sock_diag.h>): bytes of the send buffer,
bytes set aside, and bytes that are queued to be sent."""

_SIOCOUTQNSD: Final = 0x894B
"""Of <linux/sockios.h>: how many bytes are not sent yet (tcp(7) has SIOCOUTQ, with those that are
not acknowledged)."""

_log = Logger()

DONE: Final = Failure(ConnectionDone())
_ABORTED: Final = Failure(ConnectionAborted())


def _discard(data: bytes) -> None:
    """The connection has ended: its bytes go nowhere."""


@functools.cache
def _lost(problem: int | None) -> Failure:
    """The reason for C{connectionLost} after this C{errno}; made once: resets are frequent."""
    return Failure(ConnectionLost(f"{os.strerror(problem or 0)} ({problem})"))


@implementer(
    ITCPTransport,
    IConsumer,
    IPushProducer,
    IHalfCloseableDescriptor,
    IReadDescriptor,
    IWriteDescriptor,
    IDescriptorTransport,
)
class Connection:
    """A connected socket and its protocol.

    @ivar connected: until C{connectionLost}.
    @ivar receive, finishing, waiting, producer: see L{IDescriptorTransport}.
    @ivar unsent: the bound on unsent bytes that its socket has; 0: none.
    """

    __slots__ = (
        "_address",
        "_blocked",
        "_descriptor",
        "_ending",
        "_half_closes",
        "_paused",
        "_poller",
        "_reader",
        "_reading",
        "_registered",
        "_socket",
        "_streaming",
        "connected",
        "finishing",
        "producer",
        "protocol",
        "receive",
        "unsent",
        "waiting",
    )

    disconnecting = False
    read_size = READ_SIZE

    def __init__(self, poller: Poller, sock: SocketType, address: Any, protocol: Any) -> None:
        """
        @param address: the peer's, as the socket module has it.
        """
        self._poller = poller
        self._socket = sock
        self._descriptor = sock.fileno()
        self._address = address
        self.protocol = protocol
        self._half_closes = IHalfCloseableProtocol.providedBy(protocol)
        self.connected = True
        self.finishing = False
        self.waiting = b""
        self.producer: Any = None
        self.unsent = 0
        self.receive: Callable[[bytes], None]
        self._reading = True
        self._blocked = False
        self._registered = _NOT_REGISTERED
        self._ending = _GOES_ON
        self._streaming = self._paused = False
        self._reader: Callable[[], None] | None = None

    def begin(self, *, read: bool) -> None:
        """Give the protocol its transport, and, if C{read}, what has come by now."""
        try:
            self.receive = self.protocol.dataReceived
            self.protocol.makeConnection(self)
            if read and self.connected:
                self._read(0)
            if self.connected:
                events = _CHANGES | _WRITE if self._blocked else _CHANGES
                self._poller.add(self._descriptor, self, events)
                self._registered = events
        except Exception:
            reason = Failure()
            _log.failure("Error in a new connection", reason)
            self.connectionLost(reason)

    def ready(self, events: int) -> None:
        if self._reading and events & _READ_OR_ENDED:
            self._read(events)
        if self._blocked and events & _WRITE_OR_ENDED:
            self.doWrite()
        elif (
            events & _RESET
            and not self._reading
            and self.connected
            and (problem := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        ):
            self.connectionLost(_lost(problem))

    def rearm(self) -> None:
        """Have the poller report data that is there already, as if it had come just now."""
        if self._registered:
            self._poller.change(self._descriptor, self._registered)

    def _block(self) -> None:
        """Have the poller report when the kernel takes bytes again."""
        self._blocked = True
        if self._registered:
            self._registered |= _WRITE
            self._poller.change(self._descriptor, self._registered)

    # Reading

    def doRead(self) -> None:
        self._read(0)

    def _read(self, events: int) -> None:
        if self._reader is not None:
            self._reader()
            return
        try:
            data = self._socket.recv(READ_SIZE, _AT_ONCE)
        except BlockingIOError:
            return
        except OSError as problem:
            self.failed(problem)
            return
        if not data:
            self.readConnectionLost(DONE)
        elif len(data) == READ_SIZE:
            self.rearm()
            self.receive(data)
        elif events & _OVER:
            self._finish(data)
        else:  # there was no more
            self.receive(data)

    def _finish(self, data: bytes) -> None:
        """An end was announced: read it before C{data}, which came before it, is given."""
        try:
            rest = self._socket.recv(READ_SIZE, _AT_ONCE)
        except BlockingIOError:  # an event of another connection: see Poller.forget
            self.receive(data)
        except OSError as problem:
            self.receive(data)
            self.failed(problem)
        else:
            if rest:
                self.rearm()
            self.finishing = not rest
            self.receive(data + rest)
            if self.finishing and self._reading:
                self.readConnectionLost(DONE)

    def readConnectionLost(self, reason: Failure) -> None:
        """The peer's end-of-file; it is told again if reading is resumed."""
        if self._half_closes:
            self._reading = False
            self.protocol.readConnectionLost()
        else:
            self.connectionLost(reason)

    def read_by(self, reader: Callable[[], None] | None) -> None:
        if self.connected:
            self._reader = reader

    def pauseProducing(self) -> None:
        self._reading = False

    def resumeProducing(self) -> None:
        if not self._reading and self.connected:
            self._reading = True
            self.rearm()

    def stopProducing(self) -> None:
        self.loseConnection()

    # Writing

    def write(self, data: bytes, flags: int = 0) -> None:
        if not self.connected or self._ending:
            return
        if not self.waiting:
            try:
                sent = self._socket.send(data, flags | _AT_ONCE)
            except BlockingIOError:
                sent = 0
            except OSError as problem:
                self.failed(problem)
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._block()
        self.waiting += data
        if self.producer is not None and self._streaming and not self._paused:
            self._paused = True
            self.producer.pauseProducing()

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def doWrite(self) -> None:
        if not self.waiting:
            return
        try:
            sent = self._socket.send(self.waiting, _AT_ONCE)
        except BlockingIOError:
            return
        except OSError as problem:
            self.failed(problem)
            return
        self.waiting = self.waiting[sent:]
        if not self.waiting:
            self._blocked = False
            if self.producer is not None and (self._paused or not self._streaming):
                self._paused = False
                self.producer.resumeProducing()
            else:
                self._end()

    def room(self) -> int:
        memory = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMORY.size)
        buffer, _, queued = _MEMORY.unpack(memory)
        room: int = buffer - queued
        if self.unsent:
            unsent = fcntl.ioctl(self._descriptor, _SIOCOUTQNSD, bytes(4))
            room = min(room, self.unsent - int.from_bytes(unsent, sys.byteorder))
        return max(0, room)

    def trust(self) -> None:
        if self.unsent:
            self.unsent = 0
            bound_unsent(self._socket, 0)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self.producer is not None:
            raise RuntimeError(f"{self.producer} is still registered, {producer} cannot be")
        if not self.connected:
            producer.stopProducing()
            return
        self.producer, self._streaming, self._paused = producer, streaming, bool(self.waiting)
        if not streaming:
            producer.resumeProducing()
        elif self._paused:
            producer.pauseProducing()

    def unregisterProducer(self) -> None:
        self.producer = None
        if self._ending == _CLOSES:
            self._end()

    # The end

    def loseWriteConnection(self) -> None:
        if self.connected and not self._ending:
            self._ending = _FINISHES
            self._end()

    def loseConnection(self) -> None:
        if self.connected:
            self._ending = _CLOSES
            if not self.waiting and (self.producer is None or self._streaming):
                self.connectionLost(DONE)

    def _end(self) -> None:
        """End as was asked for, if all that was to be sent before has been."""
        if not self._ending or self.waiting or not (self.producer is None or self._streaming):
            return
        if self._ending == _CLOSES:
            self.connectionLost(DONE)
            return
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as problem:
            self.failed(problem)
        else:
            self.writeConnectionLost(DONE)

    def writeConnectionLost(self, reason: Failure) -> None:
        if self._half_closes:
            self.protocol.writeConnectionLost()

    def abortConnection(self) -> None:
        if self.connected:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.connectionLost(_ABORTED)

    def failed(self, problem: OSError) -> None:
        self.connectionLost(_lost(problem.errno))

    def connectionLost(self, reason: Failure) -> None:
        """Close the socket and tell the protocol; a second time it does nothing."""
        if not self.connected:
            return
        self.connected = False
        if self._registered:
            self._registered = _NOT_REGISTERED
            self._poller.forget(self._descriptor)
        self._reading = self._blocked = False
        self._descriptor = -1
        self._socket.close()
        producer, self.producer = self.producer, None
        if producer is not None:
            producer.stopProducing()
        self.waiting = b""
        self._reader = None
        self.receive = _discard
        protocol, self.protocol = self.protocol, None
        protocol.connectionLost(reason)

    # Facts

    def fileno(self) -> int:
        return self._descriptor

    def logPrefix(self) -> str:
        return "connection"

    def getPeer(self) -> IPv4Address | IPv6Address:
        return twisted_address(self._address)

    def getHost(self) -> IPv4Address | IPv6Address:
        return twisted_address(self._socket.getsockname())

    def getTcpNoDelay(self) -> bool:
        return bool(self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def setTcpNoDelay(self, enabled: bool) -> None:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, bool(enabled))

    def getTcpKeepAlive(self) -> bool:
        return bool(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(enabled))
