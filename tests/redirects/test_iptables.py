"""Steering by iptables, and not steering at all: every rule, in memory."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks, succeed
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.host.processes import NOT_FOUND
from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host import facts
from acme_alpn_proxy.interfaces import ICommands, IRedirect
from acme_alpn_proxy.redirects import iptables as iptables_module
from acme_alpn_proxy.redirects.iptables import IptablesRedirect, default_rulespec, is_dead_keeper, is_leftover, keeper_comment
from acme_alpn_proxy.redirects.none import NoRedirect

from ..fake_iptables import LOCKED, FakeGuard, FakeIptables

PORT = 21443
BOTH = ("ip6tables", "iptables")
REDIRECT = (
    "-p tcp --tcp-flags FIN,SYN,RST,ACK SYN --dport 443 -m addrtype --dst-type LOCAL"
    f" -j REDIRECT --to-ports {PORT} -m comment --comment acme-alpn-proxy"
)
OF_THE_ORIGINAL = (
    f"-p tcp -m tcp --dport 443 -m comment --comment acme-alpn-proxy -j REDIRECT --to-ports {PORT}"
)
DNAT = f"-p tcp --dport 443 -j DNAT --to-destination :{PORT}"
DEAD_KEEPER = ["-m", "conntrack", "--ctstate", "INVALID", "-m", "comment", "--comment"]
DEAD_KEEPER += [f"acme-alpn-proxy keeper {os.getpid()} 1"]


class IptablesCase(SynchronousTestCase):
    """A host with both families, connection tracking in use, and every log line noted."""

    def setUp(self) -> None:
        self.iptables = FakeIptables()
        self.events: list[LogEvent] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)
        self.host(has_ipv6=True, tracked_connections=7)
        self.patch(facts, "may_administer_network", lambda: True)
        for name in ("unnumbered_interfaces", "legacy_tables", "visitor_interfaces"):
            self.patch(facts, name, lambda family: [])
        self.listeners = [self.listener(socket.AF_INET6)]
        self.guards: list[FakeGuard] = []
        self.claims: list[socket.socket] = []
        self.patch(iptables_module, "Guard", self.new_guard)
        self.patch(iptables_module, "claim_redirect", self.claim)

    def new_guard(self, claim: socket.socket, *words: Any) -> FakeGuard:
        self.guards.append(FakeGuard(self.iptables, claim, *words))
        return self.guards[-1]

    def claim(self, commands: ICommands, seconds: float) -> Deferred[socket.socket]:
        self.claims.append(self.listener(socket.AF_UNIX))
        return succeed(self.claims[-1])

    def host(self, **facts: object) -> None:
        """What the host answers from now on."""
        for name, answer in facts.items():
            self.patch(facts, name, lambda answer=answer: answer)

    def listener(self, family: socket.AddressFamily) -> socket.socket:
        listener = socket.socket(family)
        self.addCleanup(listener.close)
        return listener

    @inlineCallbacks
    def apply(self, redirect: IptablesRedirect) -> Any:
        self.hosts = yield redirect.prepare(self.iptables)
        yield redirect.apply(self.iptables, self.listeners)

    def applied(self, redirect: IptablesRedirect | None = None) -> IptablesRedirect:
        redirect = redirect or IptablesRedirect(PORT)
        self.successResultOf(self.apply(redirect))
        return redirect

    def refused(self, attempt: Deferred[None], words: str) -> None:
        """The attempt fails with one line that has these words."""
        text = str(self.failureResultOf(attempt, StartError).value)
        self.assertIn(words, text)
        self.assertNotIn("\n", text)

    def fail_calls(self, *numbers: int, code: int = 4, output: str = LOCKED) -> None:
        """These calls from now on, the next one is 1, fail."""
        so_far = len(self.iptables.calls)
        self.iptables.failures.update({so_far + number: (code, output) for number in numbers})

    def lines(self, level: LogLevel) -> list[str]:
        """What was logged at this level since the last look."""
        lines = [formatEvent(event) for event in self.events if event["log_level"] == level]
        self.events.clear()
        return lines


class ApplyTests(IptablesCase):
    def test_interface(self) -> None:
        """It is a redirect, listens on every address, and names itself and its port."""
        redirect = IptablesRedirect(PORT)
        verifyObject(IRedirect, redirect)
        verifyObject(ICommands, self.iptables)
        self.assertEqual(self.successResultOf(redirect.prepare(self.iptables)), ("::",))
        self.assertEqual(str(redirect), "iptables")

    def test_one_redirect_and_one_keeper_a_family(self) -> None:
        """Applied, there is one redirect and one keeper for each family."""
        self.applied()
        keeper = (
            f"-m conntrack --ctstate INVALID -m comment --comment {keeper_comment(os.getpid())}"
        )
        self.assertEqual(self.iptables.rules("nat"), {binary: [REDIRECT] for binary in BOTH})
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
        self.assertEqual(self.iptables.rules("nat")["iptables"], [REDIRECT, "-j DOCKER"])

    def test_rulespec(self) -> None:
        """A rulespec of the operator's own is used as it is."""
        self.applied(IptablesRedirect(PORT, ["-p", "tcp", "-j", "REDIRECT"]))
        expected = {binary: ["-p tcp -j REDIRECT"] for binary in BOTH}
        self.assertEqual(self.iptables.rules("nat"), expected)

    def test_ipv6_switched_off(self) -> None:
        """Told to leave IPv6 alone, it touches nothing of it."""
        self.applied(IptablesRedirect(PORT, ipv6=False))
        self.assertFalse([call for call in self.iptables.calls if call[0].startswith("ip6")])
        self.assertEqual(self.lines(LogLevel.info), [])

    def test_no_ipv6(self) -> None:
        """A host without IPv6, or a listener without, is steered by IPv4 alone, and told so."""
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
            self.assertEqual(self.guards[-1].binaries, ["iptables"])


