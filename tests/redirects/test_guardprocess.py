"""How the guard handles the rules, in memory and with the test's own clocks."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.host.conntrack import Entry
from acme_alpn_proxy.redirects import guardprocess
from acme_alpn_proxy.redirects.guardprocess import (
    LIFETIME,
    RENEWAL,
    SILENCE,
    CommandFailed,
    Guard,
    Order,
    obey_proxy,
)

from ..fake_iptables import LOCKED, FakeIptables
from .iptables_case import PORT

RULE = "-p tcp --dport 443 -m comment --comment acme-alpn-proxy -j REDIRECT --to-ports 21443"
KEEPER = "-m conntrack --ctstate INVALID -m comment --comment"
OURS = "acme-alpn-proxy keeper 7 1 1"
BOTH = ("ip6tables", "iptables")


class GuardCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.iptables = FakeIptables()
        self.patch(guardprocess, "run", lambda *words: self.iptables.guarded(*words))
        self.entries: list[Entry] = []
        self.forgotten: list[list[Entry]] = []
        self.patch(guardprocess, "translated", lambda port: self.entries)
        self.patch(guardprocess, "forget", self.forgotten.append)
        self.wall, self.monotonic, self.waiting = 0.0, 1_000.0, False
        self.claims_given_back = 0
        self.guard = self.new_guard()

    def new_guard(self, **order: Any) -> Guard:
        usual: Order = {
            "commands": [[binary, "-w", "5"] for binary in BOTH],
            "keeper": [*KEEPER.split(), OURS],
            "rule": RULE.split(),
            "expires": True,
            "port": PORT,
        }
        usual |= order  # type: ignore[typeddict-item]
        return Guard(
            usual,
            wall=lambda: self.wall,
            monotonic=lambda: self.monotonic,
            waiting=lambda port: self.waiting,
            give_back_claim=self.give_back_claim,
        )

    def give_back_claim(self) -> None:
        self.claims_given_back += 1

    def advance(self, seconds: float, wall: float | None = None) -> None:
        """Advance the monotonic clock by C{seconds}, and the wall clock by C{wall} or as far; then
        let the guard check."""
        self.monotonic += seconds
        self.wall += seconds if wall is None else wall
        self.guard.tick()

    def ask(self, wish: str) -> Any:
        answer = self.guard.obey(f"5 {wish}")
        self.assertEqual(answer["number"], 5)
        self.guard.tick()
        return answer

    def steers(self, until: str, *before: str) -> None:
        """There is one redirect in each family, valid until then, before the others."""
        expected = [f"{RULE} -m time --datestop 1970-01-01T{until}", *before]
        self.assertEqual(self.iptables.rules("nat"), dict.fromkeys(BOTH, expected))

    def add(self, table: str, *rule: str, binary: str = "iptables") -> None:
        self.iptables.chains[binary, table, "PREROUTING"].insert(0, list(rule))

    def break_call(self, number: int = 1, code: int = 4) -> None:
        self.iptables.failures[len(self.iptables.calls) + number] = code, LOCKED


class ExpiryTests(GuardCase):
    """The redirect is valid for a while, and renewed as long as the guard is there."""

    def test_renewal(self) -> None:
        """It is renewed in time, and at no moment is there no redirect."""
        self.ask("apply")
        self.steers("00:01:30")
        self.assertLess(RENEWAL, LIFETIME / 2)
        self.iptables.calls.clear()
        self.advance(RENEWAL - 1)
        self.assertEqual(self.iptables.calls, [])
        self.advance(2)
        self.steers("00:02:01")
        changes = [call[5] for call in self.iptables.calls if call[0] == "iptables"]
        self.assertEqual([each for each in changes if each in ("-I", "-D")], ["-I", "-D"])

    def test_renewal_fails(self) -> None:
        """A renewal that fails is tried again soon, and leaves nothing behind."""
        for number, code in itertools.product(range(1, 9), (1, 4)):
            self.iptables = FakeIptables()
            self.guard = self.new_guard()
            self.ask("apply")
            self.break_call(number, code)
            self.advance(RENEWAL + 1)
            self.advance(1)
            self.assertEqual({len(rules) for rules in self.iptables.rules("nat").values()}, {1})
            self.ask("remove")
            self.assertEqual(self.iptables.rules("nat"), {})

    def test_renewal_after_half_a_removal(self) -> None:
        """If one family's redirect could not be removed, the other family's does not come back at a
        renewal, and in the end both are gone."""
        self.ask("apply")
        self.break_call(3)
        self.assertIsNotNone(self.ask("release")["failed"])
        self.advance(RENEWAL + 1)
        self.assertEqual(list(self.iptables.rules("nat")), ["iptables"])
        self.ask("release")
        self.assertEqual(self.iptables.snapshot(), {})

    def test_clock_is_set(self) -> None:
        """If the wall clock is set, forwards or backwards, the redirect is renewed at once."""
        self.wall = 7_200.0
        self.guard = self.new_guard()
        self.ask("apply")
        self.steers("02:01:30")
        self.advance(1, wall=-3_600)
        self.steers("01:01:30")
        self.advance(1, wall=7_200)
        self.steers("03:01:30")
        self.advance(1, wall=2)
        self.steers("03:01:30")

    def test_own_rule(self) -> None:
        """The operator's own rule stays as it was written."""
        self.guard = self.new_guard(expires=False)
        self.assertFalse(self.ask("apply")["expires"])
        self.advance(1_000, wall=-1_000)
        self.assertEqual(self.iptables.rules("nat"), {binary: [RULE] for binary in BOTH})

    def test_no_such_match(self) -> None:
        """If iptables lacks the match C{time}, all redirects are made without it; any other failure
        counts as one."""
        for number in (3, 4):
            self.iptables = FakeIptables()
            self.guard = self.new_guard()
            self.break_call(number, code=2)
            answer = self.ask("apply")
            self.assertEqual((answer["failed"], answer["expires"]), (None, False))
            self.assertEqual(self.iptables.rules("nat"), {binary: [RULE] for binary in BOTH})
            self.ask("release")
            self.assertEqual(self.iptables.snapshot(), {})
        self.guard = self.new_guard()
        self.break_call(3, code=4)
        self.assertEqual(self.ask("apply")["failed"][1:], (4, LOCKED))
        self.assertEqual(self.iptables.snapshot(), {})


