"""TCP on Linux with as few system calls and objects as it takes, for protocols of Twisted's kind.

What Twisted's own transports do, with these differences: all descriptors are in one L{Poller}; a
protocol hears of a reset at once, whether its transport is being read or not; C{connectionLost}
comes before the call that ends the connection returns; a producer is paused as soon as the kernel
does not take all; every connection has TCP_NODELAY from the start, and SO_KEEPALIVE unless its
peer is this host.
"""

from __future__ import annotations

import errno
import functools
import os
import select
import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address
from socket import SocketType
from typing import Any, Final, Protocol

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import (
    ConnectionAborted,
    ConnectionDone,
    ConnectionLost,
    UserError,
    getConnectError,
)
from twisted.internet.interfaces import (
    IAddress,
    IConnector,
    IConsumer,
    IHalfCloseableDescriptor,
    IHalfCloseableProtocol,
    IListeningPort,
    IPushProducer,
    IReactorTime,
    IReadDescriptor,
    ITCPTransport,
    IWriteDescriptor,
)
from twisted.internet.protocol import ClientFactory, Factory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from .deadlines import DeadlineQueue, Unanswered
from ..interfaces import IDescriptorTransport, IPoller, IPollerHost, ITarget

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
"""What a connection is registered for: it is told of each change, once. What it does not want now
it asks for again later, by EPOLL_CTL_MOD, which tells of what is there by then (epoll(7))."""

_AT_ONCE: Final = int(socket.MSG_DONTWAIT)
"""What accept(2) gives waits for whoever uses it; to say at each use that this one does not takes
no call."""

_NON_BLOCKING: Final = socket.SOCK_STREAM | socket.SOCK_NONBLOCK

_NOT_REGISTERED: Final = 0

_GOES_ON, _FINISHES, _CLOSES = range(3)
"""Whether and how a connection is to end once all has been sent."""

_EVENTS: Final = 256
_LOOKS: Final = 8
"""How often a poller that is one of the reactor's readers looks for events at each turn: what one
event leads to is often there at once, and a turn of the reactor costs more than a look."""

_ACCEPTS: Final = 32
"""Connections accepted before others get their turn."""

_INFO_SIZE: Final = 28
"""Bytes of C{struct tcp_info} (<linux/tcp.h>) up to and with C{tcpi_unacked}, which is the number
of those who wait to be accepted if the socket listens (tcp_get_info in net/ipv4/tcp.c)."""

_backlog: Final = struct.Struct("I").unpack_from

