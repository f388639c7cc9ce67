"""A host whose iptables is in memory."""

from __future__ import annotations

import os
import socket
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks, succeed
from twisted.logger import LogLevel, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.firewall import nfchains, xtables
from acme_alpn_proxy.firewall.xtables import BINARIES
from acme_alpn_proxy.host import facts, routes
from acme_alpn_proxy.interfaces import ICommands
from acme_alpn_proxy.redirects import guardprocess, iptables, leftovers
from acme_alpn_proxy.redirects.guardprocess import Order
from acme_alpn_proxy.redirects.iptables import IptablesRedirect

from ..fake_iptables import LOCKED, FakeGuard, FakeIptables
from ..memory import log_of

PORT = 21443
BOTH = ("ip6tables", "iptables")
REDIRECT = (
    "-p tcp --tcp-flags FIN,SYN,RST,ACK SYN --dport 443 -m addrtype --dst-type LOCAL"
    f" -j REDIRECT --to-ports {PORT} -m comment --comment acme-alpn-proxy"
)
STEERING = f"{REDIRECT} -m time --datestop 1970-01-01T00:01:30"
"""The redirect as the guard makes it, when the time is 0."""

OF_THE_ORIGINAL = (
    f"-p tcp -m tcp --dport 443 -m comment --comment acme-alpn-proxy -j REDIRECT --to-ports {PORT}"
)
DNAT = f"-p tcp --dport 443 -j DNAT --to-destination :{PORT}"
DEAD_KEEPER = ["-m", "conntrack", "--ctstate", "INVALID", "-m", "comment", "--comment"]
DEAD_KEEPER += [f"acme-alpn-proxy keeper {os.getpid()} 1 {facts.pid_namespace()}"]


class IptablesCase(SynchronousTestCase):
    """A host with both families, connection tracking in use, and every log line noted."""

    def setUp(self) -> None:
        self.iptables = FakeIptables()
        self.events = log_of(self)
        self.host(has_ipv6=True, tracked_connections=7, in_first_pid_namespace=True)
        self.patch(guardprocess, "run", lambda *words: self.iptables.guarded(*words))
        self.patch(guardprocess, "translated", lambda port: [])
        self.patch(iptables, "pinned", BINARIES.__getitem__)
        for module in (facts, xtables):
            self.patch(module, "may_administer_network", lambda: True)
        for name in ("unnumbered_interfaces", "legacy_tables", "visitor_interfaces"):
            self.patch(facts, name, lambda family: [])
        self.patch(routes, "interfaces", lambda family: [])
        self.patch(routes, "routes_by_mark", lambda family: False)
        self.patch(routes, "only_go_out", lambda family, interfaces: False)
        self.patch(nfchains, "base_chains", list)
        self.listeners = [self.listener(socket.AF_INET6)]
        self.guards: list[FakeGuard] = []
        self.claims: list[socket.socket] = []
        self.patch(iptables, "Guard", self.new_guard)
        for module in (iptables, leftovers):
            self.patch(module, "claim_redirect", self.claim)

    def new_guard(self, claim: socket.socket, order: Order) -> FakeGuard:
        self.guards.append(FakeGuard(self.iptables, claim, order))
        return self.guards[-1]

    def claim(self, commands: ICommands, seconds: float) -> Deferred[socket.socket]:
        self.claims.append(self.listener(socket.AF_UNIX))
        return succeed(self.claims[-1])

    def host(self, **answers: object) -> None:
        """Set the host's answers from now on."""
        for name, answer in answers.items():
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
        """Let these calls fail; number 1 is the next call."""
        so_far = len(self.iptables.calls)
        self.iptables.failures.update({so_far + number: (code, output) for number in numbers})

    def lines(self, level: LogLevel) -> list[str]:
        """What was logged at this level since the last call."""
        lines = [formatEvent(event) for event in self.events if event["log_level"] == level]
        self.events.clear()
        return lines
