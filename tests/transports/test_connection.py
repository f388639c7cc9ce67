"""The lean transports on real loopback sockets, their poller turned by hand."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.error import ConnectError, ConnectionDone, ConnectionLost, UserError
from twisted.internet.interfaces import (
    IConnector,
    IConsumer,
    IHalfCloseableDescriptor,
    IHalfCloseableProtocol,
    IListeningPort,
    IPushProducer,
    IReadDescriptor,
    ITCPTransport,
    IWriteDescriptor,
)
from twisted.internet.protocol import ClientFactory, Factory, Protocol, ServerFactory
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from acme_alpn_proxy.transports import connection
from acme_alpn_proxy.transports.deadlines import DeadlineQueue, Unanswered
from acme_alpn_proxy.interfaces import IDescriptorTransport, ITarget
from acme_alpn_proxy.transports.connection import Connection, Connector, Dialer, Poller, Port, Shortage, twisted_address

from ..proxy.test_connection import was_reset
from .test_hangup import reset


class Noting(Protocol):
    """Takes notes of all it is told."""

    transport: Any

    def __init__(self) -> None:
        self.data = b""
        self.story: list[str] = []
        self.reason: Failure | None = None
        self.on_data: Callable[[], None] = lambda: None

    def connectionMade(self) -> None:
        self.story.append("made")

    def dataReceived(self, data: bytes) -> None:
        self.data += data
        self.on_data()

    def connectionLost(self, reason: Failure = ...) -> None:  # type: ignore[assignment]
        self.story.append("lost")
        self.reason = reason


@implementer(IHalfCloseableProtocol)
class HalfNoting(Noting):
    """Takes notes of both halves of an end, too."""

    def readConnectionLost(self) -> None:
        self.story.append("end of file")

    def writeConnectionLost(self) -> None:
        self.story.append("FIN sent")


@implementer(IPushProducer)
class Producer:
    """Takes notes of what a consumer asks for."""

    def __init__(self) -> None:
        self.story: list[str] = []

    def pauseProducing(self) -> None:
        self.story.append("pause")

    def resumeProducing(self) -> None:
        self.story.append("resume")

    def stopProducing(self) -> None:
        self.story.append("stop")


def segments_in(connection: socket.socket) -> int:
    """C{tcpi_segs_in} of C{struct tcp_info} (<linux/tcp.h>)."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 144)
    return int.from_bytes(info[140:], sys.byteorder)


class Restless:
    """Is told of the same event again and again."""

    turns = 0

    def ready(self, events: int) -> None:
        self.turns += 1

    def connectionLost(self, reason: Failure) -> None:
        pass


class TransportCase(SynchronousTestCase):
    """A listening port whose connections are protocols in C{accepted}."""

    def setUp(self) -> None:
        self.reactor = MemoryReactorClock()
        self.poller = Poller(self.reactor)
        self.poller.open()
        self.addCleanup(self.poller.close)
        self.shortage = Shortage(self.reactor)
        self.addCleanup(self.shortage.close)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.listener.close)
        self.accepted: list[Any] = []
        self.kind: Callable[[], Any] = HalfNoting
        self.factory: Factory = ServerFactory()
        self.factory.buildProtocol = self.build  # type: ignore[method-assign]
        self.port = Port(self.poller, self.shortage, self.listener, self.factory)
        self.port.startListening()
        self.addCleanup(self.port.stopListening)
        self.lines: list[dict[str, Any]] = []
        globalLogPublisher.addObserver(self.lines.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.lines.append)

    def build(self, address: Any) -> Any:
        protocol = self.kind()
        if protocol is not None:
            self.accepted.append(protocol)
        return protocol

    def is_quiet(self, seconds: float = 0.0) -> bool:
        """Whether the reactor would have nothing to do."""
        poll = select.poll()
        poll.register(self.poller.fileno(), select.POLLIN)
        return not poll.poll(seconds * 1000)

    def turn(self, done: Callable[[], Any], turns: int = 2_000) -> None:
        """Turn the poller until C{done()}, as the reactor would."""
        while not done():
            self.assertFalse(self.is_quiet(5), "nothing comes")
            self.poller.doRead()
            turns -= 1
            self.assertTrue(turns, "it spins")

    def turn_all(self) -> None:
        """Turn the poller until it is quiet; that it gets quiet is the proof that nothing spins."""
        for _ in range(2_000):
            if self.is_quiet(0.05):
                return
            self.poller.doRead()
        self.fail("it spins")

    def visit(self) -> socket.socket:
        visitor = socket.create_connection(self.listener.getsockname(), 5)
        self.addCleanup(visitor.close)
        return visitor

    def connect(self, kind: Callable[[], Any] = HalfNoting) -> tuple[socket.socket, Any]:
        """A visitor and the protocol of the connection."""
        self.kind = kind
        visitor, count = self.visit(), len(self.accepted)
        self.turn(lambda: len(self.accepted) > count)
        protocol = self.accepted[-1]
        self.addCleanup(lambda: protocol.transport.abortConnection())
        return visitor, protocol

    def fill_from_here(self, protocol: Any) -> int:
        """Write until something waits in the transport; how many bytes were written."""
        written = 0
        while not protocol.transport.waiting:
            protocol.transport.write(bytes(65_536))
            written += 65_536
        return written

    def read_all(self, visitor: socket.socket, count: int) -> None:
        """Read that many bytes while the poller turns."""
        visitor.settimeout(5)
        while count:
            count -= len(visitor.recv(count))
            if not self.is_quiet():
                self.poller.doRead()


