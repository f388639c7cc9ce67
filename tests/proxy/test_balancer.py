"""Visitors that come by a load balancer, in memory."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.logger import formatEvent

from acme_alpn_proxy.proxy.balancer import Balancers, addresses_in
from acme_alpn_proxy.proxy.header import BadHeader, encode_v1, encode_v2, unknown_v1, unknown_v2
from acme_alpn_proxy.proxy.protocols import ProxyServer, end_of
from acme_alpn_proxy.proxy.targets import HeadedTarget
from acme_alpn_proxy.transports.sockets import Arrival

from ..loopback import connected
from .test_protocols import ACME, ACME_HELLO, WEB, WEB_HELLO, ProxyCase, Transport

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
VISITOR, SITE = ("192.0.2.7", 50_000), ("198.51.100.1", 443)
VISITOR6, SITE6 = ("2001:db8::7", 50_000), ("2001:db8:1::1", 443)
BALANCER = IPv4Address("TCP", "10.0.0.9", 40_000)


class AddressesTests(ProxyCase):
    """What a whole header says."""

    def test_addresses(self) -> None:
        """A header of either version and family has the visitor and the address that it connected
        to."""
        for encode in (encode_v1, encode_v2):
            for kind, ends in ((IPv4Address, (VISITOR, SITE)), (IPv6Address, (VISITOR6, SITE6))):
                told = tuple(kind("TCP", *end) for end in ends)
                self.assertEqual(addresses_in(encode(*ends)), told)

    def test_mapped(self) -> None:
        """An IPv4 address that is mapped to IPv6 is that address; one that looks alike is not."""
        mapped, like = ("::ffff:c000:207", 50_000), ("::ffff:ffff", 50_000)
        visitor, dialled = addresses_in(encode_v2(mapped, ("::ffff:198.51.100.1", 443)))
        self.assertEqual((visitor.host, dialled.host), ("192.0.2.7", "198.51.100.1"))
        self.assertEqual(end_of(addresses_in(encode_v2(like, SITE6))[0]), like)
        with self.assertRaises(BadHeader):
            addresses_in(encode_v2(mapped, SITE6))

    def test_nobody(self) -> None:
        """A header may name nobody, or ends that have no IP address."""
        unix = SIGNATURE + b"\x21\x31\0\xd8" + bytes(216)
        for header in (unknown_v1(), unknown_v2(), b"PROXY UNKNOWN 1 2 3 4\r\n", unix):
            self.assertEqual(addresses_in(header), (None, None))

    def test_nonsense(self) -> None:
        """Invalid fields raise C{BadHeader}, and no other exception."""
        for header in (
            b"PROXY \r\n",
            b"PROXY UNKNOWNS\r\n",
            b"PROXY TCP4 192.0.2.7\r\n",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 x 443\r\n",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 50000 65536\r\n",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 -1 443\r\n",
            b"PROXY TCP4 192.0.2.777 198.51.100.1 50000 443\r\n",
            b"PROXY TCP4 localhost 198.51.100.1 50000 443\r\n",
            b"PROXY TCP4 192.0.2.7 2001:db8::1 50000 443\r\n",
            b"PROXY TCP6 \xff\xfe 2001:db8::1 50000 443\r\n",
            b"PROXY UDP4 192.0.2.7 198.51.100.1 50000 443\r\n",
            SIGNATURE + b"\x22\x11\0\x0c" + bytes(12),
            SIGNATURE + b"\x21\x11\0\x04" + bytes(4),
            SIGNATURE + b"\x21\x14\0\x0c" + bytes(12),
        ):
            with self.assertRaises(BadHeader, msg=header):
                addresses_in(header)


class BalancedTests(ProxyCase):
    """Connections from a load balancer, and from elsewhere."""

    def setUp(self) -> None:
        super().setUp()
        networks = [ip_network("10.0.0.0/24"), ip_network("2001:db8:ba::/64")]
        self.factory.new_server = Balancers(networks).new_server

    def visit(self, peer: Any = None, *interfaces: Any) -> tuple[ProxyServer, Transport]:
        server, transport = super().visit(peer, *interfaces)
        one, other = connected()  # whose descriptor has no original destination
        self.addCleanup(one.close)
        self.addCleanup(other.close)
        transport.fileno = one.fileno  # type: ignore[attr-defined]
        return server, transport

    def told(self) -> list[str]:
        return [formatEvent(event) for event in self.events]

    def test_header_then_hello(self) -> None:
        """The header is for the proxy alone, and says who the visitor is; so does the log."""
        for encode in (encode_v1, encode_v2):
            server, _ = self.visit(BALANCER)
            server.dataReceived(encode(VISITOR6, SITE6) + ACME_HELLO)
            _, back = self.answer()
            self.assertEqual(back.value(), ACME_HELLO)
            self.assertIn("Routed [2001:db8::7]:50000 to acme", self.told()[-1])
            self.assertEqual(self.factory.statistics.last_validation.peer, "[2001:db8::7]:50000")  # type: ignore[union-attr]

    def test_byte_by_byte(self) -> None:
        """Header and hello may come in pieces of any size."""
        for header in (encode_v1(VISITOR, SITE), encode_v2(VISITOR, SITE), unknown_v2()):
            server, front = self.visit(BALANCER)
            for byte in header + WEB_HELLO:
                server.dataReceived(bytes([byte]))
            _, back = self.answer()
            self.assertEqual(back.value(), WEB_HELLO)
            self.assertNotIn("reset", front.story)

    def test_elsewhere(self) -> None:
        """A client that does not come through a load balancer sends no header. If it sends one to
        pretend another address, that has no effect."""
        server, _ = self.visit(IPv4Address("TCP", "10.0.1.9", 40_000))
        header = encode_v1(VISITOR, SITE)
        server.dataReceived(header + ACME_HELLO)
        self.assertEqual(self.dialled[-1][1], 443)
        self.assertEqual(self.answer()[1].value(), header + ACME_HELLO)
        self.assertEqual(server.visitor.host, "10.0.1.9")

    def test_mapped_and_ipv6_networks(self) -> None:
        """A load balancer is known by the dual-stack listener, too, and by IPv6."""
        for host in ("::ffff:10.0.0.9", "2001:db8:ba::9"):
            server, _ = self.visit(IPv6Address("TCP", host, 40_000))
            server.dataReceived(encode_v2(VISITOR, SITE) + WEB_HELLO)
            self.assertEqual(self.answer()[1].value(), WEB_HELLO)
            self.assertEqual(server.visitor.host, "192.0.2.7")

    def test_own_connection(self) -> None:
        """A header that names nobody leaves the load balancer as the visitor."""
        server, _ = self.visit(BALANCER)
        server.dataReceived(unknown_v2() + WEB_HELLO)
        self.assertEqual(server.arrival().visitor, ("10.0.0.9", 40_000))
        self.assertEqual(server.visitor.host, "10.0.0.9")

    def test_bad_header(self) -> None:
        """Something else than a header is a reset, and one line that says what to do."""
        for data in (WEB_HELLO, b"PROXY TCP4 nobody\r\n" + WEB_HELLO, SIGNATURE + b"\x11" * 4):
            server, front = self.visit(BALANCER)
            server.dataReceived(data)
            self.assertEqual(front.story, ["reset"])
            server.connectionLost()
        (line,) = self.told()
        self.assertIn("reset a connection from 10.0.0.9:40000, because it did not begin with", line)
        self.assertIn("other bytes came first", line)
        self.assertIn("send-proxy-v2", line)
        self.assertEqual(self.dialled, [])

    def test_deadline(self) -> None:
        """A header that does not come in time, or only half of it, is a reset, not a visitor."""
        self.server.connectionLost()
        for begun in (b"", b"PROXY TCP4 192.0", SIGNATURE + b"\x21\x11\0\x0c1234"):
            server, front = self.visit(BALANCER)
            server.dataReceived(begun)
            self.reactor.advance(4.9)
            self.assertEqual(front.story, [])
            self.reactor.advance(0.2)
            self.assertEqual(front.story, ["reset"])
            server.connectionLost()
        self.assertIn("did not come in time", self.told()[0])
        self.assertEqual(self.dialled, [])
        self.assertEqual(len(self.factory.live), 0)

    def test_silence_after_the_header(self) -> None:
        """A visitor whose header has come, and whose hello does not, goes to the web server."""
        server, _ = self.visit(BALANCER)
        server.dataReceived(encode_v1(VISITOR, SITE))
        self.reactor.advance(5)
        self.assertEqual(self.answer()[1].value(), b"")
        self.assertEqual(self.dialled[-1][1], 443)

    def test_end_before_the_header(self) -> None:
        """A connection that ends without a byte (a health check) is closed, and nothing is logged;
        one that ends after half a header is reset."""
        server, front = self.visit(BALANCER)
        server.readConnectionLost()
        self.assertEqual((front.story, self.told()), (["close"], []))
        server, front = self.visit(BALANCER)
        server.dataReceived(b"PROXY")
        server.readConnectionLost()
        self.assertEqual(front.story, ["reset"])
        self.assertIn("it ended before the header did", self.told()[0])

    def test_end_after_the_hello(self) -> None:
        """After the header, half a hello and an end-of-file go to the web server."""
        server, _ = self.visit(BALANCER)
        server.dataReceived(encode_v1(VISITOR, SITE) + WEB_HELLO[:20])
        server.readConnectionLost()
        self.assertEqual(self.answer()[1].value(), WEB_HELLO[:20])

    def test_limits_look_at_the_visitor(self) -> None:
        """The limit on validations from one origin sees the visitors, not the load balancer."""
        seen = []
        self.patch(self.factory.validations, "enter", lambda each: seen.append(each.visitor.host))
        server, _ = self.visit(BALANCER)
        server.dataReceived(encode_v2(VISITOR6, SITE6) + ACME_HELLO)
        self.assertEqual(seen, ["2001:db8::7"])


class Target:
    """Notes what it is given to send."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def connect(self, factory: Any, first: bytes = b"") -> None:
        self.sent.append(first)


