"""The rules of dead instances: how they are recognized and removed."""

from __future__ import annotations

import os
from collections.abc import Sequence

from twisted.internet.defer import fail
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.interfaces import NOT_FOUND
from acme_alpn_proxy.redirects import leftovers
from acme_alpn_proxy.redirects.iptables import IptablesRedirect, default_rulespec
from acme_alpn_proxy.redirects.leftovers import (
    Leftover,
    Leftovers,
    is_dead_keeper,
    keeper_comment,
)
from acme_alpn_proxy.redirects.rules import is_redirect

from ..fake_iptables import LOCKED, FakeIptables
from .iptables_case import (
    BOTH,
    DEAD_KEEPER,
    DNAT,
    OF_THE_ORIGINAL,
    PORT,
    REDIRECT,
    IptablesCase,
)


class LeftoverTests(IptablesCase):
    def setUp(self) -> None:
        super().setUp()
        self.patch(leftovers, "BlockingCommands", lambda: self.iptables)

    def add(self, binary: str, table: str, *rules: Sequence[str]) -> None:
        self.iptables.chains[binary, table, "PREROUTING"].extend(map(list, rules))

    def clean_up(self, rulespec: Sequence[str] | None = None) -> int:
        """The number of rules removed; the claim is released."""
        count = Leftovers(PORT, rulespec, (4, 6)).clean_up()
        self.assertEqual(self.claims[-1].fileno(), -1)
        return count

    def test_killed_instances(self) -> None:
        """Redirects of killed instances and of the original program go, and so do dead keepers."""
        self.add("iptables", "nat", OF_THE_ORIGINAL.split(), REDIRECT.split(), ["-j", "DOCKER"])
        self.add("iptables", "nat", REDIRECT.split())
        self.add("iptables", "mangle", DEAD_KEEPER)
        self.assertEqual(self.clean_up(), 4)
        self.assertEqual(self.iptables.rules("nat"), {"iptables": ["-j DOCKER"]})
        self.assertEqual(self.iptables.rules("mangle"), {})
        self.assertEqual(
            self.lines(LogLevel.warn),
            ["Removed 4 iptables rules that a killed instance left behind"],
        )

    def test_nothing_left(self) -> None:
        """If nothing is left, nothing is logged."""
        self.assertEqual(self.clean_up(), 0)
        self.assertEqual(self.lines(LogLevel.warn), [])

    def test_keeper_of_the_living(self) -> None:
        """The keeper of an instance that still drains stays."""
        for binary in BOTH:
            keeper = [*DEAD_KEEPER[:-1], keeper_comment(os.getpid(), 1)]
            self.add(binary, "mangle", keeper)
        self.assertEqual(self.clean_up(), 0)
        self.assertEqual(set(self.iptables.rules("mangle")), set(BOTH))

    def test_rulespec(self) -> None:
        """Of a rulespec without our comment every copy goes."""
        self.add("iptables", "nat", DNAT.split(), ["-j", "DOCKER"], DNAT.split())
        self.assertEqual(self.clean_up(DNAT.split()), 2)
        self.assertEqual(self.iptables.rules("nat"), {"iptables": ["-j DOCKER"]})

    def test_rulespec_locked(self) -> None:
        """If a rule cannot be removed because of the lock, the start is refused; the rule does not
        count as missing."""
        self.add("ip6tables", "nat", DNAT.split())
        self.fail_calls(3)  # after the two listings
        self.refused(self.apply(IptablesRedirect(PORT, DNAT.split())), LOCKED)

    def test_one_family_fails(self) -> None:
        """If this host does not have a family, or no iptables for it, the other one is cleaned. Any
        other failure is reported: rules may be left."""
        for code, output in ((3, "no such table"), (NOT_FOUND, "not found")):
            for number, cleaned in ((1, "ip6tables"), (7, "iptables")):
                self.iptables = FakeIptables()
                for binary in BOTH:
                    self.add(binary, "nat", REDIRECT.split())
                self.fail_calls(number, code=code, output=output)
                self.assertEqual(self.clean_up(), 1)
                self.assertNotIn(cleaned, self.iptables.rules("nat"))
        self.fail_calls(1, 2)
        with self.assertRaisesRegex(StartError, LOCKED):
            self.clean_up()
        self.assertEqual(self.claims[-1].fileno(), -1)

    def test_quotes(self) -> None:
        """Comments with blanks and quotes, ours and others', are read as they were written."""
        others = ["-m", "comment", "--comment", 'it\'s "acme-alpn-proxy" keeper 1 \\ 2']
        self.add("iptables", "nat", others)
        self.add("iptables", "mangle", others, DEAD_KEEPER)
        self.assertEqual(self.clean_up(), 1)
        for table in ("nat", "mangle"):
            self.assertEqual(self.iptables.rules(table), {"iptables": [" ".join(others)]})

    def test_strange_listing(self) -> None:
        """A comment over several lines, or one cut short by a quote, does no harm, and neither do
        warnings of iptables between the rules."""
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
        self.fail_calls(2, code=0, output=listing)
        self.assertEqual(self.clean_up(), 1)
        self.assertEqual(self.iptables.rules("nat"), {})

    def test_found(self) -> None:
        """Each leftover has its table, words for its deletion, and whether it steers; finding them
        changes nothing."""
        self.add("iptables", "nat", ["-j", "DOCKER"], REDIRECT.split())
        self.add("iptables", "mangle", DEAD_KEEPER)
        before = self.iptables.snapshot()
        found = self.successResultOf(Leftovers(PORT, None, (4,)).find(self.iptables, 4))
        self.assertEqual(
            found,
            [
                Leftover(4, ("PREROUTING", *REDIRECT.split()), steers=True),
                Leftover(4, ("PREROUTING", *DEAD_KEEPER), steers=False),
            ],
        )
        self.assertEqual([rule.table for rule in found], ["nat", "mangle"])
        self.assertEqual(self.iptables.snapshot(), before)

    def test_instance_is_alive(self) -> None:
        """While an instance is alive, nothing is read, let alone removed."""
        refusal = StartError("another instance redirects :443 here; stop it first")
        self.patch(leftovers, "claim_redirect", lambda commands, seconds: fail(refusal))
        self.add("iptables", "nat", REDIRECT.split())
        with self.assertRaisesRegex(StartError, "another instance redirects :443 here"):
            Leftovers(PORT, None, (4, 6)).clean_up()
        self.assertEqual(self.iptables.calls, [])


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
            self.assertTrue(is_redirect(f"{comment} -j {target}".split(), PORT), target)
        for other in (
            f"{comment} -j REDIRECT --to-ports 8443",
            f"{comment} -j REDIRECT",
            f"{comment} -j DNAT --to-destination 192.0.2.1",
            "-m comment --comment acme -j REDIRECT --to-ports 21443",
            "-j REDIRECT --to-ports 21443",
            "PREROUTING ACCEPT",
            "-j REDIRECT --to-ports 21443 --comment",
        ):
            self.assertFalse(is_redirect(other.split(), PORT), other)
        self.assertTrue(is_redirect(default_rulespec(PORT), PORT))

    def test_dead_keepers(self) -> None:
        """A keeper is dead if its process is; one with the same PID and another start time is
        another process."""
        self.assertFalse(is_dead_keeper(["--comment", keeper_comment(os.getpid(), 1)]))
        self.assertTrue(is_dead_keeper(DEAD_KEEPER))
        elsewhere = f"acme-alpn-proxy keeper {os.getpid()} 1 4026530000"
        self.assertFalse(is_dead_keeper(["--comment", elsewhere]), "another PID namespace's")
        for other in ("acme-alpn-proxy", "acme-alpn-proxy keeper x 1", "other keeper 1 1"):
            self.assertFalse(is_dead_keeper(["--comment", other]), other)
