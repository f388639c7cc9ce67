"""Addresses and routes, from this host's kernel and from one with given answers."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.host import netlink, routes
from acme_alpn_proxy.host.netlink import Netlink, attribute, attributes
from acme_alpn_proxy.host.routes import Interface

from ..fakenetlink import FakeNetlink

GET_LINK, GET_ADDRESS, GET_ROUTE, GET_RULE = 18, 22, 26, 34
LOOPBACK, POINT_TO_POINT, NO_ARP = 0x08, 0x10, 0x80
UNIVERSE, LINK = 0, 253


class NetlinkTests(SynchronousTestCase):
    def test_attributes(self) -> None:
        """Attributes are padded, and their flags are removed when read; a truncated one is not
        read."""
        data = attribute(1, b"abc") + attribute(0x8002, b"") + attribute(3, b"four")
        self.assertEqual(len(data), 8 + 4 + 8)
        self.assertEqual(attributes(data), {1: b"abc", 2: b"", 3: b"four"})
        self.assertEqual(attributes(data[:-8] + b"\1\0"), {1: b"abc", 2: b""})
        self.assertEqual(attributes(b"\0\0\1\0"), {})

    def test_error(self) -> None:
        """If the kernel refuses, the error has its number."""
        with Netlink(netlink.ROUTE) as kernel:
            self.assertRaises(OSError, kernel.ask, GET_ROUTE, b"")

    def test_this_host(self) -> None:
        """One answer to a question, and all of them to a dump."""
        (loopback,) = [each for each in routes.interfaces(4) if each.name == "lo"]
        self.assertTrue(loopback.apart)
        here = ip_address("127.0.0.1")
        route = routes.route(here, 443, here)
        self.assertEqual((str(route), route), ("through lo", routes.route(here, 21443, here)))
        self.assertIn(routes.routes_by_mark(4), (False, True))


class Kernel(FakeNetlink):
    """Answers dumps with given messages: links, then addresses."""

    def __init__(self) -> None:
        self.answers: dict[int, list[bytes]] = {}

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        return iter(self.answers.get(kind, []))

    def link(self, index: int, name: str, flags: int = 0) -> None:
        head = struct.pack("=BBHiII", 0, 0, 1, index, flags, 0)
        answer = head + attribute(3, name.encode() + b"\0")
        self.answers.setdefault(GET_LINK, []).append(answer)

    def address(
        self, index: int, address: str, length: int, scope: int = UNIVERSE, peer: str = ""
    ) -> None:
        own = ip_address(address)
        family = socket.AF_INET if own.version == 4 else socket.AF_INET6
        head = struct.pack("=BBBBi", family, length, 0, scope, index)
        answer = head + attribute(1, ip_address(peer or address).packed)
        if own.version == 4:
            answer += attribute(2, own.packed)
        self.answers.setdefault(GET_ADDRESS, []).append(answer)


class InterfacesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.kernel = Kernel()
        self.patch(routes, "Netlink", self.kernel)

    def test_addresses(self) -> None:
        """Each interface has its global addresses in the kernel's order, and neighbours that are
        other than itself."""
        self.kernel.link(1, "lo", LOOPBACK)
        self.kernel.link(2, "eth0")
        self.kernel.link(3, "tun0", POINT_TO_POINT | NO_ARP)
        self.kernel.link(4, "dummy0", NO_ARP)
        self.kernel.address(2, "198.51.100.2", 24)
        self.kernel.address(2, "192.0.2.254", 24)
        self.kernel.address(2, "169.254.0.1", 16, LINK)
        self.kernel.address(3, "10.9.0.2", 32, peer="10.9.0.1")
        self.kernel.address(4, "203.0.113.5", 32)
        self.kernel.address(9, "192.0.2.9", 24)  # of an interface that has come meanwhile
        found = {each.name: each for each in routes.interfaces(4)}
        expected: list[tuple[str, bool, list[str], list[str]]] = [
            ("lo", True, [], []),
            ("eth0", False, ["198.51.100.2", "192.0.2.254"], ["198.51.100.254", "192.0.2.1"]),
            ("tun0", False, ["10.9.0.2"], ["10.9.0.1"]),
            ("dummy0", True, ["203.0.113.5"], []),
        ]
        for name, apart, addresses, neighbours in expected:
            self.assertEqual(
                found[name],
                Interface(
                    name,
                    apart,
                    tuple(map(ip_address, addresses)),
                    tuple(map(ip_address, neighbours)),
                ),
            )

    def test_ipv6(self) -> None:
        """An IPv6 interface has its global addresses too, with neighbours."""
        self.kernel.link(2, "eth0")
        self.kernel.address(2, "2001:db8:1::2", 64)
        self.kernel.address(2, "fe80::2", 64, LINK)
        ((interface),) = routes.interfaces(6)
        self.assertEqual(interface.addresses, (ip_address("2001:db8:1::2"),))
        self.assertIn(interface.neighbours[0], ip_network("2001:db8:1::/64"))

    def test_only_go_out(self) -> None:
        """No visitor comes in by a VPN without an address if another interface has an address and a
        default route. Visitors may come in by it if an address is on the loopback, or if the only
        route is the VPN's."""
        self.assertTrue(routes.only_go_out(6, ["wg0"]))
        self.kernel.link(1, "lo", LOOPBACK)
        self.kernel.link(2, "eth0")
        self.kernel.link(3, "wg0", POINT_TO_POINT | NO_ARP)
        self.kernel.address(2, "2001:db8:1::2", 64)
        self.assertTrue(routes.only_go_out(6, ["eth0", "wg0"]))
        self.assertFalse(routes.only_go_out(6, ["wg0"]))
        self.kernel.address(1, "2001:db8:2::2", 128)
        self.assertFalse(routes.only_go_out(6, ["eth0", "wg0"]))

    def test_routes_by_mark(self) -> None:
        """A rule without a mark does not make routes depend on marks; one with a mark does."""
        self.kernel.answers[GET_RULE] = [bytes(12) + attribute(10, bytes(4))]
        self.assertFalse(routes.routes_by_mark(4))
        self.kernel.answers[GET_RULE] += [bytes(12) + attribute(10, b"\7\0\0\0")]
        self.assertTrue(routes.routes_by_mark(4))