class RefusalTests(IptablesCase):
    def number_of_calls(self, make: Callable[[], IptablesRedirect]) -> int:
        """How many calls a start takes that goes well."""
        self.iptables = FakeIptables()
        self.applied(make())
        return len(self.iptables.calls)

    def test_any_call_fails(self) -> None:
        """Whichever call of a start fails, no rule is left and others' rules stay as they were."""
        rulespec = DNAT.split()
        for make in (lambda: IptablesRedirect(PORT), lambda: IptablesRedirect(PORT, rulespec)):
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
        """The refusal names command, status, output and what to do about it."""
        for code, output, custom, remedy, status in (
            (NOT_FOUND, "not found on PATH", False, "install ip6tables", os.EX_UNAVAILABLE),
            (4, LOCKED, False, "try again when it has finished", os.EX_TEMPFAIL),
            (2, "unknown option", True, "ACME_ALPN_PROXY_RULESPEC is right", os.EX_CONFIG),
            (3, "no\nsuch table\n", False, "'ip6tables -t nat -L' does not", os.EX_OSERR),
        ):
            self.fail_calls(1, code=code, output=output)
            rulespec = ["-j", "X"] if custom else None
            attempt = self.apply(IptablesRedirect(PORT, rulespec, force=True))
            problem: Any = self.failureResultOf(attempt, StartError).value
            command = "'ip6tables -w 5 -t nat -S PREROUTING'"
            shown = " ".join(output.split())
            self.assertIn(f"{command} failed with status {code}: {shown}; ", str(problem))
            self.assertIn(remedy, str(problem))
            self.assertIn("ACME_ALPN_PROXY_DISABLEV6=y", str(problem))
            self.assertEqual(problem.status, status)

    def test_not_permitted(self) -> None:
        """Who may not is told to be root, as a root without the capability is, and nothing else."""
        self.patch(facts, "may_administer_network", lambda: False)
        self.fail_calls(1, code=4, output="Permission denied")
        attempt = self.apply(IptablesRedirect(PORT, force=True))
        problem: Any = self.failureResultOf(attempt, StartError).value
        self.assertRegex(
            str(problem),
            "denied; run this as root, with CAP_NET_ADMIN where[^;,]*$",
        )
        self.assertEqual(problem.status, os.EX_NOPERM)

    def test_remedy_of_ipv4(self) -> None:
        """Where IPv4 fails, leaving IPv6 alone is no remedy."""
        self.fail_calls(1)
        text = str(
            self.failureResultOf(self.apply(IptablesRedirect(PORT, ipv6=False)), StartError).value
        )
        self.assertNotIn("DISABLEV6", text)

    def test_interface_without_address(self) -> None:
        """Where REDIRECT would reach nobody it is refused with the DNAT rule that would."""
        self.patch(facts, "unnumbered_interfaces", lambda f: ["wan0"] if f == 4 else [])
        self.refused(self.apply(IptablesRedirect(PORT)), "wan0, which has no IPv4 address")
        self.assertEqual(self.iptables.calls, [])
        for flag in ("--to-port", "--to-ports"):
            rulespec = ["-p", "tcp", "-j", "REDIRECT", flag, str(PORT)]
            advice = "'-p tcp -j DNAT --to-destination :21443'"
            self.refused(self.apply(IptablesRedirect(PORT, rulespec)), advice)
        self.applied(IptablesRedirect(PORT, DNAT.split()))


