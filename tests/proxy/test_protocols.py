"""One connection in memory: when it is decided, what is written where, and what is logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import (
    IHalfCloseableProtocol,
    IProtocolFactory,
    IPushProducer,
    ITCPTransport,
    IUNIXTransport,
)
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.testing import StringTransport
from twisted.logger import LogEvent, LogLevel, capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import directlyProvides, implementer
from zope.interface.verify import verifyObject

from acme_alpn_proxy.addresses import parse_address
from acme_alpn_proxy.proxy import protocols
from acme_alpn_proxy.proxy.protocols import ProxyClient, ProxyServer, ProxyServerFactory
from acme_alpn_proxy.proxy.relay import IRelay
from acme_alpn_proxy.proxy.routing import Route, Routing
from acme_alpn_proxy.transports.interfaces import IHangupWatch
from acme_alpn_proxy.transports.network import TwistedNetwork

from .. import hellos
from ..loopback import connected
from ..memory import MemoryReactor

ACME_HELLO = hellos.records(hellos.message(hellos.alpn_extension(b"acme-tls/1")))
WEB_HELLO = hellos.records(hellos.message(hellos.alpn_extension(b"h2")))

ACME = Route("acme", "127.0.0.1:31443")
WEB = Route("fallback", "127.0.0.1:443")


class Transport(StringTransport):
    """Records how it was ended and tuned."""

    producer: Any

    def __init__(self, peer: Any = None) -> None:
        super().__init__(peerAddress=peer)
        self.story: list[str] = []

    def loseWriteConnection(self) -> None:
        self.story.append("FIN")

    def loseConnection(self) -> None:
        self.story.append("close")

    def abortConnection(self) -> None:
        self.story.append("reset")

    def setTcpNoDelay(self, enabled: bool) -> None:
        self.story.append("no delay" if enabled else "delay")

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self.story.append("keepalive" if enabled else "no keepalive")


@implementer(IHangupWatch)
class NotingWatch:
    """Which transports are watched."""

    def __init__(self) -> None:
        self.watched: dict[object, Callable[[], None]] = {}

    def add(self, transport: Any, hung_up: Callable[[], None]) -> None:
        self.watched[transport] = hung_up

    def discard(self, transport: Any) -> None:
        self.watched.pop(transport, None)

    def close(self) -> None:
        self.watched.clear()


class ProxyCase(SynchronousTestCase):
    """A factory on a reactor in memory, with one visitor."""

    def setUp(self) -> None:
        self.reactor = MemoryReactor()
        network = TwistedNetwork(self.reactor)
        self.factory = ProxyServerFactory(
            Routing(ACME, WEB),
            {way: network.target(parse_address(way.target), 10.0) for way in (ACME, WEB)},
            self.reactor,
            hello_timeout=5.0,
        )
        self.addCleanup(self.factory.close)
        self.watch = NotingWatch()
        self.factory.hangups = self.watch
        logs = capturedLogs()
        self.events = cast(list[LogEvent], logs.__enter__())
        self.addCleanup(logs.__exit__, None, None, None)
        self.server, self.front = self.visit()

    def visit(self, peer: Any = None, *interfaces: Any) -> tuple[ProxyServer, Transport]:
        """A visitor's connection, accepted."""
        peer = peer or IPv4Address("TCP", "192.0.2.7", 50_000)
        server = self.factory.buildProtocol(peer)
        assert isinstance(server, ProxyServer)
        transport = Transport(peer)
        directlyProvides(transport, *interfaces)
        server.makeConnection(transport)
        return server, transport

    @property
    def dialled(self) -> list[tuple[str, int]]:
        """The targets that were connected to, so far."""
        return [(host, port) for host, port, *_ in self.reactor.tcpClients]

    def answer(self, *interfaces: Any) -> tuple[ProxyClient, Transport]:
        """The target accepts the connection."""
        client: Any = self.reactor.tcpClients[-1][2].buildProtocol(None)
        transport = Transport()
        directlyProvides(transport, *interfaces)
        client.makeConnection(transport)
        return client._wrappedProtocol, transport

    def refuse(self) -> None:
        """The target does not."""
        failure = Failure(ConnectError(string="refused"))
        factory: Any = self.reactor.tcpClients[-1][2]
        factory.clientConnectionFailed(None, failure)

    def relay(self) -> tuple[ProxyClient, Transport]:
        """The visitor sends a hello, and the target accepts."""
        self.server.dataReceived(WEB_HELLO)
        client, back = self.answer()
        self.assertEqual(back.value(), WEB_HELLO)
        back.clear()
        return client, back

    @property
    def lines(self) -> list[tuple[LogLevel, str]]:
        """The log events."""
        return [(event["log_level"], formatEvent(event)) for event in self.events]


