"""The lean listening port on real loopback sockets, its poller turned by hand."""

from __future__ import annotations

import errno
import os
import select
from typing import Any

from twisted.internet.interfaces import IListeningPort, IPushProducer
from zope.interface.verify import verifyObject

from acme_alpn_proxy.transports.port import adopt

from ..loopback import reset
from .transport_case import HalfNoting, TransportCase


class PortTests(TransportCase):
    def test_interfaces(self) -> None:
        """It is a listening port, and a producer of connections."""
        verifyObject(IListeningPort, self.port)
        verifyObject(IPushProducer, self.port)
        host: Any = self.port.getHost()
        self.assertEqual((host.host, host.port), self.listener.getsockname())

    def test_many(self) -> None:
        """If many connections wait, all are accepted, in several turns."""
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
        """If there are other events too, up to 33 waiting connections are accepted at once, but
        none after one of them has paused the port."""
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
        """While paused, also by a connection that it accepts, it leaves new connections in the
        backlog."""
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
        """If the factory makes no protocol, the connection is closed."""
        self.kind = lambda: None
        visitor = self.visit()
        self.turn_all()
        self.assertEqual(visitor.recv(1), b"")

    def test_error_in_the_factory(self) -> None:
        """If the factory fails, the connection is closed, and the next one is accepted."""
        self.kind = lambda: 1 // 0
        visitor = self.visit()
        self.turn_all()
        self.assertEqual(visitor.recv(1), b"")
        self.assertEqual([line["log_level"].name for line in self.lines], ["critical"])
        self.flushLoggedErrors(ZeroDivisionError)
        _, protocol = self.connect()
        protocol.transport.abortConnection()

    def test_stopped_by_the_first(self) -> None:
        """If a connection that the port accepts stops it, the port accepts no other."""
        visitor = self.visit()
        self.kind = lambda: self.port.stopListening() and HalfNoting()
        self.turn_all()
        self.assertEqual(len(self.accepted), 1)
        visitor.close()
        self.accepted[0].transport.abortConnection()

    def test_addresses(self) -> None:
        """The factory gets the peer's address."""
        told: list[Any] = []
        self.patch(self.factory, "buildProtocol", told.append)
        visitor = self.visit()
        self.turn_all()
        self.assertEqual((told[0].host, told[0].port), visitor.getsockname())

    def test_adopt(self) -> None:
        """A connection that was accepted elsewhere can be adopted, unless it has gone."""
        self.port.pauseProducing()
        visitor = self.visit()
        adopt(self.poller, self.listener.accept()[0], self.factory)
        self.assertEqual(self.accepted[0].story, ["made"])
        self.accepted[0].transport.abortConnection()
        visitor = self.visit()
        ours, _ = self.listener.accept()
        reset(visitor)
        adopt(self.poller, ours, self.factory)
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
        """A visitor who left before being accepted delays nobody."""
        self.fail_to_accept(errno.ECONNABORTED, 1)
        visitor = self.visit()
        self.turn(lambda: self.accepted)
        self.accepted[-1].transport.abortConnection()
        visitor.close()

    def test_another_waits(self) -> None:
        """While an accepted visitor waits for a descriptor, no other is accepted."""
        story: list[str] = []
        self.retries.add(lambda: story.append(f"{len(self.accepted)} accepted"))
        visitor = self.visit()
        self.turn_all()
        self.reactor.advance(0.1)
        self.turn_all()
        self.assertEqual((story, len(self.accepted)), (["0 accepted"], 1))
        self.accepted[-1].transport.abortConnection()
        visitor.close()
