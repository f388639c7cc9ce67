"""Facts about the host, from a proc folder that the test makes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.host import facts

ROUTE_HEADER = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
UP, UP_AND_REJECT = "0001", "0201"
GLOBAL, LINK_LOCAL = "00", "20"


def route_v4(interface: str, destination: str, mask: str, flags: str = UP) -> str:
    """A line of /proc/net/route."""
    return f"{interface}\t{destination}\t00000000\t{flags}\t0\t0\t0\t{mask}\t0\t0\t0\n"


def route_v6(interface: str, destination: str, length: str, flags: str = UP) -> str:
    """A line of /proc/net/ipv6_route."""
    nowhere = "0" * 32
    address = destination.ljust(32, "0")
    return (
        f"{address} {length} {nowhere} 00 {nowhere} 00000400 00000001 00000000 {flags:>08}"
        f" {interface:>8}\n"
    )


def address_v6(interface: str, scope: str) -> str:
    """A line of /proc/net/if_inet6."""
    return f"{'2001db8'.ljust(32, '0')} 02 40 {scope} 80 {interface:>8}\n"


class HostCase(SynchronousTestCase):
    """A proc folder, empty."""

    def setUp(self) -> None:
        folder = TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.proc = Path(folder.name)

    def write(self, name: str, text: str) -> None:
        path = self.proc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class IPv6Tests(HostCase):
    def test_address(self) -> None:
        """A host with any IPv6 address has IPv6."""
        self.write("net/if_inet6", address_v6("lo", "10"))
        self.assertTrue(facts.has_ipv6(self.proc))

    def test_no_address(self) -> None:
        """One on which IPv6 is switched off has none."""
        self.write("net/if_inet6", "")
        self.assertFalse(facts.has_ipv6(self.proc))

    def test_not_in_the_kernel(self) -> None:
        """A host whose kernel was built without IPv6 has none either."""
        self.assertFalse(facts.has_ipv6(self.proc))
        self.assertFalse(facts.new_interfaces_have_ipv6(self.proc))

    def test_new_interfaces(self) -> None:
        """A host may have IPv6, and give new interfaces none."""
        for setting, have in (("0\n", True), ("1\n", False)):
            self.write("sys/net/ipv6/conf/default/disable_ipv6", setting)
            self.assertEqual(facts.new_interfaces_have_ipv6(self.proc), have)


class ListeningAddressTests(HostCase):
    def address(self, *lines: str) -> str:
        self.write("net/if_inet6", "".join(lines))
        return facts.ipv6_to_listen_on(self.proc)

    def test_loopback(self) -> None:
        """The loopback's address is taken if it exists, or if there is no other."""
        loopback = f"{'1'.rjust(32, '0')} 01 80 10 80       lo\n"
        self.assertEqual(self.address(address_v6("net0", GLOBAL), loopback), "::1")
        self.assertEqual(self.address(address_v6("net0", LINK_LOCAL)), "::1")
        self.assertEqual(facts.ipv6_to_listen_on(self.proc / "none"), "::1")

    def test_off_on_the_loopback(self) -> None:
        """If IPv6 is off on the loopback, a global address is taken, but no tentative one."""
        tentative = (
            address_v6("net1", GLOBAL).replace(" 80 ", " c0 ").replace("2001db80", "2002db80")
        )
        self.assertEqual(self.address(tentative, address_v6("net0", GLOBAL)), "2001:db80::")


class UnnumberedInterfacesTests(HostCase):
    def ipv4(self, *routes: str) -> list[str]:
        self.write("net/route", ROUTE_HEADER + "".join(routes))
        return facts.unnumbered_interfaces(4, self.proc)

    def ipv6(self, routes: list[str], addresses: list[str]) -> list[str]:
        self.write("net/ipv6_route", "".join(routes))
        self.write("net/if_inet6", "".join(addresses))
        return facts.unnumbered_interfaces(6, self.proc)

    def test_ipv6_route_to_this_host(self) -> None:
        """Nobody comes in by a route that leads to this host itself, such as those of a way back
        for visitors' addresses (RTF_LOCAL)."""
        home = route_v6("acme-alpn0", "", "00", "80200001")
        self.assertEqual(self.ipv6([home], []), [])
        self.assertEqual(self.ipv6([home, route_v6("bare0", "", "00")], []), ["bare0"])

    def test_ipv4_default_route(self) -> None:
        """Visitors come in where the default routes are; other interfaces do not matter."""
        named = self.ipv4(
            route_v4("bare1", "00000000", "00000000"),
            route_v4("bare0", "00000000", "00000000"),
            route_v4("bare2", "0000000A", "000000FF"),
        )
        self.assertEqual(named, ["bare0", "bare1"])

    def test_ipv4_with_address(self) -> None:
        """An interface with an address is fine."""
        self.assertEqual(self.ipv4(route_v4("lo", "00000000", "00000000")), [])

    def test_ipv4_no_default_route(self) -> None:
        """Without a default route they come in wherever there is a route."""
        named = self.ipv4(
            route_v4("bare0", "0000000A", "000000FF"), route_v4("bare1", "0000000B", "000000FF")
        )
        self.assertEqual(named, ["bare0", "bare1"])

    def test_ipv4_half_of_everywhere(self) -> None:
        """A route to 0.0.0.0/1 is not the default route."""
        named = self.ipv4(
            route_v4("bare0", "00000000", "00000080"), route_v4("lo", "00000000", "00000000")
        )
        self.assertEqual(named, [])

    def test_ipv4_unusable_routes(self) -> None:
        """No visitor comes in by a route that is down or refuses."""
        named = self.ipv4(
            route_v4("bare0", "00000000", "00000000", "0000"),
            route_v4("*", "00000000", "00000000", UP_AND_REJECT),
        )
        self.assertEqual(named, [])

    def test_ipv6_default_route(self) -> None:
        """For IPv6, too, the default routes count; the null route on the loopback does not."""
        named = self.ipv6(
            [
                route_v6("bare0", "", "00"),
                route_v6("net0", "", "00"),
                route_v6("bare1", "20010db8", "20"),
                route_v6("half", "", "01"),
                route_v6("elsewhere", "20", "00"),
                route_v6("down", "", "00", "0000"),
                route_v6("refusing", "", "00", UP_AND_REJECT),
                route_v6("lo", "", "00"),
            ],
            [address_v6("net0", GLOBAL), address_v6("lo", "10")],
        )
        self.assertEqual(named, ["bare0"])

    def test_ipv6_link_local(self) -> None:
        """An interface with only a link-local address is no use for visitors from elsewhere."""
        named = self.ipv6([route_v6("net0", "", "00")], [address_v6("net0", LINK_LOCAL)])
        self.assertEqual(named, ["net0"])

    def test_not_in_the_kernel(self) -> None:
        """If the kernel lacks a family, the list of interfaces without an address is empty."""
        for family in (4, 6):
            self.assertEqual(facts.unnumbered_interfaces(family, self.proc), [])


