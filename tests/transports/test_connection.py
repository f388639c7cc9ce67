"""The lean connection on real loopback sockets, its poller turned by hand."""

from __future__ import annotations

import os
import select
import socket

from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IConsumer,
    IHalfCloseableDescriptor,
    IPushProducer,
    IReadDescriptor,
    ITCPTransport,
    IWriteDescriptor,
)
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from acme_alpn_proxy.transports.connection import Connection
from acme_alpn_proxy.transports.interfaces import IDescriptorTransport
from acme_alpn_proxy.transports.sockets import twisted_address

from ..loopback import reset, was_reset
from .transport_case import HalfNoting, Noting, TransportCase, defect


@implementer(IPushProducer)
class Producer:
    """Records what a consumer asks for."""

    def __init__(self) -> None:
        self.story: list[str] = []

    def pauseProducing(self) -> None:
        self.story.append("pause")

    def resumeProducing(self) -> None:
        self.story.append("resume")

    def stopProducing(self) -> None:
        self.story.append("stop")


class ConnectionTests(TransportCase):
    def turn_until_lost(self, protocol: Noting) -> None:
        self.turn(lambda: protocol.reason)

    def test_interfaces(self) -> None:
        """For protocols, it is the same as Twisted's TCP transport."""
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
        self.assertEqual(protocol.transport.logPrefix(), "connection")

    def test_addresses(self) -> None:
        """It knows both its addresses."""
        visitor, protocol = self.connect()
        peer, host = protocol.transport.getPeer(), protocol.transport.getHost()
        self.assertEqual((peer.host, peer.port), visitor.getsockname())
        self.assertEqual((host.host, host.port), visitor.getpeername())
        self.assertEqual(twisted_address(("::1", 443, 0, 0)).host, "::1")

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
        """Bytes that have come with the connection are read at once."""
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
        """While paused, it does not read, and unread bytes do not make it spin."""
        visitor, protocol = self.connect()
        protocol.transport.pauseProducing()
        visitor.sendall(b"later")
        self.turn_all()
        self.assertEqual(protocol.data, b"")
        protocol.transport.resumeProducing()
        self.turn(lambda: protocol.data == b"later")

    def test_end_of_file(self) -> None:
        """An end-of-file is reported once, and once more if reading is resumed; writing still
        works."""
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
        """A protocol without half-closes is informed that the connection is lost; so is one that
        has sent its own FIN."""
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
        """A reset is reported at once: while reading, while paused, and after an end-of-file."""
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
            self.turn_until_lost(protocol)
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
        """A protocol may end the connection while it gets bytes, also the first ones."""

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
            protocol.on_data = defect
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
        """When a protocol gets the last bytes, it can see that they are the last; the end-of-file
        follows."""
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
        """Bytes that arrive while an announced end is read are given, and the end after them."""
        visitor, protocol = self.connect()
        visitor.sendall(b"one, ")
        real = protocol.transport._socket

        class Between:
            """Sends more, and the FIN, after the first read."""

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
        """An event of a closed connection does no harm, even if its descriptor's number is used
        again and a process that is being spawned still has a copy."""
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
        """An event of a connection that an earlier event of the same batch has ended does no harm
        to the next connection with the same number."""
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
        else:  # the kernel reported the event of the other connection first
            ours.close()


class WriteTests(TransportCase):
    """Back-pressure, and ends that come after waiting bytes."""

    def test_push_producer(self) -> None:
        """A producer is paused when the peer takes no further bytes, and resumed when all are
        sent."""
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
        """A pull producer is asked whenever no bytes wait."""
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
        """The end is sent after the waiting bytes, and later writes are dropped."""
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
        protocol.transport.trust()
        self.fill_from_here(protocol)
        waiting = len(protocol.transport.waiting)
        protocol.transport.doWrite()
        self.assertEqual(len(protocol.transport.waiting), waiting)

    def test_kernel_full(self) -> None:
        """Bytes written while the kernel takes none wait, and are sent in pieces later."""
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
        """A producer that is unregistered in the meantime does not bring the end forward."""
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
        """Another reader is called instead, until the connection is lost."""
        visitor, protocol = self.connect()
        story: list[str] = []

        def read() -> None:
            story.append("read")
            protocol.transport.read_by(None)
            protocol.transport.rearm()

        protocol.transport.read_by(read)
        visitor.sendall(b"x")
        self.turn(lambda: protocol.data)
        self.assertEqual(story, ["read"])
        protocol.transport.abortConnection()
        protocol.transport.read_by(read)
        self.assertEqual(protocol.transport.fileno(), -1)
