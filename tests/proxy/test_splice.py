"""The relay by splice(2) on real loopback sockets, turned by hand; and the pipe of all relays."""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import os
import select
import socket
import threading
from typing import Any

from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.internet.protocol import Protocol
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from acme_alpn_proxy.proxy import splice
from acme_alpn_proxy.proxy.relay import IRelay, TransportRelay
from acme_alpn_proxy.proxy.splice import PIPE_SIZE, SharedPipe, SpliceRelay, relay_between
from acme_alpn_proxy.transports.hangup import NoHangupWatch
from acme_alpn_proxy.transports.sockets import UNSENT

from ..loopback import reset, segments_in, was_reset
from ..transports.transport_case import TransportCase


@implementer(IHalfCloseableProtocol)
class End(Protocol):
    """Passes all events to the relay."""

    transport: Any
    relay: Any = None
    lost = False

    def dataReceived(self, data: bytes) -> None:
        self.relay.received(self.transport, data)

    def readConnectionLost(self) -> None:
        self.relay.finished(self.transport)

    def writeConnectionLost(self) -> None:
        pass

    def connectionLost(self, reason: Failure = ...) -> None:  # type: ignore[assignment]
        self.lost = True
        self.relay.lost(self.transport)


class SpliceRelayTests(TransportCase):
    """A visitor, the relay, a server."""

    def setUp(self) -> None:
        super().setUp()
        self.pipe = SharedPipe()
        self.addCleanup(self.pipe.close)
        self.visitor, self.front = self.connect(End)
        self.server, self.back = self.connect(End)
        self.visitor.settimeout(5)
        self.server.settimeout(5)
        self.relay: Any = relay_between(
            self.front.transport, self.back.transport, NoHangupWatch(), self.pipe
        )
        self.front.relay = self.back.relay = self.relay
        self.moves = 0
        self.patch(splice, "_splice", self.count_splice)
        self.relay.start(b"hello")
        self.assertEqual(self.server.recv(5), b"hello")

    def count_splice(self, source: int, sink: int, count: int) -> int:
        self.moves += 1
        return os.splice(source, sink, count, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)

    def fill(self, sender: socket.socket, content: bytes = bytes(1_000_000)) -> bytes:
        """Send until nothing is taken although the poller turns; returns the bytes sent."""
        sender.setblocking(False)
        sent = b""
        while select.select([], [sender], [], 0.05)[1] or not self.is_quiet():
            try:
                sent += content[: sender.send(content)]
            except BlockingIOError:
                pass
            if not self.is_quiet():
                self.poller.doRead()
        return sent

    def drain(self, receiver: socket.socket, count: int) -> bytes:
        """Receive that many bytes while the poller turns."""
        receiver.setblocking(False)
        both: list[Any] = [receiver, self.poller.fileno()]
        data = b""
        while len(data) < count:
            if select.select(both, [], [], 5)[0]:
                try:
                    data += receiver.recv(count - len(data))
                except BlockingIOError:
                    pass
                if not self.is_quiet():
                    self.poller.doRead()
            else:
                self.fail(f"{len(data)} bytes of {count} come")
        return data

    def test_interfaces(self) -> None:
        """For two lean transports, it is the relay with splice."""
        self.assertIsInstance(self.relay, SpliceRelay)
        verifyObject(IRelay, self.relay)
        self.fill(self.visitor)
        verifyObject(IPushProducer, self.back.transport.producer)

    def test_other_transports(self) -> None:
        """For any other pair, it is the relay that copies bytes."""
        for front, back in (
            (self.front.transport, StringTransport()),
            (StringTransport(), self.back.transport),
        ):
            made = relay_between(front, back, NoHangupWatch(), self.pipe)
            self.assertIs(type(made), TransportRelay)

    def test_sent_ahead(self) -> None:
        """Bytes that the target has already been sent are not sent again."""
        made = relay_between(self.front.transport, self.back.transport, NoHangupWatch(), self.pipe)
        made.start(b"hello", 3)
        self.assertEqual(self.server.recv(5), b"lo")
        self.assertEqual(made.moved, (5, 0))

    def test_last_words(self) -> None:
        """Bytes that came before a reset come out before it."""
        for far in ("visitor", "server"):
            sender = getattr(self, far)
            receiver = self.server if sender is self.visitor else self.visitor
            sender.sendall(b"last words")
            reset(sender)
            self.turn(lambda: self.front.lost and self.back.lost)
            self.assertEqual(receiver.recv(20), b"last words", far)
            self.assertTrue(was_reset(receiver))
            self.setUp()

    def test_small(self) -> None:
        """Small pieces are copied, without a pipe."""
        for _ in range(3):
            self.visitor.sendall(b"question")
            self.assertEqual(self.drain(self.server, 8), b"question")
            self.server.sendall(b"answer")
            self.assertEqual(self.drain(self.visitor, 6), b"answer")
        self.assertEqual(self.moves, 0)
        self.assertEqual(self.relay.moved, (5 + 3 * 8, 3 * 6))
        self.relay.received(self.front.transport, b"from elsewhere")
        self.assertEqual(self.drain(self.server, 14), b"from elsewhere")
        self.assertEqual(self.relay.moved, (5 + 3 * 8 + 14, 3 * 6))
        self.turn_all()

    def test_bulk(self) -> None:
        """Fast data moves through the pipe, which is empty and free for others while a receiver is
        slow: a little waits outside it. Nothing is lost."""
        sent = self.fill(self.visitor, os.urandom(1_000_000))
        self.assertGreater(self.moves, 0)
        self.assertFalse(self.pipe.lent)
        self.assertTrue(0 < len(self.back.transport.waiting) <= 65_536)
        received = self.drain(self.server, len(sent))
        self.assertEqual(hashlib.sha256(received).digest(), hashlib.sha256(sent).digest())
        self.assertEqual(self.relay.moved, (5 + len(sent), 0))
        self.turn_all()
        self.assertFalse(self.pipe.lent)

    def test_reads_on(self) -> None:
        """At first, only a little data waits unsent for a receiver. After the receiver has taken
        8 MiB, the proxy sets no bound."""
        for size, bound in ((4 << 20, UNSENT), (5 << 20, 0)):
            self.server.setblocking(True)
            sender = threading.Thread(target=self.server.sendall, args=(bytes(size),))
            sender.start()
            self.drain(self.visitor, size)
            sender.join()
            self.assertEqual(self.front.transport.unsent, bound)

    def test_small_again(self) -> None:
        """After the bulk small pieces are copied again."""
        self.drain(self.server, len(self.fill(self.visitor)))
        self.visitor.setblocking(True)
        self.visitor.sendall(b"small")
        self.assertEqual(self.drain(self.server, 5), b"small")
        moves = self.moves
        self.visitor.sendall(b"small")
        self.assertEqual(self.drain(self.server, 5), b"small")
        self.assertEqual(self.moves, moves)

    def test_end_behind_the_bulk(self) -> None:
        """A FIN follows the bytes in the pipe, and the other direction goes on."""
        sent = self.fill(self.visitor)
        self.visitor.shutdown(socket.SHUT_WR)
        self.turn_all()
        self.assertEqual(len(self.drain(self.server, len(sent))), len(sent))
        self.turn_all()
        self.server.setblocking(True)
        self.assertEqual(self.server.recv(1), b"")
        self.server.sendall(b"answer")
        self.assertEqual(self.drain(self.visitor, 6), b"answer")
        self.server.close()
        self.turn(lambda: self.front.lost and self.back.lost)
        self.visitor.setblocking(True)
        self.assertEqual(self.visitor.recv(1), b"")

    def test_end_with_the_last_bytes(self) -> None:
        """A FIN right after bytes leaves with them, as it came, in one segment."""
        for sender, receiver in ((self.server, self.visitor), (self.visitor, self.server)):
            before = segments_in(receiver)
            sender.sendall(b"the end")
            sender.shutdown(socket.SHUT_WR)
            self.turn(lambda: self.is_quiet())
            self.assertEqual((receiver.recv(10), receiver.recv(10)), (b"the end", b""))
            self.assertLessEqual(segments_in(receiver) - before, 1)
        self.turn(lambda: self.front.lost and self.back.lost)

    def test_end_in_bulk(self) -> None:
        """A FIN that splice(2) meets is passed on too."""
        self.relay._speed_up(self.front.transport)
        self.visitor.shutdown(socket.SHUT_WR)
        self.turn_all()
        self.assertEqual(self.server.recv(1), b"")

    def test_no_garbage(self) -> None:
        """Once both ends are gone, nothing is left for Python's collector, which may be late."""
        gc.disable()
        self.addCleanup(gc.enable)
        self.drain(self.server, len(self.fill(self.visitor)))
        reset(self.visitor)
        self.turn(lambda: self.front.lost and self.back.lost)
        address = id(self.relay)
        self.relay = self.front.relay = self.back.relay = None
        relays = [each for each in gc.get_objects() if type(each) is SpliceRelay]
        self.assertNotIn(address, map(id, relays))

    def test_nothing_there(self) -> None:
        """A splice that finds nothing returns the pipe."""
        self.relay._speed_up(self.front.transport)
        self.front.transport.doRead()
        self.assertEqual((self.moves, self.pipe.lent), (1, False))

    def test_reset_under_back_pressure(self) -> None:
        """A reset is passed on at once while bytes wait."""
        for sender, receiver in (("visitor", "server"), ("server", "visitor")):
            self.fill(getattr(self, sender))
            reset(getattr(self, sender))
            self.turn(lambda: self.front.lost and self.back.lost)
            self.assertTrue(was_reset(getattr(self, receiver)))
            self.assertFalse(self.pipe.lent)
            self.setUp()

    def test_receiver_resets(self) -> None:
        """A reset of the receiver, which did not take the bytes, is also passed on at once."""
        self.fill(self.visitor)
        reset(self.server)
        self.turn(lambda: self.front.lost and self.back.lost)
        self.assertTrue(was_reset(self.visitor))
        self.assertFalse(self.pipe.lent)

    def test_reset_met_by_splice(self) -> None:
        """A reset that is met while moving is passed on, from either side."""
        for broken, other in (("visitor", "server"), ("server", "visitor")):
            if broken == "server":
                self.visitor.sendall(b"x")
            reset(getattr(self, broken))
            self.relay._speed_up(self.front.transport)
            self.front.transport.doRead()
            self.assertTrue(self.front.lost)
            self.assertTrue(self.back.lost)
            self.assertTrue(was_reset(getattr(self, other)))
            self.assertFalse(self.pipe.lent)
            if broken == "server":  # its bytes are still in the pipe, and must reach nobody
                self.assertIsNone(self.pipe._kept)
            self.setUp()

    def test_reset_met_by_a_full_read(self) -> None:
        """A reset that meets the first bytes of a fast sender is passed on, and nothing else."""
        reset(self.server)
        self.front.transport.receive(bytes(self.front.transport.read_size))
        self.assertTrue(self.front.lost and self.back.lost)
        self.assertTrue(was_reset(self.visitor))

    def test_abort(self) -> None:
        """Aborted, both sides see a reset."""
        self.fill(self.visitor)
        self.relay.abort()
        self.assertTrue(was_reset(self.visitor))
        self.assertTrue(was_reset(self.server))
        self.assertFalse(self.pipe.lent)

    def test_no_pipe(self) -> None:
        """Without a pipe the bytes are copied."""
        self.pipe.lent = True
        content = os.urandom(1_000_000)
        sent = self.fill(self.visitor, content)
        self.assertEqual(self.moves, 0)
        self.assertEqual(self.drain(self.server, len(sent)), sent)

    def test_no_pipe_at_the_end(self) -> None:
        """The last bytes, which come with the FIN, are copied if no pipe is left for them."""
        self.pipe.lent = True
        self.relay._speed_up(self.front.transport)
        self.visitor.sendall(b"the end")
        self.visitor.close()
        self.assertEqual(self.drain(self.server, 7), b"the end")
        self.turn_all()
        self.assertEqual(self.server.recv(1), b"")

    def test_slow_at_once(self) -> None:
        """A target that does not take the bytes after the hello holds the visitor back."""
        hello = bytes(20_000_000)
        made = relay_between(self.front.transport, self.back.transport, NoHangupWatch(), self.pipe)
        self.front.relay = self.back.relay = made
        made.start(hello)
        self.assertTrue(self.back.transport.waiting)
        self.visitor.sendall(b"more")
        self.turn_all()
        self.assertEqual(made.moved, (len(hello), 0))
        self.drain(self.server, len(hello) + 4)
        self.assertEqual(made.moved, (len(hello) + 4, 0))


class SharedPipeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.pipe = SharedPipe()
        self.addCleanup(self.pipe.close)

    def test_lends(self) -> None:
        """A large non-blocking pipe is lent to one borrower at a time. If it comes back empty, it
        is lent again; if not, a new one is made."""
        one = self.pipe.borrow()
        assert one is not None
        self.assertIsNone(self.pipe.borrow())
        self.assertEqual(fcntl.fcntl(one[1], fcntl.F_GETPIPE_SZ), PIPE_SIZE)
        with self.assertRaises(BlockingIOError):
            os.read(one[0], 1)
        self.pipe.give_back(one)
        self.assertEqual(self.pipe.borrow(), one)
        os.write(one[1], b"of somebody else")
        self.pipe.discard(one)
        two = self.pipe.borrow()
        assert two is not None
        with self.assertRaises(BlockingIOError):
            os.read(two[0], 1)
        self.pipe.give_back(two)
        self.pipe.close()
        for end in (*one, *two):
            with self.assertRaises(OSError):
                os.fstat(end)

    def refuse(self, *arguments: Any) -> Any:
        raise OSError(errno.EMFILE, "too many")

    def test_no_descriptors(self) -> None:
        """Without descriptors, it has none to lend."""
        self.patch(os, "pipe2", self.refuse)
        self.assertIsNone(self.pipe.borrow())
        self.assertFalse(self.pipe.lent)

    def test_no_memory(self) -> None:
        """Over the user's share of memory a pipe is only smaller."""
        self.patch(fcntl, "fcntl", self.refuse)
        pipe = self.pipe.borrow()
        assert pipe is not None
        self.pipe.discard(pipe)
