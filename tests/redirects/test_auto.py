"""The choice of the redirect."""

from __future__ import annotations

from collections.abc import Sequence
from socket import socket

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import formatEvent
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host.processes import BlockingCommands
from acme_alpn_proxy.interfaces import ICommands, IRedirect
from acme_alpn_proxy.redirects.auto import AutoRedirect

from ..memory import log_of

COMMANDS = BlockingCommands()


@implementer(IRedirect)
class Candidate:
    """A redirect that refuses if told to, and notes what it is asked for."""

    def __init__(self, name: str, refusal: str | None = None) -> None:
        self._name = name
        self._refusal = refusal
        self.asked: list[str] = []

    def __str__(self) -> str:
        return self._name

    def prepare(self, commands: ICommands) -> Deferred[Sequence[str]]:
        if self._refusal is not None:
            return fail(StartError(self._refusal))
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


class AutoRedirectTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.events = log_of(self)

    def takes(self, redirect: AutoRedirect, taken: Candidate, why: str) -> None:
        """It takes that one, says why in one line to the operator, and leaves all else to it."""
        verifyObject(IRedirect, redirect)
        self.assertEqual(str(redirect), "auto")
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

    def test_preferred(self) -> None:
        """The preferred one is taken where it works."""
        best, other = Candidate("best"), Candidate("other")
        self.takes(AutoRedirect(best, other), best, "Steering by best: it works here")
        self.assertEqual(other.asked, [])

    def test_refused(self) -> None:
        """Where it refuses the other one is taken, and its own words are the reason."""
        best, other = Candidate("best", "the kernel is too old"), Candidate("other")
        why = "Steering by other: not best, since the kernel is too old"
        self.takes(AutoRedirect(best, other), other, why)

    def test_reason(self) -> None:
        """Where there is a reason the preferred one is not even asked."""
        best, other = Candidate("best"), Candidate("other")
        why = "Steering by other: not best, since RULESPEC is set"
        self.takes(AutoRedirect(best, other, "RULESPEC is set"), other, why)

    def test_both_refuse(self) -> None:
        """Where both refuse it is the other one's refusal that the operator reads."""
        redirect = AutoRedirect(Candidate("best", "no BPF"), Candidate("other", "no iptables"))
        failure = self.failureResultOf(redirect.prepare(COMMANDS), StartError)
        self.assertEqual(str(failure.value), "no iptables")
