"""Connecting as visitors on real loopback sockets, the poller turned by hand.

Other addresses of loopback stand for visitors', so that no privilege and no way back is needed.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from twisted.internet.error import ConnectError, UserError
from twisted.logger import LogLevel
from zope.interface.verify import verifyObject

from acme_alpn_proxy.interfaces import ITarget
from acme_alpn_proxy.transports import dialer, source
from acme_alpn_proxy.transports.deadlines import DeadlineQueue
from acme_alpn_proxy.transports.dialer import Connector, Dialer
from acme_alpn_proxy.transports.source import ANSWERS_WITHIN, VisitorSource

from .transport_case import Client, TransportCase, answerless

VISITOR, ANOTHER = "127.0.0.9", "127.0.0.10"


class SourceTests(TransportCase):
    def setUp(self) -> None:
        super().setUp()
        self.port.pauseProducing()
        self.problems: list[int] = []
        self.counted = 0
        self.patch(dialer, "bind_as_visitor", self.bind)
        self.where = self.listener.getsockname()
        self.source = VisitorSource(
            self.dialer_to(socket.AF_INET, self.where, 10), self.dialer_to, self.count
        )
        verifyObject(ITarget, self.source)

    def count(self) -> None:
        self.counted += 1

    def bind(self, sock: Any, family: int, host: str) -> None:
        if self.problems:
            raise OSError(self.problems.pop(), "no")
        sock.bind((host, 0))

    def dialer_to(self, family: int, address: Any, seconds: float = ANSWERS_WITHIN) -> Dialer:
        deadlines: DeadlineQueue[Connector] = DeadlineQueue(self.reactor, seconds, Connector.expire)
        self.addCleanup(deadlines.close)
        return Dialer(self.poller, self.retries, deadlines, family, address)

    def dial(self, visitor: str, first: bytes = b"hello") -> tuple[Any, Client]:
        """Connect with first bytes, without which the last ACK of the handshake would be late."""
        client = Client()
        client.visitor = visitor
        connector = self.source.connect(client, first)
        self.addCleanup(lambda: [made.transport.abortConnection() for made in client.made])
        return connector, client

    def comes_from(self) -> str:
        """The address that the target sees."""
        connection, (host, _) = self.listener.accept()
        self.addCleanup(connection.close)
        return str(host)

    def test_at_once(self) -> None:
        """The target sees the visitor's address, has the first bytes at once, and it is counted."""
        self.source.use([self.where])
        connector, client = self.dial(VISITOR)
        self.assertEqual((connector, client.ahead), (None, [5]))
        self.assertEqual((self.comes_from(), self.counted), (VISITOR, 1))

    def test_not_used(self) -> None:
        """Before it is used, after that, and for visitors of the other family the target sees this
        host's address."""
        self.dial(VISITOR)
        self.source.use([self.where])
        self.dial("2001:db8::1")
        self.source.use_none()
        self.dial(VISITOR)
        self.assertEqual([self.comes_from() for _ in range(3)], ["127.0.0.1"] * 3)
        self.assertEqual(self.counted, 0)

    def test_ipv6(self) -> None:
        """A visitor by IPv6 is connected to the target's IPv6 address."""
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            self.source.use([self.where, listener.getsockname()[:2]])
            self.dial("::1")
            connection, _ = listener.accept()
            with connection:
                self.assertEqual(connection.recv(9), b"hello")
        self.assertEqual(self.counted, 1)

    def test_no_answer(self) -> None:
        """Without an answer within 0.3 s it is connected from this host's address, the next time at
        once; the log tells of the first such visitor. Others are not concerned."""
        self.source.use([answerless(self)])
        _, client = self.dial(VISITOR)
        self.reactor.advance(0.29)
        self.assertEqual((client.made, client.failures), ([], []))
        self.reactor.advance(0.01)
        self.assertEqual((self.comes_from(), client.ahead), ("127.0.0.1", [5]))
        self.assertIsNone(self.dial(VISITOR)[0])
        self.dial(ANOTHER)
        self.reactor.advance(0.3)
        lines = [event for event in self.lines if "visitor" in event]
        self.assertEqual([event["visitor"] for event in lines], [VISITOR])
        self.source.use([self.where])
        self.dial("127.0.0.11")
        seen = [self.comes_from() for _ in range(3)]
        self.assertEqual(seen, ["127.0.0.1", "127.0.0.1", "127.0.0.11"])

    def test_answer_that_takes_time(self) -> None:
        """An answer within 0.3 s is waited for."""
        self.source.use([self.where])
        self.patch(self.source._dialers[False], "dial", self.slow_dial())
        _, client = self.dial(VISITOR)
        self.assertEqual(client.made, [])
        self.turn(lambda: client.made)
        self.assertEqual((self.comes_from(), self.counted), (VISITOR, 1))
        self.reactor.advance(1)
        self.assertEqual(client.failures, [])

    def slow_dial(self) -> Any:
        """A function that connects, and reports that the connection is not there yet."""
        real = self.source._dialers[False].dial

        def dial(first: bytes, visitor: str | None = None) -> tuple[Any, int | None, int]:
            sock, _, _ = real(first, visitor)
            return sock, errno.EINPROGRESS, 0

        return dial

    def test_nobody_is_answered(self) -> None:
        """If the target answers nobody, the proxy waits for it, and does not remember the visitor
        as unanswered."""
        silent = answerless(self)
        self.source.use([silent])
        self.source.plain = self.dialer_to(socket.AF_INET, silent, 10)
        connector, client = self.dial(VISITOR)
        self.reactor.advance(0.3)
        self.assertEqual((client.failures, self.source._unanswered), ([], {}))
        connector.stopConnecting()
        client.failures[0].trap(UserError)

    def test_stopped(self) -> None:
        """A visitor that leaves meanwhile is not connected at all."""
        self.source.use([answerless(self)])
        connector, client = self.dial(VISITOR)
        connector.stopConnecting()
        client.failures[0].trap(UserError)
        self.reactor.advance(1)
        self.assertEqual((client.made, len(client.failures)), ([], 1))

    def test_address_that_cannot_be(self) -> None:
        """If the kernel refuses a visitor's address, the proxy connects from this host's address at
        once, and for the next visitor from the visitor's own."""
        self.source.use([self.where])
        self.problems = [errno.EADDRNOTAVAIL]
        for _ in range(2):
            self.dial(VISITOR)
        self.assertEqual([self.comes_from(), self.comes_from()], ["127.0.0.1", VISITOR])

    def test_not_permitted(self) -> None:
        """Once the privilege is gone it is not tried again, and the log says so once."""
        self.source.use([self.where])
        self.problems = [errno.EPERM]
        for _ in range(2):
            self.dial(VISITOR)
        self.assertEqual([self.comes_from(), self.comes_from()], ["127.0.0.1"] * 2)
        warnings = [event for event in self.lines if event.get("log_level") is LogLevel.warn]
        self.assertEqual(len(warnings), 1)

    def test_target_is_down(self) -> None:
        """If nobody listens at the target, the attempt fails at once."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = closed.getsockname()
        self.source.use([address])
        self.source.plain = self.dialer_to(socket.AF_INET, address, 10)
        _, client = self.dial(VISITOR)
        client.failures[0].trap(ConnectError)
        self.assertEqual(self.source._unanswered, {})

    def test_bounded(self) -> None:
        """Of many visitors without an answer the first ones are forgotten."""
        self.patch(source, "MOST_UNANSWERED", 2)
        self.source.use([answerless(self)])
        for number in (9, 10, 11):
            self.dial(f"127.0.0.{number}")
            self.reactor.advance(0.3)
        self.assertEqual(list(self.source._unanswered), ["127.0.0.10", "127.0.0.11"])