class LookTests(GuardCase):
    """Changes that other programs make to the rules."""

    def setUp(self) -> None:
        super().setUp()
        self.add("nat", "-j", "DOCKER")
        self.add("nat", "-j", "DOCKER", binary="ip6tables")
        self.ask("apply")

    def test_all_is_well(self) -> None:
        """A look finds nothing, and changes nothing."""
        before = self.iptables.snapshot()
        answer = self.ask("look")
        self.assertEqual((answer["missing"], answer["behind"]), ([], []))
        self.assertEqual(self.iptables.snapshot(), before)

    def test_missing(self) -> None:
        """Missing rules are reported by program, and put back only on request."""
        self.iptables.chains.clear()
        answer = self.ask("look")
        self.assertEqual(answer["missing"], [*BOTH, *BOTH])
        self.assertEqual(self.iptables.snapshot(), {})
        self.ask("restore")
        self.steers("00:01:30")
        self.assertEqual(set(self.iptables.rules("mangle")), set(BOTH))

    def test_behind(self) -> None:
        """A rule before the redirect is reported, and the redirect is put first again."""
        self.add("nat", "-j", "OTHER")
        answer = self.ask("look")
        self.assertEqual((answer["missing"], answer["behind"]), ([], ["iptables"]))
        self.ask("restore")
        rules = self.iptables.rules("nat")["iptables"]
        self.assertEqual(
            [rule.split()[-1] for rule in rules], ["1970-01-01T00:01:30", "OTHER", "DOCKER"]
        )
        self.assertEqual(self.ask("look")["behind"], [])

    def test_failure(self) -> None:
        """If the rules cannot be read, that is reported as a failure, not as a missing rule."""
        self.iptables.chains.clear()
        self.break_call(2)
        answer = self.ask("look")
        self.assertEqual(answer["failed"][1:], (4, LOCKED))

    def test_stays_after_a_removal(self) -> None:
        """A rule that cannot be deleted is reported, even if the command says that there is
        none."""
        self.iptables._do = (  # type: ignore[method-assign]
            lambda argv: (1, "") if "-D" in argv else (0, "")
        )
        self.assertEqual(self.ask("remove")["failed"][2], "the rule is still there")
        self.assertEqual(self.claims_given_back, 0)


class EndTests(GuardCase):
    def test_order(self) -> None:
        """The redirects go before the keepers, and with them the claim."""
        self.ask("apply")
        self.assertFalse(self.guard.ended)
        self.iptables.calls.clear()
        self.guard.clean_up()
        self.assertTrue(self.guard.ended)
        self.assertEqual(self.iptables.snapshot(), {})
        self.assertEqual(self.claims_given_back, 1)
        tables = [call[4] for call in self.iptables.calls if "-D" in call]
        self.assertEqual(tables, ["nat", "nat", "mangle", "mangle"])

    def test_failure(self) -> None:
        """Every failure is reported; the next try continues at the same point."""
        self.ask("apply")
        for number in range(1, 9):
            self.break_call(number)
            with self.assertRaises(CommandFailed):
                self.guard.clean_up()
            self.iptables.failures.clear()
            self.iptables.calls.clear()
            self.guard.ended = False
            self.guard.clean_up()
            self.assertEqual(self.iptables.snapshot(), {})
            self.guard = self.new_guard()
            self.ask("apply")

    def test_nothing_was_made(self) -> None:
        """If no rule could be made, the guard searches for none, since that would always fail."""
        self.break_call(1)
        self.ask("apply")
        calls = len(self.iptables.calls)
        self.guard.clean_up()
        self.assertEqual(len(self.iptables.calls), calls)

    def test_killed_too_late(self) -> None:
        """A command that was killed at its deadline may have made its rule: that is removed."""
        made = self.iptables._do

        def make_and_hang(argv: Any) -> tuple[int, str]:
            answer = made(argv)
            return (137, "not finished") if "-I" in argv else answer

        self.iptables._do = make_and_hang  # type: ignore[method-assign]
        self.assertEqual(self.ask("apply")["failed"][1], 137)
        self.assertEqual(self.iptables.snapshot(), {})

    def test_unknown_wish(self) -> None:
        """An unknown word, and a line without a number, do no harm."""
        self.ask("apply")
        before = self.iptables.snapshot()
        self.assertIsNone(self.ask("sing")["failed"])
        self.assertEqual(self.guard.obey("look")["number"], 0)
        self.assertEqual(self.iptables.snapshot(), before)