_RETRY: Final = 0.1
_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
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

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""socket(7): SO_LINGER of 0 seconds."""

_log = Logger()

_DONE: Final = Failure(ConnectionDone())
_ABORTED: Final = Failure(ConnectionAborted())


def _nothing(data: bytes) -> None:
    """Nobody is left to take bytes."""


@functools.cache
def _lost(problem: int | None) -> Failure:
    """How a protocol is told of an C{errno}: many a connection ends by a reset."""
    return Failure(ConnectionLost(f"{os.strerror(problem or 0)} ({problem})"))


class Handler(Protocol):
    """What is in a L{Poller}."""

    def ready(self, events: int) -> None:
        """epoll(7) reports C{events}; if it has ended meanwhile, it does nothing."""

    def connectionLost(self, reason: Failure) -> None:
        """C{ready} has raised an exception: end."""


@implementer(IPoller, IReadDescriptor)
class Poller:
    """One epoll for all lean descriptors, itself one of the reactor's or the other way round.

    @ivar alone: whether the event that is being handled was the only one.
    """

    READ = _READ

    def __init__(self, reactor: Any) -> None:
        """
        @param reactor: an C{IReactorFDSet}.
        """
        self._reactor = reactor
        self._handlers: dict[int, Handler] = {}
        self.alone = False

    def open(self) -> None:
        """To be called before anything is added."""
        self._epoll = select.epoll()
        if IPollerHost.providedBy(self._reactor):
            self._reactor.invite(self)
        else:
            self._reactor.addReader(self)

    def add(self, descriptor: int, handler: Handler, events: int) -> None:
        """Report C{events}, which are those of epoll(7), EPOLLERR and EPOLLHUP to C{handler}."""
        self._epoll.register(descriptor, events)
        self._handlers[descriptor] = handler

    def change(self, descriptor: int, events: int) -> None:
        """Report C{events} from now on, and those of them that are there already."""
        self._epoll.modify(descriptor, events)

    def remove(self, descriptor: int) -> None:
        """Report nothing of C{descriptor} any more."""
        self._epoll.unregister(descriptor)
        del self._handlers[descriptor]

    def forget(self, descriptor: int) -> None:
        """C{descriptor}, whose changes were reported (EPOLLET), is about to be closed.

        The kernel takes it out of the epoll then, unless a process about to be spawned holds a
        copy: a change of that is reported once, to nobody or to who has the number by then.
        """
        del self._handlers[descriptor]

    def close(self) -> None:
        """Report nothing any more."""
        if IPollerHost.providedBy(self._reactor):
            self._reactor.dismiss(self)
        else:
            self._reactor.removeReader(self)
        self._handlers.clear()
        self._epoll.close()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def doRead(self) -> None:
        for _ in range(_LOOKS):
            if not self.turn(0) or self._epoll.closed:
                return

    def turn(self, timeout: float) -> bool:
        handlers = self._handlers
        found = self._epoll.poll(timeout, _EVENTS)
        self.alone = len(found) == 1
        for descriptor, events in found:
            handler = handlers.get(descriptor)
            if handler is None:  # it has ended meanwhile
                continue
            try:
                handler.ready(events)
            except Exception:
                reason = Failure()
                _log.failure("Error in a connection", reason)
                handler.connectionLost(reason)
        return bool(found)

    def connectionLost(self, reason: Failure) -> None:
        """Part of L{IReadDescriptor}: the reactor ends with all its descriptors."""

    def logPrefix(self) -> str:
        return "poller"


class Shortage:
    """Too few descriptors, or too little memory: who meets it tries again a little later.

    @ivar waiting: who waits, the first one first.
    @ivar told: whether the log has been told, and it is not known to be over.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self.told = False
        self._timer: Any = None
        self.waiting: list[Callable[[], None]] = []

    def wait(self, retry: Callable[[], None]) -> None:
        """Call C{retry()} in a tenth of a second."""
        self.waiting.append(retry)
        if self._timer is None:
            self._timer = self._clock.callLater(_RETRY, self._retry)

    def tell(self, problem: OSError) -> None:
        """One line in the log, until it is over."""
        if not self.told:
            self.told = True
            _log.warn(
                "New connections wait: {problem}; is the limit on open files (ulimit -n) too low?",
                problem=problem.strerror,
            )

    def over(self) -> None:
        """All who waited to be accepted are."""
        self.told = False

    def close(self) -> None:
        """Nobody waits any more."""
        self.waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _retry(self) -> None:
        self._timer = None
        waiting, self.waiting = self.waiting, []
        for retry in waiting:
            retry()