class InterfaceTests(ProxyCase):
    def test_interfaces(self) -> None:
        """Both sides are informed of half-closes, and all parts implement their interfaces."""
        verifyObject(IProtocolFactory, self.factory)
        verifyObject(IHalfCloseableProtocol, self.server)
        client, back = self.relay()
        verifyObject(IHalfCloseableProtocol, client)
        verifyObject(IRelay, self.server.relay)
        verifyObject(IPushProducer, back.producer)
        verifyObject(IHangupWatch, self.watch)

    def test_own_end(self) -> None:
        """After the proxy has sent a FIN of its own, nothing else happens."""
        client, back = self.relay()
        client.writeConnectionLost()
        self.server.writeConnectionLost()
        self.assertEqual((self.front.story, back.story), ([], []))

    def test_tuning(self) -> None:
        """TCP connections get no delay and keepalive, on both sides; Unix sockets have neither."""
        for interfaces, story in (
            ((ITCPTransport,), ["no delay", "keepalive"]),
            ((ITCPTransport, IUNIXTransport), []),
        ):
            server, front = self.visit(None, *interfaces)
            server.dataReceived(WEB_HELLO)
            _, back = self.answer(*interfaces)
            self.assertEqual((front.story, back.story), (story, story))


class DecisionTests(ProxyCase):
    """From the first byte to the route."""

    def test_routes(self) -> None:
        """A hello that offers acme-tls/1 goes to the responder, any other to the web server."""
        self.server.dataReceived(ACME_HELLO)
        self.assertEqual(self.dialled, [("127.0.0.1", 31_443)])
        other, _ = self.visit()
        other.dataReceived(WEB_HELLO)
        self.assertEqual(self.dialled[1:], [("127.0.0.1", 443)])

    def test_piece_by_piece(self) -> None:
        """Nothing is decided before the hello is whole, and then at once, without the deadline."""
        for at in range(len(ACME_HELLO) - 1):
            self.server.dataReceived(ACME_HELLO[at : at + 1])
        self.assertEqual(self.dialled, [])
        self.server.dataReceived(ACME_HELLO[-1:])
        self.assertEqual(self.dialled, [("127.0.0.1", 31_443)])
        _, back = self.answer()
        self.assertEqual(back.value(), ACME_HELLO)
        self.reactor.advance(60)
        self.assertEqual(len(self.dialled), 1)

    def test_deadline(self) -> None:
        """Half a hello waits for the rest until the deadline; then it goes to the web server."""
        self.server.dataReceived(ACME_HELLO[:-1])
        self.reactor.advance(4.9)
        self.assertEqual(self.dialled, [])
        self.reactor.advance(0.2)
        self.assertEqual(self.dialled, [("127.0.0.1", 443)])
        _, back = self.answer()
        self.assertEqual(back.value(), ACME_HELLO[:-1])
        self.server.dataReceived(ACME_HELLO[-1:])
        self.assertEqual(back.value(), ACME_HELLO)

    def test_end_of_file(self) -> None:
        """If the visitor sends a FIN before its hello is whole, the proxy connects to the web
        server at once."""
        self.server.readConnectionLost()
        self.assertEqual(self.dialled, [("127.0.0.1", 443)])

    def test_not_read_while_connecting(self) -> None:
        """Decided, a visitor is not read, but watched, until its target is connected."""
        self.assertEqual(self.front.producerState, "producing")
        self.server.dataReceived(WEB_HELLO)
        self.assertEqual(self.front.producerState, "paused")
        self.assertIn(self.front, self.watch.watched)
        _, back = self.answer()
        self.assertEqual(self.front.producerState, "producing")
        self.assertEqual(self.watch.watched, {})
        self.assertEqual(back.value(), WEB_HELLO)


