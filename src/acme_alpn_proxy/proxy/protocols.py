"""One connection: read the first bytes, decide the route, connect its target, relay.

L{ProxyServer} is the visitor's side, L{ProxyClient} the target's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from twisted.internet.interfaces import IAddress, IHalfCloseableProtocol, IReactorTime
from twisted.internet.protocol import Protocol, ServerFactory, connectionDone
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..host.routes import own_addresses
from ..host.tcpsockets import shown
from ..interfaces import ITarget
from ..transports.deadlines import DeadlineQueue
from ..transports.hangup import NoHangupWatch
from ..transports.interfaces import IHangupWatch
from ..transports.sockets import Arrival, TargetFactory, original_destination
from .clienthello import NEED_MORE, NOT_TLS, ClientHelloParser, NotClientHello, Verdict
from .live import LiveConnections
from .relay import Relay
from .routing import ACME_TLS_1, Route, Routing
from .splice import SharedPipe, relay_between
from .statistics import NO_NAME, VALIDATION_ENDED, ConnectionRecord, Statistics
from .validations import Validations

NO_HELLO_IN_TIME: Final = "deadline"
END_OF_FILE: Final = "end_of_file"
TOO_MANY_HELLOS: Final = "crowded"
"""Why a connection went to the fallback without a whole hello, for statistics."""

MAX_HELD: Final = 67_108_864
"""Bytes of half hellos that all connections together may hold. Above this, the oldest go to the
fallback: a visitor sends its hello at once, and 64 MiB are 20,000 hellos of the usual size."""

MAX_OWN_ADDRESSES: Final = 65_536
"""How many addresses of this host are remembered; together they take about 10 MB."""

IDLE_LOOKS: Final = 4
"""How often an established connection is checked within its idle timeout."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections there may be at a time.

    @ivar connections: all of them; any others wait in the backlog.
    @ivar visitors: those with the fallback as their target. Visitors above this number wait with
        their hello, so that later connections can still show that they are validations.
    """

    connections: int
    visitors: int


def end_of(address: Any) -> tuple[str, int]:
    """Host and port of one of Twisted's addresses; IPv4 at the dual-stack listener becomes IPv4."""
    host = address.host
    return (host.removeprefix("::ffff:") if "." in host else host), address.port


def _own_addresses() -> set[str]:
    """This host's addresses; empty if the kernel does not report them."""
    try:
        return {str(address) for address in own_addresses()}
    except OSError:
        return set()


Dial: TypeAlias = tuple[tuple[str, int], tuple[str, int]]