class ConnectionTests(TransportCase):
    def test_interfaces(self) -> None:
        """It is what Twisted's TCP transport is, as far as protocols can tell."""
        _, protocol = self.connect()
        for interface in (
            ITCPTransport,
            IConsumer,
            IPushProducer,
            IHalfCloseableDescriptor,
            IReadDescriptor,
            IWriteDescriptor,
            IDescriptorTransport,
        ):
            verifyObject(interface, protocol.transport)
        verifyObject(IReadDescriptor, self.poller)
        self.assertEqual(self.poller.logPrefix(), "poller")
        self.poller.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(protocol.transport.logPrefix(), "connection")

    def test_addresses(self) -> None:
        """It knows both its addresses."""
        visitor, protocol = self.connect()
        peer, host = protocol.transport.getPeer(), protocol.transport.getHost()
        self.assertEqual((peer.host, peer.port), visitor.getsockname())
        self.assertEqual((host.host, host.port), visitor.getpeername())
        self.assertEqual(connection.twisted_address(("::1", 443, 0, 0)).host, "::1")

    def test_options(self) -> None:
        """It has TCP_NODELAY and SO_KEEPALIVE from the start, and they can be changed."""
        _, protocol = self.connect()
        tcp = protocol.transport
        self.assertTrue(tcp.getTcpNoDelay())
        self.assertTrue(tcp.getTcpKeepAlive())
        tcp.setTcpNoDelay(False)
        tcp.setTcpKeepAlive(False)
        self.assertFalse(tcp.getTcpNoDelay())
        self.assertFalse(tcp.getTcpKeepAlive())

    def test_first_bytes(self) -> None:
        """What has come with the connection is read with it."""
        with self.visit() as visitor:
            visitor.sendall(b"hello")
            self.turn(lambda: self.accepted)
            self.assertEqual(self.accepted[0].data, b"hello")
            self.accepted[0].transport.abortConnection()

    def test_bytes(self) -> None:
        """Bytes come and go."""
        visitor, protocol = self.connect()
        visitor.sendall(b"question")
        self.turn(lambda: protocol.data == b"question")
        protocol.transport.writeSequence([b"ans", b"wer"])
        self.assertEqual(visitor.recv(100), b"answer")
        self.turn_all()

    def test_pause(self) -> None:
        """Paused, it does not read, and does not spin over what it does not read."""
        visitor, protocol = self.connect()
        protocol.transport.pauseProducing()
        visitor.sendall(b"later")
        self.turn_all()
        self.assertEqual(protocol.data, b"")
        protocol.transport.resumeProducing()
        self.turn(lambda: protocol.data == b"later")

    def test_end_of_file(self) -> None:
        """An end-of-file is told once; if reading is resumed, once more; and it can still write."""
        visitor, protocol = self.connect()
        visitor.shutdown(socket.SHUT_WR)
        self.turn_all()
        self.assertEqual(protocol.story, ["made", "end of file"])
        protocol.transport.resumeProducing()
        self.turn_all()
        self.assertEqual(protocol.story, ["made", "end of file", "end of file"])
        protocol.transport.write(b"answer")
        protocol.transport.stopProducing()
        self.assertEqual(visitor.recv(100), b"answer")
        self.assertEqual(protocol.story[-1], "lost")

    def test_end_of_file_for_a_plain_protocol(self) -> None:
        """A protocol that knows of no halves hears that the connection is lost; so does one whose
        own FIN is sent."""
        visitor, protocol = self.connect(Noting)
        protocol.transport.loseWriteConnection()
        self.assertEqual(visitor.recv(1), b"")
        visitor.close()
        self.turn_all()
        self.assertEqual(protocol.story, ["made", "lost"])
        protocol.reason.trap(ConnectionDone)

    def test_both_ends_of_file(self) -> None:
        """After a FIN each way it does not spin."""
        visitor, protocol = self.connect()
        visitor.shutdown(socket.SHUT_WR)
        self.turn_all()
        protocol.transport.loseWriteConnection()
        self.assertEqual(visitor.recv(1), b"")
        visitor.close()
        self.turn_all()
        self.assertEqual(protocol.story, ["made", "end of file", "FIN sent"])
        protocol.transport.loseConnection()
        self.assertEqual(protocol.story[-1], "lost")

    def test_reset(self) -> None:
        """A reset is told at once: read from, paused, and after an end-of-file."""
        for prepare in (
            lambda visitor, protocol: None,
            lambda visitor, protocol: protocol.transport.pauseProducing(),
            lambda visitor, protocol: visitor.shutdown(socket.SHUT_WR),
            lambda visitor, protocol: self.fill_from_here(protocol),
        ):
            visitor, protocol = self.connect()
            prepare(visitor, protocol)
            self.turn_all()
            reset(visitor)
            self.turn(lambda protocol=protocol: protocol.reason)
            protocol.reason.trap(ConnectionLost)
            self.turn_all()

    def test_written_after_a_reset(self) -> None:
        """A write that meets a reset ends the connection, and so does a FIN."""
        for write in (
            lambda tcp: tcp.write(b"x"),
            lambda tcp: tcp.loseWriteConnection(),
        ):
            visitor, protocol = self.connect()
            reset(visitor)
            write(protocol.transport)
            self.assertEqual(protocol.story, ["made", "lost"])
            write(protocol.transport)
            protocol.transport.resumeProducing()
            protocol.transport.connectionLost(Failure(ConnectionDone()))
            self.assertEqual(protocol.story, ["made", "lost"])

    def test_abort(self) -> None:
        """Aborted, the peer sees a reset."""
        visitor, protocol = self.connect()
        protocol.transport.abortConnection()
        self.assertTrue(was_reset(visitor))
        self.assertEqual(protocol.story, ["made", "lost"])
        protocol.transport.abortConnection()

    def test_lost_while_it_reads(self) -> None:
        """A protocol may end the connection while it is given bytes, the first ones too."""

        def rash() -> Noting:
            protocol = Noting()
            protocol.on_data = lambda: protocol.transport.abortConnection()
            return protocol

        self.kind = rash
        visitor = self.visit()
        visitor.sendall(b"x")
        self.turn(lambda: self.accepted)
        self.assertEqual(self.accepted[0].story, ["made", "lost"])
        self.assertTrue(was_reset(visitor))

    def test_error_in_a_protocol(self) -> None:
        """A protocol that raises loses its connection, is logged, and others go on."""

        def broken() -> Noting:
            protocol = Noting()
            protocol.on_data = lambda: {}["no such key"]
            return protocol

        visitor, protocol = self.connect(broken)
        visitor.sendall(b"x")
        self.turn(lambda: protocol.reason)
        self.kind = broken
        other = self.visit()
        other.sendall(b"x")
        self.turn(lambda: len(self.accepted) == 2 and self.accepted[1].reason)
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 2)
        self.connect()

    def test_last_bytes(self) -> None:
        """Who is given the last bytes can know that they are; what follows is the end-of-file."""
        visitor, protocol = self.connect()
        finishing: list[bool] = []
        protocol.on_data = lambda: finishing.append(protocol.transport.finishing)
        visitor.sendall(b"not the last")
        self.turn(lambda: protocol.data)
        visitor.sendall(b"the last")
        visitor.close()
        self.turn_all()
        self.assertEqual(protocol.story, ["made", "end of file"])
        self.assertEqual(finishing, [False, True])

    def test_more_before_the_end(self) -> None:
        """What comes while an announced end is looked for is given, and the end after it."""
        visitor, protocol = self.connect()
        visitor.sendall(b"one, ")
        real = protocol.transport._socket

        class Between:
            """Sends more, and the FIN, behind the first read."""

            def recv(self, size: int, flags: int) -> bytes:
                data: bytes = real.recv(size)
                protocol.transport._socket = real
                visitor.sendall(b"two")
                visitor.shutdown(socket.SHUT_WR)
                return data

        protocol.transport._socket = Between()
        protocol.transport.ready(select.EPOLLIN | select.EPOLLRDHUP)
        self.assertEqual((protocol.data, protocol.story), (b"one, two", ["made"]))
        self.turn_all()
        self.assertEqual(protocol.story, ["made", "end of file"])

    def test_event_of_another(self) -> None:
        """The event of a closed connection whose number this one has, and that a process about to
        be spawned holds, does no harm."""
        visitor, protocol = self.connect()
        everything = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLHUP
        for events in (everything, everything | select.EPOLLERR):
            protocol.transport.ready(events)
            visitor.sendall(b"x")
            protocol.transport.ready(events)
            self.assertFalse(protocol.transport.finishing)
            protocol.transport.pauseProducing()
            protocol.transport.ready(events)
            protocol.transport.resumeProducing()
        self.turn_all()
        self.assertEqual((protocol.data, protocol.story), (b"xx", ["made"]))

    def test_closed_and_held_elsewhere(self) -> None:
        """A closed connection that another process holds is reported once at most."""
        visitor, protocol = self.connect()
        copy = os.dup(protocol.transport.fileno())
        self.addCleanup(os.close, copy)
        protocol.transport.loseConnection()
        visitor.sendall(b"to nobody")
        self.turn_all()
        self.assertEqual(protocol.data, b"")

    def test_number_used_again(self) -> None:
        """An event of one that an earlier event of the same batch has ended does no harm to its
        successor under the same number."""
        first, one = self.connect()
        second, two = self.connect()
        number = two.transport.fileno()
        ours, theirs = socket.socketpair()
        self.addCleanup(theirs.close)

        def replace() -> None:
            two.transport.abortConnection()
            os.dup2(ours.fileno(), number)
            ours.close()
            new = HalfNoting()
            sock = socket.SocketType(fileno=number)
            sock.setblocking(False)
            Connection(self.poller, sock, ("", 0), new).begin(read=False)
            self.accepted.append(new)
            one.transport.pauseProducing()

        one.on_data = replace
        first.sendall(b"x")
        reset(second)
        self.turn(lambda: len(self.accepted) == 3 or two.reason is not None)
        if len(self.accepted) == 3:
            self.turn_all()
            self.assertEqual(self.accepted[2].story, ["made"])
            self.accepted[2].transport.abortConnection()
        else:  # the kernel told the other one first
            ours.close()