class LineTests(ProxyCase):
    """The lines of the log."""

    def routed(self, hello: bytes, peer: Any = None) -> tuple[LogLevel, str]:
        server, _ = self.visit(peer)
        self.events.clear()
        server.dataReceived(hello)
        (line,) = self.lines
        return line

    def test_acme(self) -> None:
        """A validation is one line at info: from where, to where, for which name."""
        hello = hellos.openssl_hello(b"acme-tls/1", server_name=b"site.example")
        self.assertEqual(
            self.routed(hello),
            (
                LogLevel.info,
                "Routed 192.0.2.7:50000 to acme target 127.0.0.1:31443, server name site.example",
            ),
        )

    def test_visitor(self) -> None:
        """A visitor makes no log line: a busy site would fill a disk."""
        self.server.dataReceived(b"GET / HTTP/1.0\r\n\r\n")
        self.assertEqual(self.lines, [])

    def test_every_visitor(self) -> None:
        """With C{log_visitors}, each visitor makes one log line at debug level, with the reason of
        its route."""
        self.factory.log_visitors = True
        beginning = "Routed 192.0.2.7:50000 to fallback target 127.0.0.1:443: "
        self.assertEqual(
            [self.routed(hello) for hello in (WEB_HELLO, b"GET / HTTP/1.0\r\n\r\n")],
            [
                (LogLevel.debug, f"{beginning}no ACME validation"),
                (LogLevel.debug, f"{beginning}not a handshake record"),
            ],
        )

    def test_peers(self) -> None:
        """IPv6 addresses are in brackets; IPv4 at the dual-stack listener is shown as IPv4."""
        for host, shown in (
            ("2001:db8::7", "[2001:db8::7]:9"),
            ("::ffff:192.0.2.7", "192.0.2.7:9"),
        ):
            _, line = self.routed(ACME_HELLO, IPv6Address("TCP", host, 9))
            self.assertTrue(line.startswith(f"Routed {shown} to acme "), line)


class CountTests(ProxyCase):
    """What is counted for a connection, and when."""

    def test_visitor(self) -> None:
        """Bytes each way count, the hello too, once both ends are gone."""
        client, _ = self.relay()
        numbers = self.factory.statistics.fallback
        self.assertEqual((numbers.live, numbers.total), (1, 1))
        self.server.dataReceived(b"question")
        client.dataReceived(b"the answer")
        for end in (client, self.server):
            self.assertEqual(numbers.bytes_to_visitors, 0)
            end.connectionLost(Failure(CONNECTION_DONE))
        self.assertEqual((numbers.live, numbers.total), (0, 1))
        self.assertEqual(numbers.bytes_from_visitors, len(WEB_HELLO) + len(b"question"))
        self.assertEqual(numbers.bytes_to_visitors, len(b"the answer"))

    def test_reasons(self) -> None:
        """A visitor without a whole hello counts by the reason that ended the wait for it."""
        reasons = self.factory.statistics.reasons
        self.assertEqual(
            list(reasons), ["no_acme_alpn", "not_tls", "deadline", "end_of_file", "crowded"]
        )
        self.reactor.advance(5)
        self.assertEqual(reasons["deadline"], 1)
        server, _ = self.visit()
        server.readConnectionLost()
        self.assertEqual(reasons["end_of_file"], 1)
        self.patch(protocols, "MAX_HELD", 10)
        server, _ = self.visit()
        server.dataReceived(WEB_HELLO[:6])
        self.assertEqual(reasons["crowded"], 1)

    def test_gone_undecided(self) -> None:
        """A visitor who leaves without a hello is not counted."""
        self.server.connectionLost(Failure(CONNECTION_LOST))
        self.assertEqual(self.factory.statistics.fallback.total, 0)

    def test_unreachable(self) -> None:
        """A target that cannot be connected is a failure, and the result of a validation."""
        self.server.dataReceived(ACME_HELLO)
        self.refuse()
        self.server.connectionLost(Failure(CONNECTION_LOST))
        numbers = self.factory.statistics
        self.assertEqual((numbers.acme.live, numbers.acme.failures), (0, 1))
        assert numbers.last_validation is not None
        self.assertTrue(numbers.last_validation.result.startswith("unreachable: "))