@implementer(IHalfCloseableProtocol)
class ProxyClient(Protocol):
    """The connection to a target. It passes its events to the relay, which the server side
    holds."""

    __slots__ = ("_sent_ahead", "_server", "connected", "factory", "transport")

    transport: Any

    def __init__(self, server: ProxyServer, sent_ahead: int) -> None:
        self._server = server
        self._sent_ahead = sent_ahead

    def connectionMade(self) -> None:
        self._server.target_connected(self.transport, self._sent_ahead)

    def dataReceived(self, data: bytes) -> None:
        self._server.relay.received(self.transport, data)

    def readConnectionLost(self) -> None:
        self._server.relay.finished(self.transport)

    def writeConnectionLost(self) -> None:
        """Our own FIN went out: nothing to do."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._server.end_lost(self.transport)


class ProxyClientFactory(TargetFactory):
    """Makes the one L{ProxyClient} of a L{ProxyServer}."""

    def __init__(self, server: ProxyServer, route: Route) -> None:
        self._server = server
        self._route = route
        self.visitor = server.host

    def buildProtocol(self, addr: IAddress | None) -> ProxyClient:
        return ProxyClient(self._server, self.sent_ahead)

    def clientConnectionFailed(self, connector: object, reason: Failure) -> None:
        self._server.target_failed(self._route, reason)

    def tell(self, answer: str) -> None:
        self._server.told(answer)

    def arrival(self) -> Arrival:
        return self._server.arrival()

    def lead_with(self, header: bytes) -> None:
        self._server.lead = header


@implementer(IHalfCloseableProtocol)
class ProxyServer(Protocol):
    """A visitor's connection.

    While it is undecided, it feeds the parser; then it is not read until its target is connected;
    after that, the relay uses it. It is in the live set until both sides have ended.

    @ivar relay: exists only while the target is connected.
    @ivar host: the visitor's address; an IPv4 address also if it was received as IPv4-mapped IPv6.
        Empty if unknown.
    @ivar may_be: if it comes from this host: the proxy's own connections to targets that have the
        same source address and port. It may be one of them, in a loop.
    @ivar lead: bytes that its target gets before the visitor's.
    """

    factory: ProxyServerFactory
    transport: Any
    relay: Relay
    _parser: ClientHelloParser | None
    _connecting = False
    _held_back = False
    _connector: Any = None
    _route: Route
    _record: ConnectionRecord | None = None
    _held = 0
    _ends = 0
    host = ""
    may_be: Sequence[Dial] = ()
    lead = b""

    @property
    def visitor(self) -> Any:
        """The visitor's address, in Twisted's form."""
        return self.transport.getPeer()

    @property
    def target(self) -> str:
        """The address of its target, as the operator wrote it."""
        return self._route.target

    def arrival(self) -> Arrival:
        """The addresses of the visitor's connection."""
        visitor, here = end_of(self.visitor), self._here()
        return Arrival(visitor, here, here)

    def connectionMade(self) -> None:
        self._ends = 1
        if (self.may_be and self._came_back()) or self._came_home():
            self._parser = ClientHelloParser()
            self.factory.report_loop()
            self.transport.abortConnection()
            return
        self._parser = ClientHelloParser(ACME_TLS_1)
        self.factory.live.enter(self)
        self.factory.hellos.add(self)

    def dataReceived(self, data: bytes) -> None:
        parser = self._parser
        if parser is None:
            self.relay.received(self.transport, data)
            return
        verdict = parser.feed(data)
        if verdict is not NEED_MORE:
            self._decide(verdict)
        else:
            size = 2 * len(data)  # the parser holds it twice, with and without the record headers
            self._held += size
            self.factory.hold(size)

    def readConnectionLost(self) -> None:
        # Before the verdict the end-of-file is not stored: the socket reports it again when the
        # relay starts to read, after the bytes so far.
        if self._parser is None:
            self.relay.finished(self.transport)
        else:
            self._decide(NotClientHello("closed before a complete ClientHello", END_OF_FILE))

    def writeConnectionLost(self) -> None:
        """Our own FIN went out: nothing to do."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._record is None:
            self._leave_hellos()
        connector = self._end_wait()
        if connector is not None:
            connector.stopConnecting()
        self.end_lost(self.transport)

    def _came_back(self) -> bool:
        """Whether this is the proxy's own connection to a target, which would loop for ever.
        Another client on this host may have the same source port, but then it connects to another
        address."""
        dialled = {end_of(self.transport.getHost()), self._here()}
        return any(there in dialled for _, there in self.may_be)

    def _here(self) -> tuple[str, int]:
        """The address of this host that the visitor connected to."""
        here = self.transport.getHost()
        found = original_destination(self.transport.fileno(), here.host) or end_of(here)
        # A local route may make a whole network this host's; no list has all its addresses.
        if len(self.factory.own_addresses) < MAX_OWN_ADDRESSES:
            self.factory.own_addresses.add(found[0])
        return found

    def _came_home(self) -> bool:
        """Whether this is the proxy's own connection to a target, made from a visitor's address:
        no visitor connects to [::1] from an address that is not this host's. With IPv4 there is no
        such connection: the listener's port has no return path
        (L{acme_alpn_proxy.host.returnpath})."""
        return (
            ":" in self.host
            and self.host not in self.factory.own_addresses
            and bool(self.transport.getHost().host == "::1")
        )

    def end_lost(self, transport: object) -> None:
        """One of the two ends has closed."""
        if self._parser is None:
            self.relay.lost(transport)
        self._ends -= 1
        if not self._ends:
            if self._record is not None:
                moved = self.relay.moved if self._parser is None else (0, 0)
                self.factory.ended(self._record, *moved)
            self.factory.left(self)

    def abort(self) -> None:
        """Reset both ends."""
        if self._parser is None:
            self.relay.abort()
        else:
            self.transport.abortConnection()

    def give_up(self, reason: str, kind: str) -> None:
        """Stop waiting for the hello."""
        self._decide(NotClientHello(reason, kind))

    def look(self) -> None:
        """Reset both ends if nothing has moved during the last few checks."""
        if self._parser is None:
            self.relay.quiet += 1
            if self.relay.quiet > IDLE_LOOKS:
                self.relay.abort()

    def target_connected(self, transport: Any, sent_ahead: int) -> None:
        """The target is connected, and has been sent C{sent_ahead} of the visitor's bytes."""
        self._end_wait()
        self._ends += 1
        assert self._parser is not None
        first, self._parser = bytes(self._parser.received), None
        factory = self.factory
        self.relay = relay_between(self.transport, transport, factory.hangups, factory.pipe)
        if self.lead:  # it is not the visitor's, so it is not counted
            self.relay.count(self.transport, -len(self.lead))
            first = self.lead + first
        self.relay.start(first, sent_ahead)

    def target_failed(self, route: Route, failure: Failure) -> None:
        """The target could not be connected."""
        if self._connecting:
            self._end_wait()
            self.factory.unreachable(self._record, route, failure)
            self.abort()

    def told(self, answer: str) -> None:
        """Note the result of this validation, in words."""
        assert self._record is not None
        self.factory.statistics.told(self._record, answer)

    def dialled(self) -> Dial | None:
        """Both ends of the connection to the target, if it exists: the local one, the remote
        one."""
        if self._parser is not None or not self.relay.back.connected:
            return None
        here, there = self.relay.back.getHost(), self.relay.back.getPeer()
        return ((here.host, here.port), (there.host, there.port)) if hasattr(here, "port") else None

    def connect_target(self) -> None:
        """Connect the route's target: there is room now."""
        assert self._parser is not None
        connector = self.factory.connect(self._route, self, bytes(self._parser.received))
        if self._connecting:  # the attempt is still under way
            self._connector = connector
            self._hold_back()

    def _decide(self, verdict: Verdict) -> None:
        self._leave_hellos()
        factory = self.factory
        self._route = factory.routing.route(verdict)
        self._record = factory.decided(self, self._route, verdict)
        self._connecting = True
        if self._route is not factory.routing.fallback:
            factory.validations.enter(self)
        if factory.has_room(self._route):
            self.connect_target()
        else:
            factory.wait(self)
            self._hold_back()

    def _hold_back(self) -> None:
        """Do not read from the visitor while it has no target, but notice its reset."""
        if not self._held_back:
            self._held_back = True
            self.transport.pauseProducing()
            self.factory.hangups.add(self.transport, self.abort)

    def _end_wait(self) -> Any:
        """The wait for the target is over, with or without success; returns the connector, if
        any."""
        self._connecting = False
        if self._held_back:
            self._held_back = False
            self.factory.hangups.discard(self.transport)
            self.factory.waiting.pop(self, None)
        connector, self._connector = self._connector, None
        return connector

    def _leave_hellos(self) -> None:
        self.factory.hellos.discard(self)
        self.factory.held -= self._held
        self._held = 0


