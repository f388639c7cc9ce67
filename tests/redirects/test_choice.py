"""The choice of the redirect."""

from __future__ import annotations

import os
from collections.abc import Sequence
from socket import socket
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import formatEvent
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host.processes import BlockingCommands
from acme_alpn_proxy.interfaces import ICommands, IRedirect
from acme_alpn_proxy.redirects.choice import ChosenRedirect

from ..memory import log_of

COMMANDS = BlockingCommands()


@implementer(IRedirect)
class Candidate:
    """A redirect that refuses if it is set to, and records its calls."""

    def __init__(self, name: str, refusal: str | None = None, status: int = 1) -> None:
        self._name = name
        self._refusal = refusal
        self._status = status
        self.asked: list[str] = []

    def __str__(self) -> str:
        return self._name

    def prepare(self, commands: ICommands) -> Deferred[Sequence[str]]:
        if self._refusal is not None:
            return fail(StartError(self._refusal, self._status))
        return succeed((f"host of {self._name}",))

    def _note(self, what: str) -> Deferred[None]:
        self.asked.append(what)
        return succeed(None)

    def apply(self, commands: ICommands, listeners: Sequence[socket]) -> Deferred[None]:
        return self._note("apply")

    def look_after(self, commands: ICommands) -> Deferred[None]:
        return self._note("look after")

    def remove(self, commands: ICommands) -> Deferred[None]:
        return self._note("remove")

    def release(self, commands: ICommands) -> Deferred[None]:
        return self._note("release")


class ChosenRedirectTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.events = log_of(self)

    def takes(self, redirect: ChosenRedirect, taken: Candidate, why: str) -> None:
        """Assert that C{redirect} takes C{taken}, gives the operator the reason in one line, and
        passes all calls on."""
        verifyObject(IRedirect, redirect)
        hosts = self.successResultOf(redirect.prepare(COMMANDS))
        self.assertEqual(hosts, (f"host of {taken}",))
        self.assertEqual(str(redirect), str(taken))
        self.assertEqual([formatEvent(event) for event in self.events], [why])
        self.assertTrue(self.events[0]["for_operator"])
        for step in (
            redirect.apply(COMMANDS, []),
            redirect.look_after(COMMANDS),
            redirect.remove(COMMANDS),
            redirect.release(COMMANDS),
        ):
            self.successResultOf(step)
        self.assertEqual(taken.asked, ["apply", "look after", "remove", "release"])

    def refusal(self, *ways: Candidate, others: Sequence[Candidate] = ()) -> StartError:
        """What the operator reads if all refuse."""
        redirect = ChosenRedirect(ways, others=others)
        problem = self.failureResultOf(redirect.prepare(COMMANDS), StartError).value
        assert isinstance(problem, StartError)
        self.assertEqual(self.events, [])
        return problem

    def test_name(self) -> None:
        """Before the choice, its text is the option's value."""
        self.assertEqual(str(ChosenRedirect([Candidate("one"), Candidate("two")])), "one,two")

    def test_first(self) -> None:
        """The first one is taken where it works, and no other one is used."""
        first, second = Candidate("first"), Candidate("second")
        self.takes(ChosenRedirect([first, second]), first, "Steering with first: it works here")
        self.assertEqual(second.asked, [])

    def test_by_default(self) -> None:
        """If the operator chose nothing, the first one is taken with a line in the log only; if
        another one is taken, the operator is informed."""
        ways = Candidate("first"), Candidate("second")
        self.successResultOf(ChosenRedirect(ways, by_default=True).prepare(COMMANDS))
        self.assertFalse(self.events.pop()["for_operator"])
        second = Candidate("second")
        redirect = ChosenRedirect([Candidate("first", "it is dropped"), second], by_default=True)
        expected = "Steering with second: first cannot be used, because it is dropped"
        self.takes(redirect, second, expected)

    def test_reason(self) -> None:
        """The reason for taking the first one can be set."""
        only = Candidate("only")
        redirect = ChosenRedirect([only], "RULESPEC is set")
        self.takes(redirect, only, "Steering with only: RULESPEC is set")

    def test_refused(self) -> None:
        """If the first redirects refuse, the next is taken, and the reason has their causes."""
        first = Candidate("first", "the firewall drops them; use another one")
        second = Candidate("second", "the kernel is too old")
        third = Candidate("third")
        why = (
            "first cannot be used, because the firewall drops them; second cannot be used, because"
            " the kernel is too old"
        )
        self.takes(ChosenRedirect([first, second, third]), third, f"Steering with third: {why}")

    def test_all_refuse(self) -> None:
        """If all refuse, the error is the first one's refusal, with the causes of the others."""
        problem = self.refusal(
            Candidate("first", "it is dropped; let it in", 78),
            Candidate("second", "the kernel is too old; run a newer one", 69),
            Candidate("third", "not permitted; run this as root", 77),
        )
        expected = (
            "none of these ways works here: first: it is dropped; second: the kernel is too old;"
            " third: not permitted; for first: let it in"
        )
        self.assertEqual(str(problem), expected)
        self.assertEqual(problem.status, 78)

    def test_one_alone(self) -> None:
        """A single way is taken without a message, and refuses with its own text."""
        self.successResultOf(ChosenRedirect([Candidate("only")], "").prepare(COMMANDS))
        self.assertEqual(self.events, [])
        self.assertEqual(str(self.refusal(Candidate("only", "too old; wait"))), "too old; wait")

    def test_another_way(self) -> None:
        """The remedy names each of the other ways that works here, and none that does not."""
        works, too = Candidate("works"), Candidate("works-too")
        old = Candidate("old", "too old; run a newer one")
        dropped = Candidate("dropped", "it is dropped; let it in", 78)
        for others, remedy in (
            ([works], "use --redirect works, or let it in"),
            ([old, works, too], "use --redirect works or --redirect works-too, or let it in"),
            ([old], "let it in"),
        ):
            problem = self.refusal(dropped, others=others)
            self.assertEqual(str(problem), f"it is dropped; {remedy}")
            self.assertEqual(problem.status, 78)
        problem = self.refusal(dropped, old, others=[works])
        self.assertEqual(
            str(problem),
            "none of these ways works here: dropped: it is dropped; old: too old; use --redirect"
            " works, or for dropped: let it in",
        )
        self.assertEqual(works.asked + too.asked, [])

    def test_another_instance(self) -> None:
        """No other way is advised if the remedy is to wait, or to stop another instance."""
        busy = Candidate("busy", "another instance steers; stop it first", os.EX_TEMPFAIL)
        problem = self.refusal(busy, others=[Candidate("works")])
        self.assertEqual(str(problem), "another instance steers; stop it first")

    def test_fails_when_applied(self) -> None:
        """If a way fails only when it is applied, the error names the others, too."""

        class Late(Candidate):
            def apply(self, commands: ICommands, listeners: Sequence[socket]) -> Deferred[None]:
                return fail(StartError("no memory; free some", os.EX_OSERR))

        redirect = ChosenRedirect([Late("late")], others=[Candidate("works")])
        self.successResultOf(redirect.prepare(COMMANDS))
        problem: Any = self.failureResultOf(redirect.apply(COMMANDS, []), StartError).value
        self.assertEqual(str(problem), "no memory; use --redirect works, or free some")
        self.assertEqual(problem.status, os.EX_OSERR)
