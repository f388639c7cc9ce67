"""Connecting on real loopback sockets, the poller turned by hand."""

from __future__ import annotations

import errno
import select
import socket
from typing import Any

from twisted.internet.error import ConnectError, UserError
from twisted.internet.interfaces import IConnector
from zope.interface.verify import verifyObject

from acme_alpn_proxy.interfaces import ITarget
from acme_alpn_proxy.transports import dialer
from acme_alpn_proxy.transports.deadlines import DeadlineQueue, Unanswered
from acme_alpn_proxy.transports.dialer import Connector, Dialer
from acme_alpn_proxy.transports.sockets import NEAR_BUFFER, twisted_address

from ..loopback import segments_in
from .transport_case import Client, TransportCase, answerless, defect


class ConnectorTests(TransportCase):
    def setUp(self) -> None:
        super().setUp()
        self.port.pauseProducing()
        self.deadlines: DeadlineQueue[Connector] = DeadlineQueue(self.reactor, 10, Connector.expire)
        self.addCleanup(self.deadlines.close)
        self.client = Client()

    def dial(self, address: Any = None, first: bytes = b"") -> Any:
        where = address or self.listener.getsockname()
        target = Dialer(self.poller, self.retries, self.deadlines, socket.AF_INET, where)
        verifyObject(ITarget, target)
        return target.connect(self.client, first)

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        self.addCleanup(connection.close)
        return connection

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

    def test_receive_buffer(self) -> None:
        """What a target may send before a visitor takes it is limited: twice what is asked for
        (socket(7)), or what the host allows. It does not grow."""
        self.dial()
        tcp = self.client.made[0].transport
        size = tcp._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        with socket.socket() as asking:
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NEAR_BUFFER)
            self.assertEqual(size, asking.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
        tcp.abortConnection()

    def test_sent_ahead(self) -> None:
        """What the protocol is going to write first is on its way before there is a protocol."""
        self.dial(first=b"hello")
        target = self.accept()
        self.assertEqual(target.recv(9), b"hello")
        self.assertEqual(self.client.ahead, [5])
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
        """A refused connection is reported at once."""
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

        self.patch(dialer, "SocketType", Slow)

    def test_later(self) -> None:
        """The connector waits for an answer that takes time."""
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
        """A refusal that comes later is reported."""
        self.wait_for_answer()
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = closed.getsockname()
        self.dial(address)
        self.assertEqual(self.client.failures, [])
        self.turn(lambda: self.client.failures)
        self.client.failures[0].trap(ConnectError)

    def test_no_answer(self) -> None:
        """Without an answer, the attempt fails when its time is over, even if events of a closed
        connection with the same number have come."""
        connector = self.dial(answerless(self))
        self.turn_all()
        connector.ready(select.EPOLLIN | select.EPOLLHUP)
        self.assertEqual(self.client.made, [])
        self.reactor.advance(9.9)
        self.assertEqual(self.client.failures, [])
        self.reactor.advance(0.1)
        self.client.failures[0].trap(Unanswered)
        self.assertEqual(self.client.failures[0].getErrorMessage(), "no answer within 10 s")

    def test_stopped(self) -> None:
        """An attempt that is stopped fails, once; a later timeout or event changes nothing."""
        connector = self.dial(answerless(self))
        connector.disconnect()
        self.client.failures[0].trap(UserError)
        self.reactor.advance(10)
        connector.ready(select.EPOLLOUT)
        self.assertEqual(len(self.client.failures), 1)

    def be_short(self, times: int) -> None:
        """Let the next C{times} attempts to make a socket fail."""
        real = socket.SocketType
        left = [errno.EMFILE] * times

        def make(*arguments: Any) -> Any:
            if left:
                raise OSError(left.pop(), "short")
            return real(*arguments)

        self.patch(dialer, "SocketType", make)

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
        """If no socket can be made in time, the attempt fails, and no other follows."""
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
        """If the factory raises, its C{clientConnectionFailed} is called, and the error is
        logged."""
        self.wait_for_answer()
        self.client.kind = defect
        self.dial()
        self.turn_all()
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)
        self.client.failures[0].trap(KeyError)
