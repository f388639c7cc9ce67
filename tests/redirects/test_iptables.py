"""Steering by iptables: every rule, in memory."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import LogLevel
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

from acme_alpn_proxy.errors import StartError, VisitorsLost
from acme_alpn_proxy.firewall import judgement, xtables
from acme_alpn_proxy.firewall.reading import CannotLook
from acme_alpn_proxy.host import facts, routes
from acme_alpn_proxy.interfaces import NOT_FOUND, ICommands, IRedirect
from acme_alpn_proxy.redirects import iptables
from acme_alpn_proxy.redirects.guardprocess import LIFETIME
from acme_alpn_proxy.redirects.iptables import IptablesRedirect
from acme_alpn_proxy.redirects.leftovers import keeper_comment

from ..fake_iptables import LOCKED, FakeIptables
from .iptables_case import BOTH, DNAT, PORT, REDIRECT, STEERING, IptablesCase

CUSTOM = "ACME_ALPN_PROXY_RULESPEC is right"


class ApplyTests(IptablesCase):
    def test_interface(self) -> None:
        """It is a redirect, listens on every address, and has a text with its port."""
        redirect = IptablesRedirect(PORT)
        verifyObject(IRedirect, redirect)
        verifyObject(ICommands, self.iptables)
        self.assertEqual(self.successResultOf(redirect.prepare(self.iptables)), ("::",))
        self.assertEqual(str(redirect), "iptables")

    def test_one_redirect_and_one_keeper_a_family(self) -> None:
        """Applied, there is one redirect and one keeper for each family."""
        redirect = self.applied()
        comment = keeper_comment(os.getpid(), redirect._number)
        keeper = f"-m conntrack --ctstate INVALID -m comment --comment {comment}"
        self.assertEqual(self.iptables.rules("nat"), {binary: [STEERING] for binary in BOTH})
        self.assertEqual(self.iptables.rules("mangle"), {binary: [keeper] for binary in BOTH})

    def test_order(self) -> None:
        """The keepers are there before the first visitor is steered, and IPv6 comes first."""
        self.applied()
        changes = [
            (call[0], call[4], call[5])
            for call in self.iptables.calls
            if {"-A", "-I", "-D"}.intersection(call)
        ]
        self.assertEqual(
            changes,
            [
                ("ip6tables", "mangle", "-I"),
                ("iptables", "mangle", "-I"),
                ("ip6tables", "nat", "-I"),
                ("iptables", "nat", "-I"),
            ],
        )

    def test_before_the_rules_of_others(self) -> None:
        """A rule that publishes :443 for a container does not take visitors away before ours."""
        self.iptables.chains["iptables", "nat", "PREROUTING"].append(["-j", "DOCKER"])
        self.applied()
        self.assertEqual(self.iptables.rules("nat")["iptables"], [STEERING, "-j DOCKER"])

    def test_rulespec(self) -> None:
        """The operator's own rulespec is used unchanged."""
        self.applied(IptablesRedirect(PORT, ["-p", "tcp", "-j", "REDIRECT"]))
        expected = {binary: ["-p tcp -j REDIRECT"] for binary in BOTH}
        self.assertEqual(self.iptables.rules("nat"), expected)

    def test_ipv6_switched_off(self) -> None:
        """With IPv6 switched off, it runs nothing for IPv6."""
        self.applied(IptablesRedirect(PORT, ipv6=False))
        self.assertFalse([call for call in self.iptables.calls if call[0].startswith("ip6")])
        self.assertEqual(self.lines(LogLevel.info), [])

    def test_no_ipv6(self) -> None:
        """If the host, or the listener, has no IPv6, only IPv4 is steered, and the log says so."""
        with self.subTest("no IPv6 on the host"):
            self.host(has_ipv6=False)
            self.applied()
            self.assertEqual(list(self.iptables.rules("nat")), ["iptables"])
            self.assertIn("no IPv6", self.lines(LogLevel.info)[0])
        with self.subTest("no IPv6 listener"):
            self.iptables = FakeIptables()
            self.host(has_ipv6=True)
            self.listeners = [self.listener(socket.AF_INET)]
            self.applied()
            self.assertEqual(list(self.iptables.rules("nat")), ["iptables"])
            self.assertEqual(self.guards[-1].order["commands"], [["iptables", "-w", "5"]])