class GuardedTests(IptablesCase):
    """What is left to the guard once the rules are there."""

    def test_life(self) -> None:
        """The guard is there before the first rule, and is asked to remove and to release."""
        redirect = self.applied()
        (guard,) = self.guards
        self.assertEqual(guard.rules_before, {})
        self.assertEqual(guard.binaries, list(BOTH))
        self.assertEqual(guard.keeper, keeper_comment(os.getpid()))
        self.successResultOf(redirect.look_after(self.iptables))
        self.successResultOf(redirect.remove(self.iptables))
        self.assertEqual(guard.wishes, ["look", "remove"])
        self.successResultOf(redirect.release(self.iptables))
        self.assertEqual(guard.wishes, ["look", "remove", "release"])
        self.assertTrue(guard.gone)

    def test_nothing_applied(self) -> None:
        """Where nothing is applied, nobody is asked; so it is after a stop."""
        redirect = self.applied()
        self.successResultOf(redirect.remove(self.iptables))
        self.successResultOf(redirect.release(self.iptables))
        self.guards[0].wishes.clear()
        for idle in (redirect, IptablesRedirect(PORT)):
            self.successResultOf(idle.remove(self.iptables))
            self.successResultOf(idle.release(self.iptables))
        self.assertEqual(self.guards[0].wishes, [])

    def test_wiped(self) -> None:
        """That somebody has wiped rules is a line in the log, and names the commands."""
        redirect = self.applied()
        self.guards[0].put_back = ["iptables", "ip6tables", "iptables"]
        self.successResultOf(redirect.look_after(self.iptables))
        self.assertEqual(
            self.lines(LogLevel.warn),
            ["Somebody had wiped rules of ip6tables, iptables; they are back"],
        )

    def test_killed(self) -> None:
        """If the guard was killed another one is asked, and that is logged."""
        redirect = self.applied()
        self.guards[0].gone = True
        self.successResultOf(redirect.remove(self.iptables))
        self.assertEqual([guard.wishes for guard in self.guards], [[], ["remove"]])
        self.assertIn("another one takes over", self.lines(LogLevel.warn)[0])


