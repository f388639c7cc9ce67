"""Redirect with iptables(8) and ip6tables(8).

There are two rules for each family. The I{redirect} in the nat table steers new connections. The
I{keeper} in the mangle table has no target; it only keeps connection tracking in use. When the last
rule that uses tracking is removed, the kernel stops translating, and all steered connections break.
So the keeper is inserted before the redirect, and removed when the last steered connection has
ended.

However the process ends, its guard (L{acme_alpn_proxy.redirects.guard}) removes the rules.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import socket
from collections.abc import Generator, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.logger import Logger
from zope.interface import implementer

from ..addresses import HTTPS
from ..errors import StartError, VisitorsLost
from ..firewall import judgement
from ..firewall.xtables import LOCK_WAIT, failed, pinned
from ..host import facts, routes
from ..host.tcpsockets import port_taken, served_from_elsewhere, taken_by_another_user
from ..interfaces import ICommands, IRedirect, Result
from ..wording import counted
from .claim import claim_redirect
from .guard import Guard, GuardGone
from .guardprocess import LIFETIME, Answer, Order
from .leftovers import Leftovers, keeper_comment
from .rules import COMMENT, KEEPER_MATCH

GUARD_PATIENCE: Final = 15.0
"""Seconds to wait until the guard of a killed instance has finished."""

_USUAL_LIMIT: Final = 65_536
"""The size of the connection tracking table to assume if it is not loaded: on a host with more than
1 GB of memory, no kernel has a lower default."""


def default_rulespec(port: int) -> list[str]:
    """The default rule, for when C{ACME_ALPN_PROXY_RULESPEC} is not set.

    C{--syn}: the rule does not catch connections that exist already. C{LOCAL}: it does not touch
    traffic that this host only forwards.
    """
    match = ["-p", "tcp", "--syn", "--dport", "443", "-m", "addrtype", "--dst-type", "LOCAL"]
    return [*match, "-j", "REDIRECT", "--to-port", str(port), "-m", "comment", "--comment", COMMENT]


def _as_dnat(rulespec: Sequence[str]) -> list[str]:
    """The rule with DNAT instead of REDIRECT: it changes only the port."""
    words = ["DNAT" if word == "REDIRECT" else word for word in rulespec]
    for flag in ("--to-port", "--to-ports"):
        if flag in words[:-1]:
            at = words.index(flag)
            words[at : at + 2] = ["--to-destination", f":{words[at + 1]}"]
    return words


NO_EXPIRY: Final = (
    "has no match 'time', so the rules cannot expire: if the proxy and its guard are both killed,"
    " visitors are lost until you run 'acme-alpn-proxy stop'"
)
"""What is wrong if iptables does not have that match."""

_numbers = itertools.count(1)


@implementer(IRedirect)
class IptablesRedirect:
    """Steers with one rule for each family in nat PREROUTING."""

    _log = Logger()

    def __init__(
        self,
        port: int,
        rulespec: Sequence[str] | None = None,
        *,
        ipv6: bool = True,
        force: bool = False,
        cautious: bool = False,
    ) -> None:
        """
        @param port: the port of the listener.
        @param rulespec: the words that follow C{-t nat -I PREROUTING}.
        @param ipv6: whether to steer IPv6 too, if the host has it.
        @param force: whether to steer even if the firewall seems to drop steered visitors.
        @param cautious: whether to refuse also where another redirect would be the better choice.
        """
        self._port = port
        self._custom = rulespec
        self._rulespec = list(rulespec) if rulespec is not None else default_rulespec(port)
        self._ipv6 = ipv6
        self._force = force
        self._cautious = cautious
        self._number = next(_numbers)
        self._families: list[int] = []
        self._guard: Guard | None = None

    def __str__(self) -> str:
        return "iptables"

    @inlineCallbacks
    def prepare(self, commands: ICommands) -> Generator[Deferred[Any], Any, Sequence[str]]:
        """Listen on all addresses: REDIRECT leads to the address of the interface that a visitor
        comes in through."""
        if not self._ipv6:
            self._families = [4]
        elif not facts.has_ipv6():
            self._log.info("This host has no IPv6: the proxy steers IPv4 only")
            self._families = [4]
        else:  # IPv6 first: if it fails, no visitor is steered yet
            self._families = [6, 4]
        self._refuse_unnumbered()
        self._refuse_container()
        if self._cautious:
            if taken_by_another_user(self._port):
                raise port_taken(self._port)
            self._refuse_missing_binary()
            self._refuse_small_table()
        if not self._force:
            yield self._refuse_firewall(commands)
        return ("::",)

    @inlineCallbacks
    def apply(
        self, commands: ICommands, listeners: Sequence[socket.socket]
    ) -> Generator[Deferred[Any], Any, None]:
        if all(listener.family != socket.AF_INET6 for listener in listeners):
            self._families = [4]  # without a listener, rules would lead to a closed port
        idle = facts.tracked_connections() == 0
        # The guard starts in parallel to the search for leftovers.
        self._guard = self._new_guard((yield claim_redirect(commands, GUARD_PATIENCE)))
        try:
            yield Leftovers(self._port, self._custom, self._families).remove(commands)
            answer: Answer = yield self._ask(commands, "apply")
        except StartError:
            guard, self._guard = self._guard, None
            yield guard.end(commands)
            raise
        if self._custom is None and not answer["expires"]:
            self._log.warn(
                f"iptables {NO_EXPIRY}; before the next start, load the kernel's module: modprobe"
                " xt_time"
            )
        if idle:
            self._warn_of_small_table()

    @inlineCallbacks
    def look_after(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        answer: Answer = yield self._ask(commands, "look")
        if not answer["missing"] and not answer["behind"]:
            return
        if answer["missing"]:
            yield self._judge_again(commands)
        yield self._ask(commands, "restore")
        for what, programs in (
            (
                "Another program removed rules of the proxy ({programs}); the proxy has inserted"
                " them again",
                answer["missing"],
            ),
            (
                "Another program inserted a rule before that of the proxy ({programs}); the proxy's"
                " rule is the first one again",
                answer["behind"],
            ),
        ):
            if programs:
                self._log.warn(what, programs=", ".join(sorted(set(programs))))

    @inlineCallbacks
    def remove(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        if self._guard is None:
            return
        if self._guard.gone and not facts.may_administer_network():
            yield commands.pause(LIFETIME)  # after that time, its rules have expired
        else:
            yield self._ask(commands, "remove")

    @inlineCallbacks
    def release(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        guard, self._guard = self._guard, None
        if guard is not None and not guard.gone:
            yield guard.ask(commands, "release")
            yield guard.end(commands)

    @inlineCallbacks
    def _ask(self, commands: ICommands, wish: str) -> Generator[Deferred[Any], Any, Answer]:
        """Ask the guard; if it was killed, start a new one and ask that."""
        try:
            answer: Answer = yield self._ask_once(commands, wish)
        except GuardGone:
            # The new one has already put the rules in place when it takes over.
            answer = yield self._ask_once(commands, "restore" if wish == "apply" else wish)
        if answer["failed"] is not None:
            argv, code, output = answer["failed"]
            raise failed(Result(tuple(argv), code, output), custom_rule=self._custom is not None)
        return answer

    @inlineCallbacks
    def _ask_once(self, commands: ICommands, wish: str) -> Generator[Deferred[Any], Any, Answer]:
        assert self._guard is not None
        if self._guard.gone:
            self._log.warn(
                "The guard, which removes the iptables rules, was killed; the proxy starts a new"
                " one"
            )
            self._guard = self._new_guard((yield claim_redirect(commands, GUARD_PATIENCE)))
            yield self._guard.ask(commands, "take over")
        answer: Answer = yield self._guard.ask(commands, wish)
        return answer

    @inlineCallbacks
    def _judge_again(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        """A firewall that was reloaded may have other rules now. Without privileges it cannot be
        read; then only the watch for lost visitors helps."""
        if not self._force and facts.may_administer_network():
            try:
                yield self._refuse_firewall(commands)
            except StartError as problem:
                raise VisitorsLost.because_of(problem) from None

    def _new_guard(self, claim: socket.socket) -> Guard:
        keeper = keeper_comment(os.getpid(), self._number)
        order: Order = {
            "commands": [[pinned(family), "-w", LOCK_WAIT] for family in self._families],
            "keeper": [*KEEPER_MATCH, "-m", "comment", "--comment", keeper],
            "rule": self._rulespec,
            "expires": self._custom is None,
            "port": self._port,
        }
        return Guard(claim, order)

    def _refuse_unnumbered(self) -> None:
        if "REDIRECT" not in self._rulespec:
            return
        for family in self._families:
            names = facts.unnumbered_interfaces(family)
            if names and not routes.only_go_out(family, facts.visitor_interfaces(family)):
                raise StartError(
                    f"visitors arrive through {', '.join(names)}, where REDIRECT finds no"
                    f" IPv{family} address and would drop them all; set ACME_ALPN_PROXY_RULESPEC="
                    f"'{shlex.join(_as_dnat(self._rulespec))}' (DNAT changes only the port)",
                    os.EX_CONFIG,
                )

    def _refuse_container(self) -> None:
        """All processes of a container may be killed at once, including the guard."""
        if not facts.in_first_pid_namespace() and served_from_elsewhere(HTTPS):
            raise StartError(
                "the web server runs outside this container: if the container is killed, no process"
                " is left to remove the rules, and visitors are lost; run the proxy on the host or"
                " in the container where the web server runs",
                os.EX_CONFIG,
            )

    @inlineCallbacks
    def _refuse_firewall(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        keeping = judgement.iptables(self._port, keeps_address=True)
        way, variant = keeping, None
        if "REDIRECT" in self._rulespec:
            rule = shlex.join(_as_dnat(self._rulespec))
            advice = f"set ACME_ALPN_PROXY_RULESPEC='{rule}' (DNAT changes only the port)"
            way, variant = judgement.iptables(self._port), (keeping, advice)
        host: judgement.Host = yield judgement.require(way, commands, self._families, variant)
        if self._cautious:
            yield self._refuse_to_spare(commands, host, way)

    @inlineCallbacks
    def _refuse_to_spare(
        self, commands: ICommands, host: judgement.Host, way: judgement.Way
    ) -> Generator[Deferred[Any], Any, None]:
        """Refuse if a visitor who is banned from port 443 could get in through the redirect."""
        rule = yield host.why_spared(way, commands)
        if rule is not None:
            raise StartError(
                "a firewall rule blocks some visitors on port 443, but would let them in on port"
                f" {self._port}: {rule}; block them on port {self._port}, too",
                os.EX_CONFIG,
            )

    def _refuse_missing_binary(self) -> None:
        for family in self._families:
            name = pinned(family)
            if shutil.which(name) is None:
                raise failed(Result.not_found([name]))

    def _refuse_small_table(self) -> None:
        limit = facts.max_tracked_connections() or _USUAL_LIMIT
        count = facts.tcp_connections()
        if facts.tracked_connections() == 0 and count > limit / 2:
            raise StartError(
                "iptables would switch on connection tracking for the whole host, whose"
                f" {counted(count, 'TCP connection')} would fill more than half of the table"
                f" ({limit:,} entries); raise net.netfilter.nf_conntrack_max",
                os.EX_CONFIG,
            )

    def _warn_of_small_table(self) -> None:
        limit = facts.max_tracked_connections()
        count = facts.tcp_connections()
        if limit is not None and count > limit / 2:
            self._log.warn(
                "The redirect has switched on connection tracking for the whole host, whose"
                " {connections} fill more than half of the table ({limit:,} entries). If it is"
                " full, the kernel drops packets; raise net.netfilter.nf_conntrack_max",
                connections=counted(count, "TCP connection"),
                count=count,
                limit=limit,
            )