def twisted_address(address: Any) -> IPv4Address | IPv6Address:
    """Twisted's form of a socket's address."""
    return IPv4Address("TCP", *address) if len(address) == 2 else IPv6Address("TCP", *address)


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
    @ivar receive, finishing, waiting, producer, sent_ahead: see L{IDescriptorTransport}.
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
        "_writer",
        "connected",
        "finishing",
        "producer",
        "protocol",
        "receive",
        "sent_ahead",
        "waiting",
    )

    disconnecting = False
    read_size = READ_SIZE

    def __init__(
        self, poller: Poller, sock: SocketType, address: Any, protocol: Any, sent_ahead: int = 0
    ) -> None:
        """
        @param address: the peer's, as the socket module has it.
        """
        self._poller = poller
        self._socket = sock
        self._descriptor = sock.fileno()
        self._address = address
        self.protocol = protocol
        self._half_closes = IHalfCloseableProtocol.providedBy(protocol)
        self.sent_ahead = sent_ahead
        self.connected = True
        self.finishing = False
        self.waiting = b""
        self.producer: Any = None
        self.receive: Callable[[bytes], None]
        self._reading = True
        self._blocked = False
        self._registered = _NOT_REGISTERED
        self._ending = _GOES_ON
        self._streaming = self._paused = False
        self._reader: Callable[[], None] | None = None
        self._writer: Callable[[], None] | None = None

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

    def again(self) -> None:
        """Be told of what there is to read, as if it had come just now."""
        if self._registered:
            self._poller.change(self._descriptor, self._registered)

    def _block(self) -> None:
        """Be told when the kernel takes bytes again."""
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
            self.readConnectionLost(_DONE)
        elif len(data) == READ_SIZE:
            self.again()
            self.receive(data)
        elif events & _OVER:
            self._finish(data)
        else:  # there was no more
            self.receive(data)

    def _finish(self, data: bytes) -> None:
        """An end was announced: read it before C{data}, which came before it, is given."""
        try:
            rest = self._socket.recv(READ_SIZE, _AT_ONCE)
        except BlockingIOError:  # another one's event: see Poller.forget
            self.receive(data)
        except OSError as problem:
            self.receive(data)
            self.failed(problem)
        else:
            if rest:
                self.again()
            self.finishing = not rest
            self.receive(data + rest)
            if self.finishing and self._reading:
                self.readConnectionLost(_DONE)

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
            self.again()

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
        if self._writer is not None:
            self._writer()
            return
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

    def write_by(self, writer: Callable[[], None] | None) -> None:
        if not self.connected:
            return
        self._writer = writer
        if writer is None:
            self._blocked = False
        else:
            self._block()

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
                self.connectionLost(_DONE)

    def _end(self) -> None:
        """End as was asked for, if all that was to be sent before has been."""
        if not self._ending or self.waiting or not (self.producer is None or self._streaming):
            return
        if self._ending == _CLOSES:
            self.connectionLost(_DONE)
            return
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as problem:
            self.failed(problem)
        else:
            self.writeConnectionLost(_DONE)

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
        self._reader = self._writer = None
        self.receive = _nothing
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