class RefusalTests(IptablesCase):
    def number_of_calls(self, make: Callable[[], IptablesRedirect]) -> int:
        """The number of calls in a successful start."""
        self.iptables = FakeIptables()
        self.applied(make())
        return self.guards[-1].calls_so_far

    def test_any_call_fails(self) -> None:
        """Whichever call of a start fails, no rule is left and others' rules stay as they were."""
        rulespec = DNAT.split()
        for make in (
            lambda: IptablesRedirect(PORT, force=True),  # what only looks may fail
            lambda: IptablesRedirect(PORT, rulespec, force=True),
        ):
            calls = self.number_of_calls(make)
            self.assertGreaterEqual(calls, 8)
            for number in range(1, calls + 1):
                self.claims.clear()
                self.iptables = FakeIptables()
                self.iptables.chains["iptables", "nat", "PREROUTING"].append(["-j", "DOCKER"])
                self.iptables.chains["ip6tables", "mangle", "PREROUTING"].append(["-j", "RETURN"])
                before = self.iptables.snapshot()
                self.fail_calls(number)
                self.refused(self.apply(make()), "lock")
                self.assertEqual(self.iptables.snapshot(), before, f"call {number}")
                for claim in self.claims:
                    self.assertEqual(claim.fileno(), -1, "the claim is given back")

    def test_remedies(self) -> None:
        """The refusal names the command, its status, its output and a remedy."""
        listing = "-t nat -S PREROUTING"
        for number, failing, code, output, remedy, status in (
            (1, listing, NOT_FOUND, "not found on PATH", "install ip6tables", os.EX_UNAVAILABLE),
            (1, listing, 4, LOCKED, "try again when it has finished", os.EX_TEMPFAIL),
            (3, "-t nat -C PREROUTING -j X", 2, "unknown option", CUSTOM, os.EX_CONFIG),
            (7, "-t mangle -I PREROUTING -m", 3, "no match", CUSTOM, os.EX_CONFIG),
            (9, "-t nat -I PREROUTING -j X", 2, "no target", CUSTOM, os.EX_CONFIG),
            (1, listing, 3, "no\nsuch table\n", "run 'ip6tables -t nat -L' as root", os.EX_OSERR),
        ):
            self.fail_calls(number, code=code, output=output)
            rulespec = ["-j", "X"] if remedy == CUSTOM else None
            attempt = self.apply(IptablesRedirect(PORT, rulespec, force=True))
            problem: Any = self.failureResultOf(attempt, StartError).value
            self.assertTrue(str(problem).startswith(f"'ip6tables -w 5 {failing}"), problem)
            shown = " ".join(output.split())
            self.assertIn(f"' failed with status {code}: {shown}; ", str(problem))
            self.assertIn(remedy, str(problem))
            self.assertIn("ACME_ALPN_PROXY_DISABLEV6=y", str(problem))
            self.assertEqual(problem.status, status)

    def test_not_permitted(self) -> None:
        """Without the privilege, the remedy is to be root, or to have the capability, and nothing
        else."""
        self.patch(xtables, "may_administer_network", lambda: False)
        self.fail_calls(1, code=4, output="Permission denied")
        attempt = self.apply(IptablesRedirect(PORT, force=True))
        problem: Any = self.failureResultOf(attempt, StartError).value
        self.assertRegex(
            str(problem),
            r"denied; run this as root \(in a container: with CAP_NET_ADMIN\)$",
        )
        self.assertEqual(problem.status, os.EX_NOPERM)

    def test_remedy_of_ipv4(self) -> None:
        """If IPv4 fails, switching IPv6 off is not offered as a remedy."""
        self.fail_calls(1)
        text = str(
            self.failureResultOf(
                self.apply(IptablesRedirect(PORT, ipv6=False, force=True)), StartError
            ).value
        )
        self.assertNotIn("DISABLEV6", text)

    def test_interface_without_address(self) -> None:
        """If REDIRECT would lead nowhere, the refusal has the DNAT rule that works."""
        self.patch(facts, "unnumbered_interfaces", lambda f: ["wan0"] if f == 4 else [])
        self.refused(
            self.apply(IptablesRedirect(PORT)), "wan0, where REDIRECT finds no IPv4 address"
        )
        self.assertEqual(self.iptables.calls, [])
        for flag in ("--to-port", "--to-ports"):
            rulespec = ["-p", "tcp", "-j", "REDIRECT", flag, str(PORT)]
            advice = "'-p tcp -j DNAT --to-destination :21443'"
            self.refused(self.apply(IptablesRedirect(PORT, rulespec)), advice)
        self.applied(IptablesRedirect(PORT, DNAT.split()))

    def test_interface_that_nobody_comes_in_by(self) -> None:
        """A VPN's interface without an address, through which packets only leave, is no reason."""
        self.patch(facts, "unnumbered_interfaces", lambda family: ["wg0"])
        self.patch(routes, "only_go_out", lambda family, interfaces: True)
        self.applied()