class LeftoverTests(IptablesCase):
    def add(self, binary: str, table: str, *rules: Sequence[str]) -> None:
        self.iptables.chains[binary, table, "PREROUTING"].extend(map(list, rules))

    def remove(self, redirect: IptablesRedirect) -> int:
        """How many rules are removed as leftovers; the claim is given back."""
        count: int = self.successResultOf(redirect.clean_up(self.iptables))
        self.assertEqual(self.claims[-1].fileno(), -1)
        return count

    def test_killed_instances(self) -> None:
        """Redirects of killed instances and of the original program go, and so do dead keepers."""
        self.add("iptables", "nat", OF_THE_ORIGINAL.split(), REDIRECT.split(), ["-j", "DOCKER"])
        self.add("iptables", "nat", REDIRECT.split())
        self.add("iptables", "mangle", DEAD_KEEPER)
        self.assertEqual(self.remove(IptablesRedirect(PORT)), 4)
        self.assertEqual(self.iptables.rules("nat"), {"iptables": ["-j DOCKER"]})
        self.assertEqual(self.iptables.rules("mangle"), {})
        self.assertEqual(
            self.lines(LogLevel.warn),
            ["Removed 4 iptables rules that a killed instance had left"],
        )

    def test_nothing_left(self) -> None:
        """Where nothing is left nothing is said."""
        self.assertEqual(self.remove(IptablesRedirect(PORT)), 0)
        self.assertEqual(self.lines(LogLevel.warn), [])

    def test_keeper_of_the_living(self) -> None:
        """The keeper of an instance that still drains stays."""
        for binary in BOTH:
            keeper = [*DEAD_KEEPER[:-1], keeper_comment(os.getpid())]
            self.add(binary, "mangle", keeper)
        self.assertEqual(self.remove(IptablesRedirect(PORT)), 0)
        self.assertEqual(set(self.iptables.rules("mangle")), set(BOTH))

    def test_rulespec(self) -> None:
        """Of a rulespec without our comment every copy goes."""
        self.add("iptables", "nat", DNAT.split(), ["-j", "DOCKER"], DNAT.split())
        self.assertEqual(self.remove(IptablesRedirect(PORT, DNAT.split())), 2)
        self.assertEqual(self.iptables.rules("nat"), {"iptables": ["-j DOCKER"]})

    def test_rulespec_locked(self) -> None:
        """A copy that cannot be removed for the lock is not taken for one that is not there."""
        self.add("ip6tables", "nat", DNAT.split())
        self.fail_calls(3)  # behind the two listings
        self.refused(self.apply(IptablesRedirect(PORT, DNAT.split())), LOCKED)

    def test_one_family_fails(self) -> None:
        """Where one family cannot be looked at, the other is cleaned all the same."""
        for number, cleaned in ((1, "ip6tables"), (4, "iptables")):
            self.iptables = FakeIptables()
            for binary in BOTH:
                self.add(binary, "nat", REDIRECT.split())
            self.fail_calls(number)
            self.assertEqual(self.remove(IptablesRedirect(PORT)), 1)
            self.assertNotIn(cleaned, self.iptables.rules("nat"))

    def test_quotes(self) -> None:
        """Comments with blanks and quotes, ours and others', are read as they were written."""
        others = ["-m", "comment", "--comment", 'it\'s "acme-alpn-proxy" keeper 1 \\ 2']
        self.add("iptables", "nat", others)
        self.add("iptables", "mangle", others, DEAD_KEEPER)
        self.assertEqual(self.remove(IptablesRedirect(PORT)), 1)
        for table in ("nat", "mangle"):
            self.assertEqual(self.iptables.rules(table), {"iptables": [" ".join(others)]})

    def test_strange_listing(self) -> None:
        """A comment over several lines, or one cut short by a quote, is no obstacle, and what
        iptables warns of between the rules is none either."""
        ours = " ".join(OF_THE_ORIGINAL.split())
        listing = (
            "# Warning: that's what iptables says of legacy tables\n"
            "-P PREROUTING ACCEPT\n"
            '-A PREROUTING -m comment --comment "two\nlines" -j RETURN\n'
            '-A PREROUTING -m comment --comment "a\n-A b" -j RETURN\n'
            f"-A PREROUTING {ours}\n"
            "# Warning: as above\n"
        )
        self.add("iptables", "nat", ours.split())
        self.fail_calls(1, code=0, output=listing)
        self.assertEqual(self.remove(IptablesRedirect(PORT)), 1)
        self.assertEqual(self.iptables.rules("nat"), {})


