"""Redirect by iptables(8) and ip6tables(8).

Two rules for each family. The I{redirect} in the nat table steers new connections. The I{keeper}
in the mangle table has no target and does nothing but use connection tracking: when the last rule
that uses it goes, the kernel stops translating and every steered connection is cut. So it is there
before the redirect is, and goes only when the last steered connection has ended.

Whatever end the process comes to, its guard (L{acme_alpn_proxy.redirects.guard}) removes them.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Generator, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.logger import Logger
from zope.interface import implementer

from ..errors import StartError, not_permitted
from ..firewall.judgement import look
from ..firewall.xtables import BINARIES, command, failed
from ..host import facts
from ..interfaces import ICommands, IRedirect, Result
from .guard import KEEPER_MATCH, Guard, claim_redirect
from .leftovers import COMMENT, Leftovers, keeper_comment

GUARD_PATIENCE: Final = 15.0
"""Seconds for the guard of an instance that was killed to finish."""


def default_rulespec(port: int) -> list[str]:
    """What is redirected, and how, unless C{ACME_ALPN_PROXY_RULESPEC} says otherwise.

    C{--syn}: connections that were there before are not taken over midway. C{LOCAL}: traffic that
    this host only forwards is left alone.
    """
    match = ["-p", "tcp", "--syn", "--dport", "443", "-m", "addrtype", "--dst-type", "LOCAL"]
    return [*match, "-j", "REDIRECT", "--to-port", str(port), "-m", "comment", "--comment", COMMENT]


def _as_dnat(rulespec: Sequence[str]) -> list[str]:
    """The same rule by DNAT, which changes the port alone."""
    words = ["DNAT" if word == "REDIRECT" else word for word in rulespec]
    for flag in ("--to-port", "--to-ports"):
        if flag in words[:-1]:
            at = words.index(flag)
            words[at : at + 2] = ["--to-destination", f":{words[at + 1]}"]
    return words


@implementer(IRedirect)
class IptablesRedirect:
    """Steers by one rule a family in nat PREROUTING."""

    _log = Logger()

    def __init__(
        self,
        port: int,
        rulespec: Sequence[str] | None = None,
        *,
        ipv6: bool = True,
        force: bool = False,
    ) -> None:
        """
        @param port: where the listener is.
        @param rulespec: what stands behind C{-t nat -I PREROUTING}, one word an item.
        @param ipv6: whether to steer IPv6 too, where there is any.
        @param force: whether to steer even if the firewall seems to drop who is steered.
        """
        self._port = port
        self._custom = rulespec
        self._rulespec = list(rulespec) if rulespec is not None else default_rulespec(port)
        self._ipv6 = ipv6
        self._force = force
        self._families: list[int] = []
        self._guard: Guard | None = None

    def __str__(self) -> str:
        return "iptables"

    @inlineCallbacks
    def prepare(self, commands: ICommands) -> Generator[Deferred[Any], Any, Sequence[str]]:
        """On all addresses: the kernel redirects to that of the interface a visitor comes in by."""
        if not self._ipv6:
            self._families = [4]
        elif not facts.has_ipv6():
            self._log.info("This host has no IPv6: steering IPv4 alone")
            self._families = [4]
        else:  # IPv6 first: if it fails, no visitor has been steered yet
            self._families = [6, 4]
        self._refuse_unnumbered()
        if not self._force:
            yield self._refuse_firewall(commands)
        return ("::",)

    @inlineCallbacks
    def apply(
        self, commands: ICommands, listeners: Sequence[socket.socket]
    ) -> Generator[Deferred[Any], Any, None]:
        if all(listener.family != socket.AF_INET6 for listener in listeners):
            self._families = [4]  # rules for IPv6 without a listener for it would be an outage
        idle = facts.tracked_connections() == 0
        claim = yield claim_redirect(commands, GUARD_PATIENCE)
        try:
            yield Leftovers(self._port, self._custom, self._families).remove(commands)
        except StartError:
            claim.close()
            raise
        self._guard = self._new_guard(claim)
        try:
            for family in self._families:
                yield self._insert(commands, family, "mangle", self._keeper)
            for family in self._families:
                yield self._insert(commands, family, "nat", self._rulespec)
        except StartError:
            guard, self._guard = self._guard, None
            yield guard.end(commands)
            raise
        if idle:
            self._warn_of_small_table()

    @inlineCallbacks
    def look_after(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        put_back = yield self._ask(commands, "look")
        if put_back:
            self._log.warn(
                "Somebody had wiped rules of {binaries}; they are back",
                binaries=", ".join(sorted(set(put_back))),
            )

    @inlineCallbacks
    def remove(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        if self._guard is not None:
            yield self._ask(commands, "remove")

    @inlineCallbacks
    def release(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        if self._guard is not None:
            guard, self._guard = self._guard, None
            yield guard.ask(commands, "release")
            yield guard.end(commands)

    @inlineCallbacks
    def _ask(self, commands: ICommands, wish: str) -> Generator[Deferred[Any], Any, list[str]]:
        """Ask the guard, or a new one if it was killed."""
        assert self._guard is not None
        if self._guard.gone:
            self._log.warn("The guard of the rules is gone; another one takes over")
            self._guard = self._new_guard((yield claim_redirect(commands, GUARD_PATIENCE)))
        words: list[str] = yield self._guard.ask(commands, wish)
        return words

    def _new_guard(self, claim: socket.socket) -> Guard:
        binaries = [BINARIES[family] for family in self._families]
        return Guard(claim, binaries, keeper_comment(os.getpid()), self._rulespec)

    @property
    def _keeper(self) -> list[str]:
        return [*KEEPER_MATCH, "-m", "comment", "--comment", keeper_comment(os.getpid())]

    def _refuse_unnumbered(self) -> None:
        if "REDIRECT" not in self._rulespec:
            return
        for family in self._families:
            names = facts.unnumbered_interfaces(family)
            if names:
                raise StartError(
                    f"visitors come in by {', '.join(names)}, which has no IPv{family} address for "
                    "REDIRECT to map them to, so they would all be dropped; set "
                    f"ACME_ALPN_PROXY_RULESPEC='{shlex.join(_as_dnat(self._rulespec))}', "
                    "which keeps the address they dialled",
                    os.EX_CONFIG,
                )

    @inlineCallbacks
    def _refuse_firewall(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        reason = yield look(commands, self._families, self._port)
        if reason is None:
            return
        if not facts.may_administer_network():
            raise not_permitted(reason)
        raise StartError(
            f"{reason}; use --redirect sk-lookup, for which the firewall need not be changed,"
            " or steer all the same with --force",
            os.EX_CONFIG,
        )

    def _warn_of_small_table(self) -> None:
        limit = facts.max_tracked_connections()
        count = facts.tcp_connections()
        if limit is not None and count > limit / 2:
            self._log.warn(
                "Connection tracking was idle and is now on for the whole host: its {count} TCP "
                "connections are over half of what the table takes ({limit}), and a full table "
                "drops packets; raise net.netfilter.nf_conntrack_max",
                count=count,
                limit=limit,
            )

    @inlineCallbacks
    def _insert(
        self, commands: ICommands, family: int, table: str, rule: Sequence[str]
    ) -> Generator[Deferred[Any], Any, None]:
        argv = command(family, table, "-I", "PREROUTING", *rule)
        result: Result = yield commands.run(argv)
        if result.code != 0:
            raise failed(result, custom_rule=self._custom is not None)
