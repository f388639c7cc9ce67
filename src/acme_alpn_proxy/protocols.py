"""One connection: take the first bytes, decide the route, connect its target, relay.

C{ProxyServer} is the visitor's side, C{ProxyClient} the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.interfaces import (
    IAddress,
    IHalfCloseableProtocol,
    IReactorTime,
    IStreamClientEndpoint,
    ITCPTransport,
    IUNIXTransport,
)
from twisted.internet.protocol import (
    ClientFactory,
    Protocol,
    ServerFactory,
    connectionDone,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from .clienthello import ClientHello, ClientHelloParser, NotClientHello, Verdict
from .drain import LiveConnections
from .hangup import NoHangupWatch
from .interfaces import IHangupWatch
from .relay import TransportRelay
from .routing import Route, Routing
from .statistics import Passage, Statistics


def _tune(transport: Any) -> None:
    """Add no delay of our own (Nagle's), and find peers that vanished (TCP keepalive)."""
    if ITCPTransport.providedBy(transport) and not IUNIXTransport.providedBy(transport):
        transport.setTcpNoDelay(True)
        transport.setTcpKeepAlive(True)


def _show(peer: Any) -> str:
    """C{host:port}; a visitor by IPv4 to the dual-stack listener is shown as IPv4."""
    host = peer.host.removeprefix("::ffff:")
    return f"[{host}]:{peer.port}" if ":" in host else f"{host}:{peer.port}"


class Unanswered(Exception):
    """A target did not accept the connection in time."""


def _unanswered(result: object, seconds: float) -> Failure:
    return Failure(Unanswered(f"no answer within {seconds:g} s"))


@implementer(IHalfCloseableProtocol)
class ProxyClient(Protocol):
    """The connection to a target. All it hears goes to the relay, by way of the server side."""

    def __init__(self, server: ProxyServer) -> None:
        self._server = server

    def connectionMade(self) -> None:
        _tune(self.transport)

    def dataReceived(self, data: bytes) -> None:
        self._server.relay.received(self.transport, data)

    def readConnectionLost(self) -> None:
        self._server.relay.finished(self.transport)

    def writeConnectionLost(self) -> None:
        """Our own FIN went out: nothing to do."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._server.end_lost(self.transport)


class ProxyClientFactory(ClientFactory):
    """Makes the one L{ProxyClient} of a L{ProxyServer}."""

    noisy = False

    def __init__(self, server: ProxyServer) -> None:
        self._server = server

    def buildProtocol(self, addr: IAddress | None) -> ProxyClient:
        return ProxyClient(self._server)


@implementer(IHalfCloseableProtocol)
class ProxyServer(Protocol):
    """A visitor's connection.

    Undecided, it feeds the parser; decided, it is not read until its target is connected; then
    the relay has it. It is in the live set until the ends on both sides are gone.
    """

    factory: ProxyServerFactory
    relay: TransportRelay

    def __init__(self) -> None:
        self._parser = ClientHelloParser()
        self._connecting: Deferred[Any] | None = None
        self._passage: Passage | None = None
        self._relaying = False
        self._ends = 0

    def connectionMade(self) -> None:
        self._ends = 1
        self.factory.live.enter(self)
        _tune(self.transport)
        seconds = self.factory.hello_timeout
        self._deadline = self.factory.clock.callLater(
            seconds,
            self._decide,
            NotClientHello(f"no whole ClientHello within {seconds:g} s", "deadline"),
        )

    def dataReceived(self, data: bytes) -> None:
        if self._relaying:
            self.relay.received(self.transport, data)
        elif isinstance(verdict := self._parser.feed(data), ClientHello | NotClientHello):
            self._decide(verdict)

    def readConnectionLost(self) -> None:
        # Before the verdict the end-of-file is not remembered: the socket tells it again when the
        # relay starts to read, behind the bytes so far.
        if self._relaying:
            self.relay.finished(self.transport)
        else:
            self._decide(NotClientHello("end of file before a whole ClientHello", "end_of_file"))

    def writeConnectionLost(self) -> None:
        """Our own FIN went out: nothing to do."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._deadline.active():
            self._deadline.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
        self.factory.hangups.discard(self.transport)
        self.end_lost(self.transport)

    def end_lost(self, transport: object) -> None:
        """One of the two ends is gone."""
        if self._relaying:
            self.relay.lost(transport)
        self._ends -= 1
        if not self._ends:
            if self._passage is not None:
                moved = self.relay.moved if self._relaying else (0, 0)
                self.factory.statistics.ended(self._passage, *moved)
            self.factory.live.leave(self)

    def abort(self) -> None:
        """Reset both ends."""
        if self._relaying:
            self.relay.abort()
        else:
            self.transport.abortConnection()  # type: ignore[union-attr]

    def _decide(self, verdict: Verdict) -> None:
        if self._deadline.active():
            self._deadline.cancel()
        self.transport.pauseProducing()  # type: ignore[union-attr]
        self.factory.hangups.add(self.transport, self.abort)
        route = self.factory.routing.route(verdict)
        self.factory.log_route(self.transport.getPeer(), route, verdict)  # type: ignore[union-attr]
        self._passage = self.factory.statistics.decided(
            route,
            verdict,
            lambda: _show(self.transport.getPeer()),  # type: ignore[union-attr]
        )
        self._connecting = self.factory.connect(route, self)
        self._connecting.addCallbacks(self._connected, self._unreachable, errbackArgs=(route,))

    def _connected(self, client: ProxyClient) -> None:
        self._connecting = None
        self._ends += 1
        self.factory.hangups.discard(self.transport)
        self.relay = TransportRelay(self.transport, client.transport, self.factory.hangups)
        self._relaying = True
        first, self._parser.received = bytes(self._parser.received), bytearray()
        self.relay.start(first)

    def _unreachable(self, failure: Failure, route: Route) -> None:
        self._connecting = None
        if failure.check(CancelledError, ConnectingCancelledError) is None:
            assert self._passage is not None
            self.factory.statistics.unreachable(self._passage, failure.getErrorMessage())
            self.factory.log_unreachable(route, failure)
            self.abort()


class ProxyServerFactory(ServerFactory):
    """Makes a L{ProxyServer} for each visitor, and holds what they share.

    @ivar live: the connections that have not ended.
    @ivar statistics: the numbers of all connections.
    @ivar hangups: set by whoever starts and ends the service.
    """

    noisy = False
    protocol = ProxyServer  # type: ignore[assignment]
    _log = Logger()

    def __init__(
        self,
        routing: Routing,
        endpoints: Mapping[Route, IStreamClientEndpoint],
        clock: IReactorTime,
        *,
        hello_timeout: float = 5.0,
        connect_timeout: float = 10.0,
    ) -> None:
        """
        @param endpoints: how to connect each route's target.
        @param hello_timeout: seconds until a connection without a whole hello goes to the fallback.
        @param connect_timeout: seconds until a target counts as unreachable.
        """
        self.routing = routing
        self.clock = clock
        self.hello_timeout = hello_timeout
        self.live = LiveConnections()
        self.statistics = Statistics(routing)
        self.hangups: IHangupWatch = NoHangupWatch()
        self._endpoints = endpoints
        self._connect_timeout = connect_timeout

    def connect(self, route: Route, server: ProxyServer) -> Deferred[Any]:
        """A Deferred of the L{ProxyClient} connected to the route's target."""
        connecting = self._endpoints[route].connect(ProxyClientFactory(server))
        return connecting.addTimeout(self._connect_timeout, self.clock, _unanswered)

    def log_route(self, peer: Any, route: Route, verdict: Verdict) -> None:
        """One line a decision: ACME at C{info}, visitors at C{debug}."""
        if route is self.routing.acme:
            self._log.info(
                "Routed {peer} to {route} target {target}, server name {server_name}",
                peer=_show(peer),
                route=route.name,
                target=route.target,
                server_name=getattr(verdict, "server_name", None),
            )
        else:
            self._log.debug(
                "Routed {peer} to {route} target {target}: {verdict}",
                peer=_show(peer),
                route=route.name,
                target=route.target,
                verdict=verdict,
            )

    def log_unreachable(self, route: Route, failure: Failure) -> None:
        """Which target, and why."""
        self._log.error(
            "Cannot reach {route} target {target}: {why}",
            route=route.name,
            target=route.target,
            why=failure.getErrorMessage(),
        )
