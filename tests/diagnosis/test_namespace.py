"""The namespace from which a probe connects: its networks, and its failures."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
from types import SimpleNamespace

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.diagnosis import namespace
from acme_alpn_proxy.diagnosis.namespace import free_subnet, unique_local_subnet
from acme_alpn_proxy.errors import StartError


class SubnetTests(SynchronousTestCase):
    def test_free(self) -> None:
        """The network is within 169.254.192.0 to 169.254.253.255, for any number."""
        for number in (0, 1, 0x3DFF, 0x3E00, 1 << 20):
            subnet = free_subnet("", [number])
            self.assertEqual((subnet.family, subnet.length), (4, 30))
            first = ipaddress.IPv4Address("169.254.192.0")
            last = ipaddress.IPv4Address("169.254.253.255")
            self.assertTrue(first <= ipaddress.IPv4Address(subnet.host) <= last)
            network = ipaddress.IPv4Interface(f"{subnet.host}/30").network
            self.assertIn(ipaddress.IPv4Address(subnet.dialler), network)

    def test_in_use(self) -> None:
        """A network with a route is not taken; routes to very large networks do not count."""
        listing = (
            "default via 192.0.2.1 dev eth0\n"
            "169.254.0.0/16 dev eth0 scope link\n"
            "169.254.192.0/28 dev eth1 scope link\n"
            "local 169.254.192.17 dev eth1 table local scope host\n"
        )
        subnet = free_subnet(listing, [0, 4, 12, 16, 20, 24])
        self.assertEqual((subnet.host, subnet.dialler), ("169.254.192.21", "169.254.192.22"))
        with self.assertRaisesRegex(StartError, "; remove a route in 169.254.0.0/16"):
            free_subnet(listing, [0, 4])

    def test_unique_local(self) -> None:
        """For IPv6 it is a random network of fd00::/8, each time another one."""
        one, other = unique_local_subnet(), unique_local_subnet()
        self.assertNotEqual(one.host, other.host)
        self.assertIn(ipaddress.IPv6Address(one.host), ipaddress.IPv6Network("fd00::/8"))
        self.assertEqual(int(ipaddress.IPv6Address(one.dialler)) & 0xFFFF, 2)


class NamespaceTests(SynchronousTestCase):
    def test_no_ip(self) -> None:
        """Without iproute2, the remedy is to install it."""
        self.patch(os, "environ", {"PATH": "/nowhere"})
        with self.assertRaisesRegex(StartError, "not found on PATH; install ip "):
            namespace.Namespace("aap-test", [4])

    def test_name_taken(self) -> None:
        """A failed command is shown with its output; without root, the remedy is to be root."""
        self.patch(namespace, "_unshare", lambda: os.getpid())
        for may, remedy in ((True, "see why that"), (False, "run this as root")):
            self.patch(namespace, "may_administer_network", lambda may=may: may)
            failure = f"'ip link add lo .*status 2: .*; {remedy}"
            with self.assertRaisesRegex(StartError, failure):
                namespace.Namespace("lo", [4])


class UnshareTests(SynchronousTestCase):
    def test_not_permitted(self) -> None:
        """The kernel's word is in the error."""
        library = SimpleNamespace(unshare=lambda flags: -1)
        self.patch(ctypes, "CDLL", lambda name, use_errno: library)
        ctypes.set_errno(errno.EPERM)
        with self.assertRaisesRegex(StartError, "namespace: Operation not permitted; run this as"):
            namespace._unshare()