class UnreachableTests(ProxyCase):
    """Targets that do not answer, and visitors that do not wait."""

    def setUp(self) -> None:
        super().setUp()
        self.server.dataReceived(WEB_HELLO)
        self.events.clear()

    def assert_unreachable(self, why: str) -> None:
        """The visitor is reset, and one line names the target and why."""
        self.assertEqual(self.front.story, ["reset"])
        self.assertEqual(
            self.lines,
            [(LogLevel.error, f"Cannot connect to the web server (127.0.0.1:443): {why}")],
        )
        self.server.connectionLost(Failure(CONNECTION_LOST))
        self.assertEqual(len(self.factory.live), 0)
        self.reactor.advance(60)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_refused(self) -> None:
        """A target that refuses."""
        self.refuse()
        self.assert_unreachable("An error occurred while connecting: refused.")

    def test_no_answer(self) -> None:
        """A target does not answer in time; then the connection attempt ends."""
        self.reactor.advance(9.9)
        self.assertEqual(self.front.story, [])
        self.reactor.advance(0.1)
        self.assert_unreachable("no answer within 10 s")
        self.assertTrue(self.reactor.connectors[-1].stoppedConnecting)

    def test_visitor_leaves(self) -> None:
        """A visitor leaves in the meantime: the target's connection is closed, without a log
        line."""
        self.server.connectionLost(Failure(CONNECTION_DONE))
        self.assertTrue(self.reactor.connectors[-1].stoppedConnecting)
        self.assertEqual(self.lines, [])
        self.assertEqual(self.watch.watched, {})
        self.assertEqual(len(self.factory.live), 0)
        self.reactor.advance(60)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_visitor_hangs_up(self) -> None:
        """A visitor's reset is noticed in the meantime."""
        self.watch.watched[self.front]()
        self.assertEqual(self.front.story, ["reset"])

    def test_aborted(self) -> None:
        """A connection that is aborted in the meantime resets the visitor."""
        self.factory.live.abort_all()
        self.assertEqual(self.front.story, ["reset"])


class LiveTests(ProxyCase):
    """The members of the live set."""

    def test_undecided(self) -> None:
        """An undecided visitor who leaves is removed, with its deadline."""
        self.assertEqual(len(self.factory.live), 1)
        self.server.connectionLost(Failure(CONNECTION_DONE))
        self.assertEqual(len(self.factory.live), 0)
        self.reactor.advance(60)
        self.assertEqual(self.reactor.getDelayedCalls(), [])
        self.assertEqual(self.dialled, [])

    def test_both_ends(self) -> None:
        """A connection is live until both its ends are gone, in any order."""
        client, _ = self.relay()
        self.server.connectionLost(Failure(CONNECTION_DONE))
        self.assertEqual(len(self.factory.live), 1)
        client.connectionLost(Failure(CONNECTION_DONE))
        self.assertEqual(len(self.factory.live), 0)
        self.server, self.front = self.visit()
        client, _ = self.relay()
        client.connectionLost(Failure(CONNECTION_DONE))
        self.assertEqual(len(self.factory.live), 1)
        self.server.connectionLost(Failure(CONNECTION_DONE))
        self.assertEqual(len(self.factory.live), 0)