class RecognitionTests(SynchronousTestCase):
    def test_leftovers(self) -> None:
        """A leftover has our comment and our port, however its target writes the port."""
        comment = "-m comment --comment acme-alpn-proxy"
        for target in (
            "REDIRECT --to-ports 21443",
            "REDIRECT --to-port 21443",
            "DNAT --to-destination :21443",
            "DNAT --to-destination [2001:db8::1]:21443",
        ):
            self.assertTrue(is_leftover(f"{comment} -j {target}".split(), PORT), target)
        for other in (
            f"{comment} -j REDIRECT --to-ports 8443",
            f"{comment} -j REDIRECT",
            f"{comment} -j DNAT --to-destination 192.0.2.1",
            "-m comment --comment acme -j REDIRECT --to-ports 21443",
            "-j REDIRECT --to-ports 21443",
            "PREROUTING ACCEPT",
            "-j REDIRECT --to-ports 21443 --comment",
        ):
            self.assertFalse(is_leftover(other.split(), PORT), other)
        self.assertTrue(is_leftover(default_rulespec(PORT), PORT))

    def test_dead_keepers(self) -> None:
        """A keeper is dead when its process is: the same PID with another start is another."""
        self.assertFalse(is_dead_keeper(["--comment", keeper_comment(os.getpid())]))
        self.assertTrue(is_dead_keeper(DEAD_KEEPER))
        for other in ("acme-alpn-proxy", "acme-alpn-proxy keeper x 1", "other keeper 1 1"):
            self.assertFalse(is_dead_keeper(["--comment", other]), other)


class ConnectionTrackingTests(IptablesCase):
    def warnings(self, **facts: Any) -> list[str]:
        self.host(**facts)
        self.iptables = FakeIptables()
        self.applied()
        return self.lines(LogLevel.warn)

    def test_table_may_fill(self) -> None:
        """If tracking was idle and the host's connections would fill over half of the table, the
        operator is told which knob to turn."""
        warned = self.warnings(
            tracked_connections=0, max_tracked_connections=1_000, tcp_connections=501
        )
        self.assertEqual(len(warned), 1)
        self.assertIn("its 501 TCP connections", warned[0])
        self.assertIn("net.netfilter.nf_conntrack_max", warned[0])

    def test_no_warning(self) -> None:
        """Nothing is said if the table is large, if it was in use before, or is unknown."""
        busy = {"tracked_connections": 0, "max_tracked_connections": 1_000, "tcp_connections": 501}
        for fact in ({"tcp_connections": 500}, {"tracked_connections": 1}):
            self.assertEqual(self.warnings(**(busy | fact)), [], fact)
        self.assertEqual(self.warnings(**(busy | {"max_tracked_connections": None})), [])


class NoRedirectTests(SynchronousTestCase):
    def test_does_nothing(self) -> None:
        """Without a redirect it listens on every address, and every step is done at once."""
        redirect = NoRedirect()
        self.assertEqual(str(redirect), "none")
        verifyObject(IRedirect, redirect)
        iptables = FakeIptables()
        self.assertEqual(self.successResultOf(redirect.prepare(iptables)), ("::",))
        self.successResultOf(redirect.look_after(iptables))
        self.successResultOf(redirect.apply(iptables, []))
        self.successResultOf(redirect.remove(iptables))
        self.successResultOf(redirect.release(iptables))
        self.assertEqual(iptables.calls, [])