class LegacyTablesTests(HostCase):
    def test_tables(self) -> None:
        """The tables of the legacy iptables are those that the kernel has, family by family."""
        self.write("net/ip_tables_names", "nat\nfilter\n")
        self.assertEqual(facts.legacy_tables(4, self.proc), ["nat", "filter"])
        self.assertEqual(facts.legacy_tables(6, self.proc), [])
        self.write("net/ip6_tables_names", "raw\n")
        self.assertEqual(facts.legacy_tables(6, self.proc), ["raw"])


class ConnectionTests(HostCase):
    def test_tracking_not_loaded(self) -> None:
        """Without connection tracking, there are no entries and there is no limit."""
        self.assertEqual(facts.tracked_connections(self.proc), 0)
        self.assertIsNone(facts.max_tracked_connections(self.proc))

    def test_tracking(self) -> None:
        """The table's entries and its size are the kernel's."""
        self.write("sys/net/netfilter/nf_conntrack_count", "17\n")
        self.write("sys/net/netfilter/nf_conntrack_max", "65536\n")
        self.assertEqual(facts.tracked_connections(self.proc), 17)
        self.assertEqual(facts.max_tracked_connections(self.proc), 65536)

    def test_tcp_of_both_families(self) -> None:
        """TCP sockets in use of both families count, and those in TIME_WAIT, but no others."""
        self.write(
            "net/sockstat",
            "sockets: used 290\nTCP: inuse 30 orphan 1 tw 400 alloc 31 mem 3\nUDP: inuse 5 mem 2\n",
        )
        self.write("net/sockstat6", "TCP6: inuse 7\nUDP6: inuse 3\n")
        self.assertEqual(facts.tcp_connections(self.proc), 437)

    def test_tcp_of_one_family(self) -> None:
        """Without IPv6 those of IPv4 count."""
        self.write("net/sockstat", "TCP: inuse 3 orphan 0 tw 1 alloc 4 mem 1\n")
        self.assertEqual(facts.tcp_connections(self.proc), 4)


class CapabilityTests(HostCase):
    def test_effective(self) -> None:
        """Only effective capabilities count; all of those asked for are needed."""
        (self.proc / "self").mkdir()
        own = "CapPrm:\tffffffffffffffff\nCapEff:\t0000000000001080\nCapBnd:\tffffffffffffffff\n"
        (self.proc / "self" / "status").write_text(f"Name:\tproxy\n{own}")
        self.assertTrue(facts.has_capabilities(7, 12, proc=self.proc))
        self.assertFalse(facts.has_capabilities(6, 7, proc=self.proc))

    def test_own(self) -> None:
        """The information can be read."""
        self.assertIs(facts.may_administer_network(), facts.has_capabilities(12))


class ProcessStartTimeTests(HostCase):
    def stat(self, name: str, state: str) -> None:
        numbers = " ".join(str(number) for number in range(4, 53))  # field 22 holds 22
        self.write("7/stat", f"7 ({name}) {state} {numbers}\n")

    def test_any_name(self) -> None:
        """A program may have any name: the start time is found after it."""
        for name in ("sshd", "a b", "a) R 1 (b", ")"):
            self.stat(name, "S")
            self.assertEqual(facts.process_start_time(7, self.proc), "22", name)

    def test_nobody(self) -> None:
        """An unused PID has no start time, and neither has a zombie process."""
        self.assertIsNone(facts.process_start_time(7, self.proc))
        self.stat("gone", "Z")
        self.assertIsNone(facts.process_start_time(7, self.proc))

    def test_real(self) -> None:
        """On the real kernel: this process's start time stays the same, a killed child has none."""
        own = facts.process_start_time(os.getpid())
        self.assertIsNotNone(own)
        self.assertEqual(facts.process_start_time(str(os.getpid())), own)
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        with child:
            started = facts.process_start_time(child.pid)
            child.send_signal(signal.SIGKILL)
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            self.assertIsNotNone(started)
            self.assertIsNone(facts.process_start_time(child.pid))