class RelayTests(ProxyCase):
    """Bytes and ends, both ways."""

    def setUp(self) -> None:
        super().setUp()
        self.client, self.back = self.relay()

    def test_bytes(self) -> None:
        """The bytes of one side reach the other."""
        self.server.dataReceived(b"question")
        self.client.dataReceived(b"answer")
        self.assertEqual((self.back.value(), self.front.value()), (b"question", b"answer"))

    def test_back_pressure(self) -> None:
        """Bytes that one side cannot take are not read from the other, which is watched instead."""
        self.back.producer.pauseProducing()
        self.assertEqual(self.front.producerState, "paused")
        self.assertEqual(list(self.watch.watched), [self.front])
        self.back.producer.resumeProducing()
        self.assertEqual(self.front.producerState, "producing")
        self.assertEqual(self.watch.watched, {})
        self.back.producer.stopProducing()
        self.assertEqual(self.front.story, [])

    def test_ends(self) -> None:
        """A FIN is passed on as a FIN; after both FINs, the connections are closed, not reset."""
        self.server.readConnectionLost()
        self.assertEqual((self.front.story, self.back.story), ([], ["FIN"]))
        self.client.readConnectionLost()
        self.assertEqual((self.front.story, self.back.story), (["close"], ["FIN", "close"]))
        self.server.connectionLost(Failure(CONNECTION_DONE))
        self.client.connectionLost(Failure(CONNECTION_DONE))
        self.assertNotIn("reset", self.front.story + self.back.story)

    def test_reset(self) -> None:
        """An end that is lost without a FIN is a reset for the other."""
        self.client.connectionLost(Failure(CONNECTION_LOST))
        self.assertEqual(self.front.story, ["reset"])
        self.server.connectionLost(Failure(CONNECTION_LOST))
        self.assertEqual(self.back.story, [])

    def test_hung_up(self) -> None:
        """A reset from a side that is not read resets both."""
        self.back.producer.pauseProducing()
        self.watch.watched[self.front]()
        self.assertEqual((self.front.story, self.back.story), (["reset"], ["reset"]))

    def test_hung_up_when_it_was_over(self) -> None:
        """A reset from a side that waits only for its last bytes to be sent does not affect the
        other."""
        self.server.readConnectionLost()
        hung_up = self.watch.watched[self.front]
        self.client.readConnectionLost()
        hung_up()
        self.assertEqual(self.front.story, ["close", "reset"])
        self.assertEqual(self.back.story, ["FIN", "close"])

    def test_abort(self) -> None:
        """Aborted, both sides are reset, once."""
        self.factory.live.abort_all()
        self.server.connectionLost(Failure(CONNECTION_LOST))
        self.client.connectionLost(Failure(CONNECTION_LOST))
        self.assertEqual((self.front.story, self.back.story), (["reset"], ["reset"]))


class ArrivalTests(ProxyCase):
    """How a visitor has come."""

    def arrive(self, peer: Any) -> ProxyServer:
        server, transport = self.visit(peer)
        one, other = connected()  # whose descriptor has no original destination
        self.addCleanup(one.close)
        self.addCleanup(other.close)
        transport.fileno = one.fileno  # type: ignore[attr-defined]
        return server

    def test_ends(self) -> None:
        """The arrival has the visitor's address and the one that it connected to; an IPv4 address
        has its usual form, also on a listener for both families."""
        arrival = self.arrive(IPv6Address("TCP", "::ffff:192.0.2.8", 50_001)).arrival()
        self.assertEqual(arrival.visitor, ("192.0.2.8", 50_001))
        self.assertEqual(arrival.dialled, ("10.0.0.1", 12345))
        self.assertEqual((arrival.here, arrival.header), (arrival.dialled, b""))

    def test_dialled_addresses_are_own(self) -> None:
        """An address that a visitor has connected to counts as this host's, even if no interface
        has it: a connection from there may be one of the proxy's that has come back. The number of
        such addresses is limited."""
        self.assertNotIn("10.0.0.1", self.factory.own_addresses)
        self.arrive(None).arrival()
        self.assertIn("10.0.0.1", self.factory.own_addresses)
        self.factory.own_addresses = set()
        self.patch(protocols, "MAX_OWN_ADDRESSES", 0)
        self.arrive(None).arrival()
        self.assertEqual(self.factory.own_addresses, set())