class GuardedTests(IptablesCase):
    """What only the guard does once the rules are there."""

    def test_life(self) -> None:
        """The guard is there before the first rule, makes and looks after all of them, and is asked
        to remove and to release."""
        redirect = self.applied()
        (guard,) = self.guards
        self.assertEqual(guard.rules_before, {})
        self.assertEqual(guard.order["commands"], [[binary, "-w", "5"] for binary in BOTH])
        self.assertEqual(guard.order["keeper"][-1], keeper_comment(os.getpid(), redirect._number))
        self.assertEqual(guard.order["port"], PORT)
        self.assertTrue(guard.order["expires"])
        self.successResultOf(redirect.look_after(self.iptables))
        self.successResultOf(redirect.remove(self.iptables))
        self.assertEqual(guard.wishes, ["apply", "look", "remove"])
        self.assertEqual(self.iptables.rules("nat"), {})
        self.assertEqual(set(self.iptables.rules("mangle")), set(BOTH))
        self.successResultOf(redirect.release(self.iptables))
        self.assertEqual(guard.wishes, ["apply", "look", "remove", "release"])
        self.assertTrue(guard.gone)
        self.assertEqual(self.iptables.snapshot(), {})

    def test_own_rule_stays_as_written(self) -> None:
        """A rulespec of the operator's own does not expire."""
        self.applied(IptablesRedirect(PORT, DNAT.split()))
        self.assertFalse(self.guards[0].order["expires"])

    def test_nothing_applied(self) -> None:
        """If nothing is applied, no guard is asked; the same holds after a stop."""
        redirect = self.applied()
        self.successResultOf(redirect.remove(self.iptables))
        self.successResultOf(redirect.release(self.iptables))
        self.guards[0].wishes.clear()
        for idle in (redirect, IptablesRedirect(PORT)):
            self.successResultOf(idle.remove(self.iptables))
            self.successResultOf(idle.release(self.iptables))
        self.assertEqual(self.guards[0].wishes, [])

    def test_wiped(self) -> None:
        """Rules that another program has removed are put back, which is a line in the log."""
        redirect = self.applied()
        before = self.iptables.snapshot()
        del self.iptables.chains["iptables", "nat", "PREROUTING"]
        del self.iptables.chains["ip6tables", "mangle", "PREROUTING"]
        self.successResultOf(redirect.look_after(self.iptables))
        self.assertEqual(self.iptables.snapshot(), before)
        self.assertEqual(
            self.lines(LogLevel.warn),
            [
                "Another program removed rules of the proxy (ip6tables, iptables); the proxy has"
                " inserted them again"
            ],
        )

    def test_wiped_by_a_firewall_that_drops(self) -> None:
        """Into a firewall that would drop visitors the rules are not put back."""
        redirect = self.applied()
        self.iptables.chains.clear()
        self.patch(judgement, "look", lambda *host: fail(CannotLook("a rule drops them")))
        problem = self.failureResultOf(redirect.look_after(self.iptables), VisitorsLost).value
        self.assertIn("a rule drops them", str(problem))
        self.assertEqual(self.iptables.rules("nat"), {})

    def test_not_first(self) -> None:
        """If another rule was put before ours, ours is moved to the front, and the log says so."""
        redirect = self.applied()
        self.iptables.chains["iptables", "nat", "PREROUTING"].insert(0, ["-j", "DOCKER"])
        self.successResultOf(redirect.look_after(self.iptables))
        self.assertEqual(self.iptables.rules("nat")["iptables"], [STEERING, "-j DOCKER"])
        self.assertEqual(
            self.lines(LogLevel.warn),
            [
                "Another program inserted a rule before that of the proxy (iptables); the proxy's"
                " rule is the first one again"
            ],
        )

    def test_no_expiry(self) -> None:
        """If iptables lacks the match for the time, the rules have no expiry time, and the log says
        so."""
        self.fail_calls(7, code=2, output="Couldn't load match `time'")
        self.applied(IptablesRedirect(PORT, force=True))
        self.assertEqual(self.iptables.rules("nat"), {binary: [REDIRECT] for binary in BOTH})
        self.assertIn("no match 'time'", self.lines(LogLevel.warn)[0])

    def test_killed(self) -> None:
        """If the guard was killed another one goes on with its rules, and that is logged."""
        redirect = self.applied()
        self.guards[0].gone = True
        self.successResultOf(redirect.look_after(self.iptables))
        self.assertEqual(self.guards[1].wishes, ["take over", "look"])
        self.assertEqual(self.iptables.rules("nat"), {binary: [STEERING] for binary in BOTH})
        self.assertIn("the proxy starts a new one", self.lines(LogLevel.warn)[0])
        self.successResultOf(redirect.remove(self.iptables))
        self.successResultOf(redirect.release(self.iptables))
        self.assertEqual(self.iptables.snapshot(), {})

    def test_killed_after_the_privileges_were_dropped(self) -> None:
        """A killed guard cannot be replaced after the privileges were dropped; the proxy waits
        until its rules have expired."""
        redirect = self.applied()
        self.guards[0].gone = True
        self.host(may_administer_network=False)
        waited: list[float] = []

        def pause(seconds: float) -> Deferred[None]:
            waited.append(seconds)
            return succeed(None)

        self.patch(self.iptables, "pause", pause)
        self.successResultOf(redirect.remove(self.iptables))
        self.assertEqual(waited, [LIFETIME])