class PollerTests(TransportCase):
    def test_others_get_their_turn(self) -> None:
        """One that always has something to do does not keep the reactor from all else."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            self.addCleanup(end.close)
        theirs.send(b"nobody reads this")
        restless = Restless()
        self.poller.add(ours.fileno(), restless, select.EPOLLIN)
        self.poller.doRead()
        self.assertLess(restless.turns, 100)
        self.poller.remove(ours.fileno())

    def test_what_follows_is_met_at_once(self) -> None:
        """What an event leads to, if it is there at once, needs no turn of the reactor."""
        one, two = self.connect(), self.connect()
        one[1].on_data = lambda: two[0].sendall(b"x")
        two[1].on_data = lambda: one[0].sendall(b"x") if len(two[1].data) < 3 else None
        one[0].sendall(b"x")
        self.poller.doRead()
        self.assertEqual((one[1].data, two[1].data), (b"xxx", b"xxx"))


class WriteTests(TransportCase):
    """Back-pressure, and ends behind bytes that wait."""

    def test_push_producer(self) -> None:
        """A producer is paused as soon as the peer takes no more, and resumed when all is gone."""
        visitor, protocol = self.connect()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        with self.assertRaises(RuntimeError):
            protocol.transport.registerProducer(producer, True)
        written = self.fill_from_here(protocol)
        protocol.transport.write(b"more")
        self.assertEqual(producer.story, ["pause"])
        self.read_all(visitor, written + 4)
        self.turn_all()
        self.assertEqual(producer.story, ["pause", "resume"])
        protocol.transport.abortConnection()
        self.assertEqual(producer.story, ["pause", "resume", "stop"])

    def test_pull_producer(self) -> None:
        """A producer that is to be asked is asked whenever nothing waits."""
        visitor, protocol = self.connect()
        producer = Producer()
        protocol.transport.registerProducer(producer, False)
        self.assertEqual(producer.story, ["resume"])
        written = self.fill_from_here(protocol)
        protocol.transport.loseConnection()
        self.read_all(visitor, written)
        self.turn_all()
        self.assertEqual(producer.story, ["resume", "resume"])
        self.assertEqual(protocol.story, ["made"])
        protocol.transport.unregisterProducer()
        self.assertEqual(protocol.story, ["made", "lost"])

    def test_producer_of_a_lost_connection(self) -> None:
        """A producer for a connection that is lost is stopped."""
        _, protocol = self.connect()
        protocol.transport.abortConnection()
        producer = Producer()
        protocol.transport.registerProducer(producer, True)
        self.assertEqual(producer.story, ["stop"])

    def test_end_behind_bytes(self) -> None:
        """An end is sent behind the bytes that wait, and nothing is taken after it."""
        for end in (
            lambda tcp: tcp.loseWriteConnection(),
            lambda tcp: tcp.loseConnection(),
        ):
            visitor, protocol = self.connect()
            written = self.fill_from_here(protocol)
            end(protocol.transport)
            end(protocol.transport)
            self.assertEqual(protocol.story, ["made"])
            protocol.transport.write(b"too late")
            self.read_all(visitor, written)
            self.turn_all()
            self.assertEqual(visitor.recv(100), b"")
            self.assertEqual(len(protocol.story), 2)

    def test_writes_at_once(self) -> None:
        """doWrite may be called at any time."""
        _, protocol = self.connect()
        protocol.transport.doWrite()
        self.fill_from_here(protocol)
        waiting = len(protocol.transport.waiting)
        protocol.transport.doWrite()
        self.assertEqual(len(protocol.transport.waiting), waiting)

    def test_kernel_full(self) -> None:
        """What is written when the kernel takes nothing waits, and goes out in pieces later."""
        visitor, protocol = self.connect()
        count = 0
        try:
            while True:
                count += protocol.transport._socket.send(bytes(65_536), socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        protocol.transport.write(bytes(20_000_000))
        self.assertEqual(len(protocol.transport.waiting), 20_000_000)
        self.read_all(visitor, count + 20_000_000)
        self.turn_all()
        self.assertEqual(protocol.transport.waiting, b"")

    def test_reset_before_the_rest(self) -> None:
        """A reset that is met when the rest is written ends the connection."""
        visitor, protocol = self.connect()
        self.fill_from_here(protocol)
        reset(visitor)
        protocol.transport.doWrite()
        self.assertEqual(protocol.story, ["made", "lost"])

    def test_producer_gone_before_the_rest(self) -> None:
        """A producer that goes meanwhile does not hasten the end."""
        visitor, protocol = self.connect()
        protocol.transport.registerProducer(Producer(), True)
        written = self.fill_from_here(protocol)
        protocol.transport.loseConnection()
        protocol.transport.unregisterProducer()
        self.assertEqual(protocol.story, ["made"])
        self.read_all(visitor, written)
        self.turn_all()
        self.assertEqual(protocol.story, ["made", "lost"])

    def test_reads_by_another(self) -> None:
        """Another reader and writer are called instead, until the connection is lost."""
        visitor, protocol = self.connect()
        story: list[str] = []

        def read() -> None:
            story.append("read")
            protocol.transport.read_by(None)
            protocol.transport.again()

        def write() -> None:
            story.append("write")
            protocol.transport.write_by(None)

        protocol.transport.read_by(read)
        protocol.transport.write_by(write)
        visitor.sendall(b"x")
        self.turn(lambda: protocol.data)
        self.assertEqual(sorted(story), ["read", "write"])
        protocol.transport.abortConnection()
        protocol.transport.read_by(read)
        protocol.transport.write_by(write)
        self.assertEqual(protocol.transport.fileno(), -1)


class PortTests(TransportCase):
    def test_interfaces(self) -> None:
        """It is a listening port, and a producer of connections."""
        verifyObject(IListeningPort, self.port)
        verifyObject(IPushProducer, self.port)
        host = self.port.getHost()
        self.assertEqual((host.host, host.port), self.listener.getsockname())  # type: ignore[attr-defined]

    def test_many(self) -> None:
        """Many who wait are all accepted, in turns."""
        visitors = [self.visit() for _ in range(100)]
        self.turn(lambda: len(self.accepted) == 100)
        self.turn_all()
        for visitor, protocol in zip(visitors, self.accepted, strict=True):
            visitor.close()
            protocol.transport.abortConnection()

    def pausing(self) -> HalfNoting:
        """A protocol that pauses the port as soon as it is made."""
        self.port.pauseProducing()
        return HalfNoting()

    def test_many_beside_others(self) -> None:
        """When others have come, too, as many as wait are accepted at a time, 33 at most, and none
        once it is paused by one of them."""
        for _ in range(40):
            self.visit()
        self.poller.alone = False
        self.port.ready(select.EPOLLIN)
        self.assertEqual(len(self.accepted), 33)
        self.kind = self.pausing
        self.port.ready(select.EPOLLIN)
        self.assertEqual(len(self.accepted), 34)
        self.port.ready(select.EPOLLIN)
        self.assertEqual(len(self.accepted), 34)
        self.kind = HalfNoting
        self.port.resumeProducing()
        self.turn(lambda: len(self.accepted) == 40)
        for protocol in self.accepted:
            protocol.transport.abortConnection()

    def test_pause(self) -> None:
        """Paused, also by one that it accepts, it leaves who comes in the backlog."""
        visitors = [self.visit() for _ in range(2)]
        self.kind = self.pausing
        self.turn_all()
        self.assertEqual(len(self.accepted), 1)
        self.port.resumeProducing()
        self.turn_all()
        self.assertEqual(len(self.accepted), 2)
        for visitor, protocol in zip(visitors, self.accepted, strict=True):
            protocol.transport.abortConnection()
            visitor.close()

    def test_stop(self) -> None:
        """Stopped, it leaves the listening socket to its owner; later calls do nothing."""
        visitor = self.visit()
        self.successResultOf(self.port.stopListening())
        self.port.resumeProducing()
        self.port.stopProducing()
        self.turn_all()
        self.assertEqual(self.accepted, [])
        self.listener.accept()[0].close()
        visitor.close()

    def test_refused_by_the_factory(self) -> None:
        """Whom the factory gives no protocol is closed."""
        self.kind = lambda: None
        visitor = self.visit()
        self.turn_all()
        self.assertEqual(visitor.recv(1), b"")

    def test_error_in_the_factory(self) -> None:
        """One for whom the factory fails is closed, and the next one is accepted."""
        self.kind = lambda: 1 // 0
        visitor = self.visit()
        self.turn_all()
        self.assertEqual(visitor.recv(1), b"")
        self.assertEqual([line["log_level"].name for line in self.lines], ["critical"])
        self.flushLoggedErrors(ZeroDivisionError)
        _, protocol = self.connect()
        protocol.transport.abortConnection()

    def test_stopped_by_the_first(self) -> None:
        """Stopped by one that it accepts, it asks for no more."""
        visitor = self.visit()
        self.kind = lambda: self.port.stopListening() and HalfNoting()
        self.turn_all()
        self.assertEqual(len(self.accepted), 1)
        visitor.close()
        self.accepted[0].transport.abortConnection()

    def test_addresses(self) -> None:
        """The factory is told who comes."""
        told: list[Any] = []
        self.factory.buildProtocol = lambda address: told.append(address)  # type: ignore
        visitor = self.visit()
        self.turn_all()
        self.assertEqual((told[0].host, told[0].port), visitor.getsockname())

    def test_adopt(self) -> None:
        """A connection that was accepted elsewhere can be given to it, unless it has gone."""
        self.port.pauseProducing()
        visitor = self.visit()
        connection.adopt(self.poller, self.listener.accept()[0], self.factory)
        self.assertEqual(self.accepted[0].story, ["made"])
        self.accepted[0].transport.abortConnection()
        visitor = self.visit()
        ours, _ = self.listener.accept()
        reset(visitor)
        connection.adopt(self.poller, ours, self.factory)
        self.assertEqual(len(self.accepted), 1)

    def fail_to_accept(self, problem: int, times: int) -> None:
        real = self.port._socket
        left = [problem] * times

        class Failing:
            family, type = real.family, real.type

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def _accept(self) -> Any:
                if left:
                    number = left.pop()
                    raise OSError(number, os.strerror(number))
                return real._accept()  # type: ignore[attr-defined]

        self.port._socket = Failing()  # type: ignore[assignment]

    def test_shortage(self) -> None:
        """Short of descriptors it pauses without spinning, says so once, and goes on later."""
        for problem in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            self.fail_to_accept(problem, 2)
            visitor, count = self.visit(), len(self.accepted)
            self.turn_all()
            self.reactor.advance(0.1)
            self.turn_all()
            self.assertEqual(len(self.accepted), count)
            self.reactor.advance(0.1)
            self.turn_all()
            self.assertEqual(len(self.accepted), count + 1)
            self.accepted[-1].transport.abortConnection()
            (line,) = [e for e in self.lines if "problem" in e]
            self.assertEqual(line["problem"], os.strerror(problem))
            self.lines.clear()
            visitor.close()

    def test_visitor_gone(self) -> None:
        """A visitor who has left before being accepted keeps nobody waiting."""
        self.fail_to_accept(errno.ECONNABORTED, 1)
        visitor = self.visit()
        self.turn(lambda: self.accepted)
        self.accepted[-1].transport.abortConnection()
        visitor.close()

    def test_another_waits(self) -> None:
        """While somebody who was accepted waits for a descriptor, nobody else is accepted."""
        story: list[str] = []
        self.shortage.wait(lambda: story.append(f"{len(self.accepted)} accepted"))
        visitor = self.visit()
        self.turn_all()
        self.reactor.advance(0.1)
        self.turn_all()
        self.assertEqual((story, len(self.accepted)), (["0 accepted"], 1))
        self.accepted[-1].transport.abortConnection()
        visitor.close()

    def test_shortage_closed(self) -> None:
        """Closed, it keeps no timer."""
        self.shortage.wait(lambda: None)
        self.shortage.close()
        self.assertEqual(self.reactor.getDelayedCalls(), [])


class Client(ClientFactory):
    """Takes notes of failures."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.failures: list[Failure] = []
        self.kind: Callable[[], Any] = HalfNoting

    def buildProtocol(self, address: Any) -> Any:
        protocol = self.kind()
        self.made.append(protocol)
        return protocol

    def clientConnectionFailed(self, connector: Any, reason: Failure) -> None:
        self.failures.append(reason)