def statistics_for(routing: Routing) -> Statistics:
    """New statistics, with all counts at zero."""
    return Statistics(routing, (NOT_TLS, NO_HELLO_IN_TIME, END_OF_FILE, TOO_MANY_HELLOS))


class ProxyServerFactory(ServerFactory):
    """Makes a L{ProxyServer} for each visitor, and holds what all of them share.

    @ivar live: the connections that have not ended.
    @ivar hellos: those of them that have not sent a whole hello.
    @ivar held: bytes of memory that their half hellos take.
    @ivar waiting: visitors that wait for room before their target is connected, the first one
        first.
    @ivar pipe: for relays.
    @ivar statistics: the numbers of all connections.
    @ivar validations: the validations under way.
    @ivar log_visitors: whether a line is logged for each visitor.
    @ivar hangups: reports resets on connections that are not being read.
    @ivar own_addresses: the known addresses of this host: a connection from one of them may be the
        proxy's own connection to a target, in a loop.
    """

    noisy = False
    _log = Logger()

    def __init__(
        self,
        routing: Routing,
        targets: Mapping[Route, ITarget],
        clock: IReactorTime,
        *,
        hello_timeout: float = 5.0,
        idle_timeout: float = 0.0,
        log_visitors: bool = False,
        statistics: Statistics | None = None,
        protocol: Callable[[], ProxyServer] = ProxyServer,
    ) -> None:
        """
        @param targets: how to connect each route's target.
        @param hello_timeout: seconds until a connection without a whole hello goes to the fallback.
        @param idle_timeout: seconds without a byte until an established connection is reset; 0:
            never.
        @param log_visitors: log a line for each visitor, at C{debug}. Even without an observer for
            it, the event would cost more time than the parser and the choice of the route together.
        @param statistics: the counters, if several factories with the same routing share them.
        @param protocol: makes the protocol for a visitor.
        """
        self.new_server = protocol
        self.routing = routing
        self.live = LiveConnections()
        self.hellos: DeadlineQueue[ProxyServer] = DeadlineQueue(clock, hello_timeout, self._expire)
        self.held = 0
        self.waiting: dict[ProxyServer, None] = {}
        self._most_visitors: float = math.inf
        self._full_reported = False
        self.own_addresses: set[str] = set()
        self._loop_reported = False
        self.pipe = SharedPipe()
        self.statistics = statistics if statistics is not None else statistics_for(routing)
        self.validations = Validations(clock, self.statistics.validation_cut_short)
        self.log_visitors = log_visitors
        self.hangups: IHangupWatch = NoHangupWatch()
        self._targets = targets
        self._idle_timeout = idle_timeout
        self._looking = LoopingCall(self.look_for_idle)
        self._looking.clock = clock

    def open(
        self,
        hangups: IHangupWatch,
        limits: Limits,
        full: Callable[[], None],
        room: Callable[[], None],
    ) -> None:
        """Get ready for connections.

        @param full: called when there are as many connections as C{limits} allow.
        @param room: called when there are fewer again.
        """
        self.hangups = hangups
        self._most_visitors = limits.visitors
        self.own_addresses = _own_addresses()
        self.live.bound(limits.connections, full, room)
        if self._idle_timeout:
            self._looking.start(self._idle_timeout / IDLE_LOOKS, now=False)

    def buildProtocol(self, addr: Any) -> ProxyServer | None:  # type: ignore[override]
        server = self.new_server()
        server.factory = self
        server.host = host = addr.host.removeprefix("::ffff:") if addr is not None else ""
        if host in self.own_addresses or host.startswith("127."):
            dials = (each.dialled() for each in self.live)
            server.may_be = [dial for dial in dials if dial and dial[0] == (host, addr.port)]
        return server

    def report_loop(self) -> None:
        """Log once that a connection to a target has reached the proxy itself."""
        if not self._loop_reported:
            self._loop_reported = True
            self._log.error(
                "The proxy connected to itself, and closed the connection: a rule redirects the"
                " proxy's own connections; change that rule, or give addresses with --fallback and"
                " --alpn that no rule redirects"
            )

    def connect(self, route: Route, server: ProxyServer, first: bytes) -> Any:
        """Connect the route's target to C{server}, whose visitor has sent C{first}.

        @return: the connector, if the connection attempt has to wait.
        """
        return self._targets[route].connect(ProxyClientFactory(server, route), first)

    def has_room(self, route: Route) -> bool:
        """Whether the connection that was counted last may get its target now."""
        if route is not self.routing.fallback:
            return True
        return self.statistics.fallback.live - len(self.waiting) <= self._most_visitors

    def wait(self, server: ProxyServer) -> None:
        """There is no room for this visitor yet."""
        self.waiting[server] = None
        if not self._full_reported:
            self._full_reported = True
            self._log.warn(
                "The limit of {count} visitors at a time is reached, and more visitors wait"
                " (validations do not wait); raise the limit on open files (ulimit -Hn,"
                " LimitNOFILE=), or --max-connections if you have set it",
                count=self._most_visitors,
            )

    def left(self, server: ProxyServer) -> None:
        """A connection has ended on both sides."""
        self.validations.leave(server)
        self.live.leave(server)
        self.let_in()

    def let_in(self) -> None:
        """A connection has ended: the first waiting visitor may take its place."""
        while self.waiting and self.statistics.fallback.live - len(self.waiting) < (
            self._most_visitors
        ):
            first = next(iter(self.waiting))
            del self.waiting[first]
            first.connect_target()
        self._full_reported &= bool(self.waiting)

    def hold(self, size: int) -> None:
        """Count C{size} more bytes of half hellos as held."""
        self.held += size
        while self.held > MAX_HELD:
            self.hellos.oldest().give_up("too many incomplete ClientHellos", TOO_MANY_HELLOS)

    def look_for_idle(self) -> None:
        """To be called L{IDLE_LOOKS} times within the idle timeout."""
        for connection in list(self.live):
            connection.look()

    def close(self) -> None:
        """Free what is kept for connections. All have ended."""
        if self._looking.running:
            self._looking.stop()
        self.hellos.close()
        self.validations.close()
        self.pipe.close()
        self.hangups.close()
        self.hangups = NoHangupWatch()

    def _expire(self, server: ProxyServer) -> None:
        reason = f"no complete ClientHello within {self.hellos.seconds:g} s"
        server.give_up(reason, NO_HELLO_IN_TIME)

    def decided(self, server: ProxyServer, route: Route, verdict: Verdict) -> ConnectionRecord:
        """The visitor takes C{route}: count it, and log a line if it is an ACME validation."""
        if route is not self.routing.fallback:
            peer, name = shown(end_of(server.visitor)), getattr(verdict, "server_name", None)
            self._log.info(
                "Routed {peer} to {route} target {target}, server name {server_name}",
                peer=peer,
                route=route.name,
                target=route.target,
                server_name=name,
            )
            return self.statistics.validation(route, peer, name)
        if self.log_visitors:
            self._log.debug(
                "Routed {peer} to {route} target {target}: {why}",
                peer=shown(end_of(server.visitor)),
                route=route.name,
                target=route.target,
                why=getattr(verdict, "reason", "no ACME validation"),
            )
        return self.statistics.visitor(verdict)

    def ended(self, record: ConnectionRecord, from_visitor: int, to_visitor: int) -> None:
        """Count the end of a connection, and its bytes each way. Log the result of a validation."""
        self.statistics.ended(record, from_visitor, to_visitor)
        validation = record.validation
        if validation is not None:
            self._log.info(
                VALIDATION_ENDED,
                server_name=validation.server_name or NO_NAME,
                peer=validation.peer,
                result=validation.result,
            )

    def unreachable(self, record: ConnectionRecord | None, route: Route, failure: Failure) -> None:
        """Count the failure, and log the target and the reason."""
        assert record is not None
        why = failure.getErrorMessage()
        self.statistics.unreachable(record, why)
        self._log.error(
            "Cannot connect to {what} ({target}): {why}",
            what="the web server" if route is self.routing.fallback else "the ACME client",
            route=route.name,
            target=route.target,
            why=why,
        )