def _tune(sock: SocketType, *, is_near: bool = False) -> None:
    """Add no delay of our own (Nagle's), and find peers that vanished.

    @param is_near: the peer is on this host, and the kernel tells of its end, whatever that is.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not is_near:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def adopt(poller: Poller, visitor: socket.socket, factory: Factory) -> None:
    """Take over a connection that the caller has accepted."""
    sock = SocketType(visitor.family, visitor.type, visitor.proto, visitor.detach())
    _tune(sock)
    try:
        address = sock.getpeername()
    except OSError:  # the visitor has left
        sock.close()
    else:
        _take(poller, sock, address, factory)


def _take(poller: Poller, sock: SocketType, address: Any, factory: Factory) -> None:
    """Give an accepted socket its protocol, and that what has come by now."""
    try:
        protocol = factory.buildProtocol(twisted_address(address))
    except Exception:
        _log.failure("Error in a factory")
        protocol = None
    if protocol is None:
        sock.close()
    else:
        Connection(poller, sock, address, protocol).begin(read=True)


@implementer(IListeningPort, IPushProducer)
class Port:
    """Accepts from a listening socket, which stays its owner's, into the factory's protocols.

    As a producer of connections it can be paused: who comes then waits in the backlog.
    """

    def __init__(
        self, poller: Poller, shortage: Shortage, listener: socket.socket, factory: Factory
    ) -> None:
        """
        @param listener: non-blocking.
        """
        self._poller = poller
        self._shortage = shortage
        self._family = listener.family
        # socket.accept makes an object of Python's; this is the one of C under it.
        self._socket = SocketType(
            listener.family, listener.type, listener.proto, os.dup(listener.fileno())
        )
        self._socket.setblocking(False)
        self._factory = factory
        self._listening = False
        self._paused = False
        self._waiting = False

    def startListening(self) -> None:
        _tune(self._socket)  # on Linux what it accepts inherits this
        self._factory.doStart()
        self._poller.add(self._socket.fileno(), self, _READ)
        self._listening = True

    def stopListening(self) -> Deferred[None]:
        self.connectionLost(_DONE)
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
        self._shortage.wait(self._go_on)

    def _go_on(self) -> None:
        self._waiting = False
        self._update()

    def ready(self, events: int) -> None:
        if not self._accept() or not self._listening:
            return
        if self._poller.alone and not self._shortage.told:
            return  # nobody else has come, most likely; else there is the next look
        # How many more wait is asked when the first is on his way, and for a tenth of what an
        # accept(2) in vain takes.
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
        (more,) = _backlog(info, _INFO_SIZE - 4)
        for _ in range(min(more, _ACCEPTS)):
            if not self._accept():
                return
        if more <= _ACCEPTS:
            self._shortage.over()

    def _accept(self) -> bool:
        """Accept one visitor; whether the next one may be."""
        if self._paused or not self._listening:
            return False
        if self._shortage.waiting:  # a visitor that was accepted before comes first
            self._wait()
            return False
        try:
            descriptor, address = self._socket._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            return False
        except OSError as problem:
            if problem.errno in _VISITOR_GONE:
                return True
            self._shortage.tell(problem)
            self._wait()
            return False
        sock = SocketType(self._family, socket.SOCK_STREAM, 0, descriptor)
        _take(self._poller, sock, address, self._factory)
        return True


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
        shortage: Shortage,
        deadlines: DeadlineQueue[Connector],
        family: int,
        address: Any,
    ) -> None:
        """
        @param deadlines: made with L{Connector.expire}.
        @param address: as the socket module has it.
        """
        self.poller = poller
        self.shortage = shortage
        self.deadlines = deadlines
        self.destination = twisted_address(address)
        self._is_near = ip_address(self.destination.host).is_loopback
        self._family = family
        self._address = address

    def connect(self, factory: ClientFactory, first: bytes = b"") -> Connector | None:
        sock, problem, sent = self.dial(first)
        if not problem:
            self.establish(sock, factory.buildProtocol(self.destination), sent)
            return None
        connector = Connector(self, factory)
        connector.take(sock, problem)
        return connector

    def dial(self, first: bytes = b"") -> tuple[Any, int | None, int]:
        """Make a socket, connect it, and send C{first}, if all this takes no waiting.

        @return: the socket, if there can be one; what hinders its connection, an C{errno} or 0
            (C{EINPROGRESS}: nothing but time); and how much of C{first} was sent.
        """
        sock = None
        try:
            sock = SocketType(self._family, _NON_BLOCKING)
            # The visitor's bytes follow at once: the last ACK of the handshake goes with them.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            problem = sock.connect_ex(self._address)
            if problem and problem != errno.EINPROGRESS:
                return sock, problem, 0
            # Over loopback it is connected all the same. To try is cheaper than to wait, and the
            # target has something to do while the rest is made here.
            return sock, 0, sock.send(first)
        except BlockingIOError:
            return sock, errno.EINPROGRESS, 0
        except OSError as error:
            return sock, error.errno, 0

    def establish(self, sock: SocketType, protocol: Any, sent: int = 0) -> Connection | None:
        """Give a connected socket its protocol, if it is to have one."""
        if protocol is None:
            sock.close()
            return None
        _tune(sock, is_near=self._is_near)
        connection = Connection(self.poller, sock, self._address, protocol, sent)
        connection.begin(read=False)
        return connection


@implementer(IConnector)
class Connector:
    """An attempt to connect that has to wait; it ends in a protocol or in
    C{clientConnectionFailed}."""

    __slots__ = ("_connection", "_dialer", "_factory", "_pending", "_registered", "_socket")

    def __init__(self, dialer: Dialer, factory: ClientFactory) -> None:
        self._dialer = dialer
        self._factory = factory
        self._pending = self._registered = False
        self._socket: SocketType | None = None
        self._connection: Connection | None = None

    def connect(self) -> None:
        self.take(*self._dialer.dial()[:2])

    def take(self, sock: SocketType | None, problem: int | None) -> None:
        """Go on with what L{Dialer.dial} has given."""
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
        if problem or _is_connected(self._socket):  # else another one's event: see Poller.forget
            self._judge(self._leave_poller(), problem)

    def connectionLost(self, reason: Failure) -> None:
        self._fail(reason.value)

    def _retry(self) -> None:
        if self._pending:
            self._judge(*self._dialer.dial()[:2])

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
                self._dialer.shortage.tell(error)
                self._dialer.shortage.wait(self._retry)
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