class Factory:
    """Knows how the visitor came."""

    lead = b""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = lambda: arrival

    def lead_with(self, header: bytes) -> None:
        self.lead = header


class HeadedTargetTests(ProxyCase):
    """The header that a target is sent."""

    def send(self, version: str, arrival: Arrival) -> bytes:
        target, factory = Target(), Factory(arrival)
        made: Any = HeadedTarget(target, version)  # type: ignore[arg-type]
        made.connect(factory, b"hello")
        (sent,) = target.sent
        self.assertEqual(sent, factory.lead + b"hello")
        return factory.lead

    def test_made(self) -> None:
        """A new header names the visitor and the address that it connected to."""
        arrival = Arrival(VISITOR, SITE, ("10.0.0.1", 443))
        self.assertEqual(self.send("v1", arrival), encode_v1(VISITOR, SITE))
        self.assertEqual(self.send("v2", arrival), encode_v2(VISITOR, SITE))

    def test_passed_on(self) -> None:
        """The header of a load balancer is passed on unchanged, with its extra fields; if the
        target needs the other version, a new header is made."""
        came = encode_v2(VISITOR, SITE)
        came = came[:14] + b"\0\x13" + came[16:] + b"\x04\0\x04more"
        arrival = Arrival(VISITOR, SITE, SITE, came)
        self.assertEqual(self.send("v2", arrival), came)
        self.assertEqual(self.send("v1", arrival), encode_v1(VISITOR, SITE))

    def test_one_write(self) -> None:
        """Header and hello leave in one write, and the header does not count as the visitor's."""
        plain = self.factory._targets
        self.factory._targets = {way: HeadedTarget(plain[way], "v1") for way in (ACME, WEB)}
        one, other = connected()
        self.addCleanup(one.close)
        self.addCleanup(other.close)
        self.front.fileno = one.fileno  # type: ignore[attr-defined]
        self.server.dataReceived(WEB_HELLO)
        client, back = self.answer()
        lead = b"PROXY TCP4 192.0.2.7 10.0.0.1 50000 12345\r\n"
        self.assertEqual(back.value(), lead + WEB_HELLO)
        self.assertEqual(self.server.relay.moved, (len(WEB_HELLO), 0))
        client.connectionLost()
        self.server.connectionLost()
        self.assertEqual(self.factory.statistics.fallback.bytes_from_visitors, len(WEB_HELLO))