class ContainerTests(IptablesCase):
    def test_web_server_outside(self) -> None:
        """In a container that shares the web server's network, it is refused: killed as a whole, it
        would leave its rules. If the web server is inside, it is not refused."""
        self.host(in_first_pid_namespace=False)
        for outside in (True, False):
            self.patch(iptables, "served_from_elsewhere", lambda port, outside=outside: outside)
            if outside:
                self.refused(self.apply(IptablesRedirect(PORT)), "outside this container")
                self.assertEqual(self.iptables.calls, [])
            else:
                self.applied()


class ConnectionTrackingTests(IptablesCase):
    def warnings(self, **facts: Any) -> list[str]:
        self.host(**facts)
        self.iptables = FakeIptables()
        self.applied()
        return self.lines(LogLevel.warn)

    def test_table_may_fill(self) -> None:
        """If tracking was idle and the host's connections would fill over half of the table, the
        operator gets the name of the setting to change."""
        warned = self.warnings(
            tracked_connections=0, max_tracked_connections=1_000, tcp_connections=501
        )
        self.assertEqual(len(warned), 1)
        self.assertIn("whose 501 TCP connections", warned[0])
        self.assertIn("net.netfilter.nf_conntrack_max", warned[0])

    def test_no_warning(self) -> None:
        """Nothing is said if the table is large, if it was in use before, or is unknown."""
        busy = {"tracked_connections": 0, "max_tracked_connections": 1_000, "tcp_connections": 501}
        for fact in ({"tcp_connections": 500}, {"tracked_connections": 1}):
            self.assertEqual(self.warnings(**(busy | fact)), [], fact)
        self.assertEqual(self.warnings(**(busy | {"max_tracked_connections": None})), [])


class CautionTests(IptablesCase):
    """If there are other redirects to try, iptables refuses everything that may do harm."""

    def setUp(self) -> None:
        super().setUp()
        self.programs = {"iptables", "ip6tables"}
        self.patch(shutil, "which", lambda name: name if name in self.programs else None)

    def prepare(self, *, cautious: bool = True, **host: object) -> None:
        self.host(**host)
        redirect = IptablesRedirect(PORT, cautious=cautious)
        self.refusal = ""
        redirect.prepare(self.iptables).addErrback(self.note)

    def note(self, failure: Failure) -> None:
        failure.trap(StartError)
        self.refusal = str(failure.value)

    def test_nothing_hurts(self) -> None:
        """If both programs exist, and tracking is in use or its table is large enough, iptables
        does not refuse."""
        self.prepare(max_tracked_connections=1_000, tcp_connections=501)
        self.assertEqual(self.refusal, "")
        self.prepare(tracked_connections=0, max_tracked_connections=1_000, tcp_connections=500)
        self.assertEqual(self.refusal, "")

    def test_missing(self) -> None:
        """A program that is missing is found before anything is done."""
        for name in ("iptables", "ip6tables"):
            self.programs = {"iptables", "ip6tables"} - {name}
            self.prepare()
            self.assertRegex(self.refusal, f"'{name}' failed .*not found on PATH; install {name}")
        self.programs = {"iptables"}
        self.prepare(has_ipv6=False)
        self.assertEqual(self.refusal, "")

    def test_port_of_another_user(self) -> None:
        """A local user on the port cannot keep the other redirects from steering."""
        self.patch(iptables, "taken_by_another_user", lambda port: port == PORT)
        self.prepare()
        self.assertRegex(self.refusal, "^port 21443 is taken by another program; stop that one")
        self.prepare(cautious=False)
        self.assertEqual(self.refusal, "")

    def test_small_table(self) -> None:
        """Idle tracking with too small a table is a reason, even if it is not loaded yet."""
        pattern = "switch on connection tracking .* more than half .*; raise net.netfilter.nf_conn"
        for limit, count in ((1_000, 501), (None, 32_769)):
            idle: Any = {"tracked_connections": 0, "max_tracked_connections": limit}
            self.prepare(**idle, tcp_connections=count)
            self.assertRegex(self.refusal, pattern)
            self.prepare(**idle, tcp_connections=count - 1)
            self.assertEqual(self.refusal, "")

    def test_alone(self) -> None:
        """If it is the only way asked for, none of these is a reason."""
        self.programs = set()
        idle = {"tracked_connections": 0, "max_tracked_connections": 1_000}
        self.prepare(cautious=False, **idle, tcp_connections=501)
        self.assertEqual(self.refusal, "")