class HostileProxyTests(GuardCase):
    """A proxy that was taken over may send anything; its rules are removed in any case."""

    def send(self, wishes: bytes) -> list[Any]:
        """The answers to these, until the proxy closes the line."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                ours.sendall(wishes)
                ours.shutdown(socket.SHUT_WR)
                obey_proxy(self.guard, theirs.fileno())
            return [json.loads(line) for line in ours.makefile("rb")]

    def test_wishes_after_the_last(self) -> None:
        """Wishes that come with the wish to release are ignored: nobody would remove their
        rules."""
        answers = self.send(b"1 apply\n2 release\n3 apply\n")
        self.assertEqual([answer["number"] for answer in answers], [1, 2])
        self.assertTrue(self.guard.ended)
        self.assertEqual(self.iptables.snapshot(), {})

    def test_applied_twice(self) -> None:
        """To apply again puts back what is missing, and makes no second rule."""
        self.send(b"1 apply\n")
        self.iptables.chains["iptables", "nat", "PREROUTING"].clear()
        self.send(b"2 apply\n3 apply\n")
        self.steers("00:01:30")
        self.advance(RENEWAL + 1)
        self.steers("00:02:01")
        self.guard.clean_up()
        self.assertEqual(self.iptables.snapshot(), {})

    def test_long_number(self) -> None:
        """A request whose number has thousands of digits is invalid; the guard continues."""
        answers = self.send(b"1" * 5_000 + b" look\n2 look\n")
        self.assertEqual([answer["number"] for answer in answers], [0, 2])

    def test_answers_that_nobody_reads(self) -> None:
        """A proxy that does not read its answers does not stop the guard."""
        thread = threading.Thread(target=self.send, args=(b"1 nothing\n" * 8_000,), daemon=True)
        thread.start()
        thread.join(30)
        self.assertFalse(thread.is_alive())


class HungProxyTests(GuardCase):
    def test_visitors_wait(self) -> None:
        """If the proxy has sent nothing while visitors wait, the redirect is removed; when the
        proxy comes back, it may be restored."""
        self.ask("apply")
        self.waiting = True
        self.advance(SILENCE)
        self.steers("00:01:30")
        self.advance(1)
        self.assertEqual(self.iptables.rules("nat"), {})
        self.assertEqual(self.ask("look")["missing"], list(BOTH))
        self.ask("restore")
        self.assertEqual(len(self.iptables.rules("nat")), 2)

    def test_nobody_waits(self) -> None:
        """While no visitor waits it stays."""
        self.ask("apply")
        self.advance(SILENCE + 1)
        self.steers("00:01:30")


class TakeOverTests(GuardCase):
    def test_rules_of_a_killed_guard(self) -> None:
        """A new guard goes on with the rules of a killed one: its own redirect replaces that."""
        self.ask("apply")
        keepers = self.iptables.rules("mangle")
        self.wall = 10.0
        self.guard = self.new_guard()
        self.ask("take over")
        self.steers("00:01:40")
        self.assertEqual(self.iptables.rules("mangle"), keepers)
        self.ask("release")
        self.assertEqual(self.iptables.snapshot(), {})


class ConnectionTrackingTests(GuardCase):
    """Entries of steered connections are forgotten before tracking may go off or come on."""

    def test_forgotten(self) -> None:
        """Entries are forgotten before the first rule is made and before the last one goes."""
        self.entries = [Entry(2, b"entry")]
        seen: list[int] = []
        self.patch(
            guardprocess, "forget", lambda entries: seen.append(len(self.iptables.rules("mangle")))
        )
        self.ask("apply")
        self.ask("remove")
        self.assertEqual(seen, [0])
        self.ask("release")
        self.assertEqual(seen, [0, 2])

    def test_another_instance(self) -> None:
        """Entries stay while another instance has a keeper: those of its connections look the
        same."""
        self.entries = [Entry(2, b"entry")]
        self.add("mangle", *KEEPER.split(), "acme-alpn-proxy keeper 8 1 1", binary="ip6tables")
        self.ask("apply")
        self.ask("release")
        self.assertEqual(self.forgotten, [])

    def test_earlier_order(self) -> None:
        """Entries stay while an earlier order of this process has a keeper, even if the numbers of
        the two keepers begin with the same digits."""
        self.entries = [Entry(2, b"entry")]
        self.add("mangle", *KEEPER.split(), f"{OURS}0", binary="ip6tables")
        self.ask("apply")
        self.ask("release")
        self.assertEqual(self.forgotten, [])
        self.assertEqual(len(self.iptables.rules("mangle")["ip6tables"]), 1)