class ConnectorTests(TransportCase):
    def setUp(self) -> None:
        super().setUp()
        self.port.pauseProducing()
        self.deadlines: DeadlineQueue[Connector] = DeadlineQueue(self.reactor, 10, Connector.expire)
        self.addCleanup(self.deadlines.close)
        self.client = Client()

    def dial(self, address: Any = None, first: bytes = b"") -> Any:
        where = address or self.listener.getsockname()
        dialer = Dialer(self.poller, self.shortage, self.deadlines, socket.AF_INET, where)
        verifyObject(ITarget, dialer)
        return dialer.connect(self.client, first)

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        self.addCleanup(connection.close)
        return connection

    def answerless(self) -> Any:
        """The address of a listener whose full queue drops SYNs."""
        full = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.addCleanup(full.close)
        for _ in range(3):
            waiting = socket.socket()
            self.addCleanup(waiting.close)
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        return full.getsockname()

    def test_at_once(self) -> None:
        """Over loopback it is connected when the call returns, without a delay of our own or
        keepalive, which a peer on this host does not need, and there is nothing to be stopped."""
        self.assertIsNone(self.dial())
        self.assertEqual(self.client.made[0].story, ["made"])
        tcp = self.client.made[0].transport
        self.assertTrue(tcp.getTcpNoDelay())
        self.assertFalse(tcp.getTcpKeepAlive())
        self.assertEqual(tcp.getPeer(), twisted_address(self.listener.getsockname()))
        self.assertEqual(self.reactor.getDelayedCalls(), [])
        tcp.loseConnection()
        self.assertEqual(self.client.made[0].story, ["made", "lost"])

    def test_sent_ahead(self) -> None:
        """What the protocol is going to write first is on its way before there is a protocol."""
        self.dial(first=b"hello")
        target = self.accept()
        self.assertEqual(target.recv(9), b"hello")
        self.assertEqual(self.client.made[0].transport.sent_ahead, 5)
        self.client.made[0].transport.abortConnection()

    def test_segments(self) -> None:
        """The ACK that ends the handshake goes with the first bytes: two segments, not three."""
        self.dial()
        self.client.made[0].transport.write(b"x")
        target = self.accept()
        self.assertEqual(target.recv(1), b"x")
        self.assertEqual(segments_in(target), 2)
        self.client.made[0].transport.abortConnection()

    def test_refused(self) -> None:
        """A refusal is told at once."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = closed.getsockname()
        self.dial(address)
        self.client.failures[0].trap(ConnectError)

    def test_no_way(self) -> None:
        """An address that the kernel will not connect to is a failure at once."""
        self.dial(("255.255.255.255", 1))
        self.client.failures[0].trap(ConnectError)

    def wait_for_answer(self) -> None:
        """Make the connector believe that the connection is not there yet."""
        real = socket.SocketType

        class Slow(real):  # type: ignore[misc,valid-type]
            def send(self, data: bytes, flags: int = 0) -> int:
                if not data:
                    raise BlockingIOError
                return super().send(data, flags)  # type: ignore[no-any-return]

        self.patch(connection, "SocketType", Slow)

    def test_later(self) -> None:
        """An answer that takes time is waited for."""
        self.wait_for_answer()
        connector = self.dial()
        verifyObject(IConnector, connector)
        self.assertEqual(self.client.made, [])
        self.turn(lambda: self.client.made)
        self.client.made[0].transport.write(b"x")
        self.assertEqual(self.accept().recv(1), b"x")
        self.assertEqual(self.client.made[0].transport.getPeer(), connector.getDestination())
        self.reactor.advance(10)
        connector.stopConnecting()
        connector.disconnect()
        self.assertEqual(self.client.made[0].story, ["made", "lost"])
        self.assertEqual(self.client.failures, [])

    def test_refused_later(self) -> None:
        """So is a refusal."""
        self.wait_for_answer()
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = closed.getsockname()
        self.dial(address)
        self.assertEqual(self.client.failures, [])
        self.turn(lambda: self.client.failures)
        self.client.failures[0].trap(ConnectError)

    def test_no_answer(self) -> None:
        """Without an answer it fails when the time is over, whatever events of a closed connection
        under the same number come meanwhile."""
        connector = self.dial(self.answerless())
        self.turn_all()
        connector.ready(select.EPOLLIN | select.EPOLLHUP)
        self.assertEqual(self.client.made, [])
        self.reactor.advance(9.9)
        self.assertEqual(self.client.failures, [])
        self.reactor.advance(0.1)
        self.client.failures[0].trap(Unanswered)
        self.assertEqual(self.client.failures[0].getErrorMessage(), "no answer within 10 s")

    def test_stopped(self) -> None:
        """Stopped, it fails; then the end of its time is no matter, nor an event that came."""
        connector = self.dial(self.answerless())
        connector.disconnect()
        self.client.failures[0].trap(UserError)
        self.reactor.advance(10)
        connector.ready(select.EPOLLOUT)
        self.assertEqual(len(self.client.failures), 1)

    def be_short(self, times: int) -> None:
        """Let no socket be made, that often."""
        real = socket.SocketType
        left = [errno.EMFILE] * times

        def make(*arguments: Any) -> Any:
            if left:
                raise OSError(left.pop(), "short")
            return real(*arguments)

        self.patch(connection, "SocketType", make)

    def test_shortage(self) -> None:
        """Without a descriptor it tries again until it has one; the log says so once."""
        self.be_short(2)
        self.dial()
        self.reactor.advance(0.1)
        self.assertEqual(self.client.made, [])
        self.reactor.advance(0.1)
        self.assertEqual(self.client.made[0].story, ["made"])
        self.assertEqual(len([e for e in self.lines if "problem" in e]), 1)
        self.client.made[0].transport.abortConnection()

    def test_shortage_for_long(self) -> None:
        """If there is none in time it fails, and tries no more."""
        self.be_short(1_000)
        self.dial()
        for _ in range(101):
            self.reactor.advance(0.1)
        self.client.failures[0].trap(Unanswered)
        self.reactor.advance(0.1)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_refused_by_the_factory(self) -> None:
        """Without a protocol the connection is closed."""
        self.client.kind = lambda: None
        self.dial()
        self.assertEqual(self.accept().recv(1), b"")

    def test_error_in_the_factory(self) -> None:
        """A factory that raises is told that it failed, and the error is logged."""
        self.wait_for_answer()
        self.client.kind = lambda: {}["no such key"]
        self.dial()
        self.turn_all()
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)
        self.client.failures[0].trap(KeyError)
