"""A TCP connection on Linux with few system calls and objects, for Twisted's protocols.

It does what Twisted's own transport does, with these differences: all descriptors are in one
L{Poller}; a protocol is informed of a reset at once, whether its transport is being read or not;
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
"""Bytes read at once: if a read returns this many, the sender is at full speed."""

_READ: Final = select.EPOLLIN
_WRITE: Final = select.EPOLLOUT
_RESET: Final = select.EPOLLERR
_FINISHED: Final = select.EPOLLRDHUP
_ENDED: Final = select.EPOLLERR | select.EPOLLHUP
_READ_OR_ENDED: Final = _READ | _ENDED
_WRITE_OR_ENDED: Final = _WRITE | _ENDED
_OVER: Final = _FINISHED | _ENDED
_CHANGES: Final = _READ | _FINISHED | select.EPOLLET
"""The events of a connection. Edge-triggered: each change is reported once. A connection that
ignored an event asks again later with EPOLL_CTL_MOD, which reports what is there at that time
(epoll(7))."""

_AT_ONCE: Final = int(socket.MSG_DONTWAIT)
"""accept(2) returns blocking sockets; passing MSG_DONTWAIT to each call saves one fcntl(2) per
connection."""

_NOT_REGISTERED: Final = 0

_GOES_ON, _FINISHES, _CLOSES = range(3)
"""Whether and how a connection ends once all bytes have been sent."""

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""The value of SO_LINGER for a linger of 0 seconds (socket(7))."""

_SO_MEMINFO: Final = 55
_MEMORY: Final = struct.Struct("12x3I")
"""The option of <asm-generic/socket.h>, and its value (<linux/sock_diag.h>): the size of the send
buffer, the bytes set aside, and the bytes queued for sending, all in bytes."""

_SIOCOUTQNSD: Final = 0x894B
"""From <linux/sockios.h>: the number of bytes not sent yet (SIOCOUTQ of tcp(7) also counts those
that are not acknowledged)."""

_log = Logger()

DONE: Final = Failure(ConnectionDone())
_ABORTED: Final = Failure(ConnectionAborted())


def _discard(data: bytes) -> None:
    """Drop C{data}: the connection has ended."""


@functools.cache
def _lost(problem: int | None) -> Failure:
    """The reason that C{connectionLost} gets for this C{errno}; made once, as resets are
    frequent."""
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

    @ivar connected: L{True} until C{connectionLost}.
    @ivar receive, finishing, waiting, producer: see L{IDescriptorTransport}.
    @ivar unsent: the limit on unsent bytes that is set on its socket; 0: none.
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
        @param address: the peer's, in the socket module's form.
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
        """Give the protocol its transport and, if C{read}, the bytes that have already arrived."""
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
        """Make the poller report data that is already there, as if it had just arrived."""
        if self._registered:
            self._poller.change(self._descriptor, self._registered)

    def _block(self) -> None:
        """Make the poller report when the kernel takes bytes again."""
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
        else:  # there is nothing more to read
            self.receive(data)

    def _finish(self, data: bytes) -> None:
        """The end of the stream has been reported: read up to it, then give the protocol C{data}
        and the rest."""
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
        """Handle the peer's end-of-file; it is reported again if reading is resumed."""
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
        """End the connection as requested, once all earlier bytes have been sent."""
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
        """Close the socket and inform the protocol; a second call does nothing."""
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
