"""The reactor that waits in the poller of the lean transports."""

from __future__ import annotations

import socket
from typing import Any, cast

from twisted.internet.protocol import ServerFactory
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.transports.interfaces import IPoller, IPollerHost
from acme_alpn_proxy.transports.poller import Poller, RetryQueue
from acme_alpn_proxy.transports.port import Port
from acme_alpn_proxy.transports.reactor import ProxyReactor

from .transport_case import Noting, Restless


class ProxyReactorTests(SynchronousTestCase):
    """Not the global one; turned by hand."""

    def setUp(self) -> None:
        self.reactor = cast(Any, ProxyReactor())
        self.reactor._handleSignals = lambda: None
        self.addCleanup(self.close)
        self.poller = Poller(self.reactor)

    def close(self) -> None:
        for reader in self.reactor.removeAll():
            reader.connectionLost(None)
        self.reactor._poller.close()

    def accept(self) -> list[Noting]:
        """Visit a port of the poller's; the protocols that the visitors of one turn get."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        made: list[Noting] = []
        factory = ServerFactory()

        def build(address: object) -> Noting:
            made.append(Noting())
            return made[-1]

        self.patch(factory, "buildProtocol", build)
        port = Port(self.poller, RetryQueue(self.reactor), listener, factory)
        port.startListening()
        visitor = socket.create_connection(listener.getsockname(), 5)
        self.addCleanup(visitor.close)
        self.reactor.doIteration(5)
        port.stopListening()
        for protocol in made:
            protocol.transport.abortConnection()
        return made

    def always_ready(self) -> socket.socket:
        """A socket with a byte that is never read."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            self.addCleanup(end.close)
        theirs.send(b"x")
        return ours

    def test_interfaces(self) -> None:
        """It implements what a poller needs, and the poller what it needs."""
        verifyObject(IPollerHost, self.reactor)
        self.poller.open()
        self.addCleanup(self.poller.close)
        verifyObject(IPoller, self.poller)

    def test_poller(self) -> None:
        """The poller's events are handled in the first turn, without a reader in between."""
        self.poller.open()
        self.addCleanup(self.poller.close)
        self.assertNotIn(self.poller, self.reactor.getReaders())
        self.assertEqual(len(self.accept()), 1)

    def test_all_else(self) -> None:
        """The reactor also handles its own events, with the poller and without it."""
        told: list[str] = []
        self.poller.open()
        self.reactor.callFromThread(told.append, "with it")
        self.reactor.doIteration(None)
        self.reactor.runUntilCurrent()
        self.poller.close()
        self.reactor.callFromThread(told.append, "without it")
        self.reactor.doIteration(None)
        self.reactor.runUntilCurrent()
        self.assertEqual(told, ["with it", "without it"])

    def test_second_poller(self) -> None:
        """One more poller is a reader as elsewhere."""
        first = Poller(self.reactor)
        first.open()
        self.addCleanup(first.close)
        self.poller.open()
        self.assertIn(self.poller, self.reactor.getReaders())
        self.assertEqual(len(self.accept()), 1)
        self.poller.close()
        self.assertNotIn(self.poller, self.reactor.getReaders())

    def test_own_turn(self) -> None:
        """It goes on with the poller's events until there is something to do for itself."""
        self.poller.open()
        self.addCleanup(self.poller.close)
        ours = self.always_ready()
        for act in (
            lambda: self.reactor.callLater(0, bool),
            lambda: self.reactor.callFromThread(bool),
            self.reactor.stop,
            self.reactor.crash,
        ):
            self.reactor.running = True
            self.reactor._stopped = False
            restless = Restless()

            def ready(events: int, restless: Restless = restless, act: Any = act) -> None:
                restless.turns += 1
                if restless.turns == 100:
                    act()

            restless.ready = ready  # type: ignore[method-assign]
            self.poller.add(ours.fileno(), restless, self.poller.READ)
            self.reactor.doIteration(None)
            self.poller.remove(ours.fileno())
            self.assertIn(restless.turns, range(100, 120))
            self.reactor.runUntilCurrent()

    def test_due(self) -> None:
        """However busy the poller is, the turn ends when a call is due."""
        self.poller.open()
        self.addCleanup(self.poller.close)
        ours = self.always_ready()
        restless = Restless()
        self.poller.add(ours.fileno(), restless, self.poller.READ)
        told: list[str] = []
        self.reactor.running = True
        self.reactor.callLater(0.02, told.append, "due")
        while not told:
            self.reactor.doIteration(self.reactor.timeout())
            self.reactor.runUntilCurrent()
        self.assertGreater(restless.turns, 1)

    def test_closed_meanwhile(self) -> None:
        """The last event may close the poller: after that, the poller is not used."""
        self.poller.open()
        ours = self.always_ready()
        last = Restless()
        last.ready = lambda events: self.poller.close()  # type: ignore[method-assign]
        self.poller.add(ours.fileno(), last, self.poller.READ)
        self.reactor.doIteration(5)
        self.assertTrue(self.poller._epoll.closed)
