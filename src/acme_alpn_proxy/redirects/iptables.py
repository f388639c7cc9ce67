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

from ..host.processes import NOT_FOUND, Result
from ..errors import AS_ADMINISTRATOR, StartError, not_permitted
from ..host import facts
from ..firewall.judgement import look
from ..firewall.xtables import BINARIES, LOCK_WAIT, listed
from ..interfaces import ICommands, IRedirect
from .guard import KEEPER_MATCH, Guard, claim_redirect

COMMENT: Final = "acme-alpn-proxy"

GUARD_PATIENCE: Final = 15.0
"""Seconds for the guard of an instance that was killed to finish."""

LIFE_SIGN: Final = 1.0
"""Seconds after which who still redirects is taken for alive."""

_NO_SUCH_RULE: Final = 1
"""Exit status of C{-D} and C{-C} where the rule is not there; a lock or a wrong rule has others."""


def default_rulespec(port: int) -> list[str]:
    """What is redirected, and how, unless C{ACME_ALPN_PROXY_RULESPEC} says otherwise.

    C{--syn}: connections that were there before are not taken over midway. C{LOCAL}: traffic that
    this host only forwards is left alone.
    """
    match = ["-p", "tcp", "--syn", "--dport", "443", "-m", "addrtype", "--dst-type", "LOCAL"]
    return [*match, "-j", "REDIRECT", "--to-port", str(port), "-m", "comment", "--comment", COMMENT]


def _follows(words: Sequence[str], flag: str) -> str:
    """The word after C{flag}, or nothing."""
    return words[words.index(flag) + 1] if flag in words[:-1] else ""


def _as_dnat(rulespec: Sequence[str]) -> list[str]:
    """The same rule by DNAT, which changes the port alone."""
    words = ["DNAT" if word == "REDIRECT" else word for word in rulespec]
    for flag in ("--to-port", "--to-ports"):
        if flag in words[:-1]:
            at = words.index(flag)
            words[at : at + 2] = ["--to-destination", f":{words[at + 1]}"]
    return words


def is_leftover(words: Sequence[str], port: int) -> bool:
    """Whether a nat rule, as C{iptables -S} prints it, is a redirect of ours to C{port}."""
    target = (
        _follows(words, "--to-ports")
        or _follows(words, "--to-port")
        or _follows(words, "--to-destination").rpartition(":")[2]
    )
    return _follows(words, "--comment") == COMMENT and target == str(port)


def keeper_comment(pid: int) -> str:
    """Names the process whose connections the keeper keeps: PIDs alone come again."""
    return f"{COMMENT} keeper {pid} {facts.process_start_time(pid)}"


def is_dead_keeper(words: Sequence[str]) -> bool:
    """Whether a mangle rule is a keeper whose process is no more."""
    name, _, owner = _follows(words, "--comment").partition(" keeper ")
    pid, _, started = owner.partition(" ")
    return name == COMMENT and pid.isdigit() and facts.process_start_time(pid) != started


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
        self._custom = rulespec is not None
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
            for family in self._families:
                yield self._remove_leftovers(commands, family)
        except StartError:
            claim.close()
            raise
        self._guard = self._new_guard(claim)
        try:
            for family in self._families:
                yield self._iptables(commands, family, "mangle", "-I", "PREROUTING", *self._keeper)
            for family in self._families:
                yield self._iptables(commands, family, "nat", "-I", "PREROUTING", *self._rulespec)
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
    def clean_up(self, commands: ICommands) -> Generator[Deferred[Any], Any, int]:
        """Remove the leftovers of dead instances, unless one is alive; what fails is passed over.

        @return: a Deferred of the number of rules removed.
        """
        total = 0
        with (yield claim_redirect(commands, LIFE_SIGN)):
            for family in (4, 6):
                try:
                    total += yield self._remove_leftovers(commands, family)
                except StartError as problem:  # no such family here, for one
                    self._log.debug("{problem}", problem=problem)
        return total

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

    @inlineCallbacks
    def _remove_leftovers(
        self, commands: ICommands, family: int
    ) -> Generator[Deferred[Any], Any, int]:
        """Remove what instances whose guard was killed too have left, and the original program.

        Only for the one that has the claim: rules to the port can then be nobody else's.
        """
        count = 0
        for table in ("nat", "mangle"):
            listing = yield self._iptables(commands, family, table, "-S", "PREROUTING")
            for _, *words in listed(listing.output):
                if is_leftover(words, self._port) if table == "nat" else is_dead_keeper(words):
                    yield self._iptables(commands, family, table, "-D", *words)
                    count += 1
        while self._custom:
            argv = self._argv(family, "nat", "-D", "PREROUTING", *self._rulespec)
            result = yield commands.run(argv)
            if result.code == _NO_SUCH_RULE:
                break
            if result.code != 0:
                raise self._refusal(family, result)
            count += 1
        if count:
            self._log.warn(
                "Removed {count} {binary} rules that a killed instance had left",
                count=count,
                binary=BINARIES[family],
            )
        return count

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
    def _iptables(
        self, commands: ICommands, family: int, table: str, *words: str
    ) -> Generator[Deferred[Any], Any, Result]:
        result: Result = yield commands.run(self._argv(family, table, *words))
        if result.code != 0:
            raise self._refusal(family, result)
        return result

    def _argv(self, family: int, table: str, *words: str) -> list[str]:
        return [BINARIES[family], "-w", LOCK_WAIT, "-t", table, *words]

    def _refusal(self, family: int, result: Result) -> StartError:
        binary = BINARIES[family]
        if result.code == NOT_FOUND:
            status = os.EX_UNAVAILABLE
            remedy = f"install {binary}, or put its folder (often /usr/sbin) on PATH"
        elif not facts.may_administer_network():
            status, remedy = os.EX_NOPERM, AS_ADMINISTRATOR
        elif "lock" in result.output:
            status = os.EX_TEMPFAIL
            remedy = "another program holds the lock of iptables: try again when it has finished"
        elif self._custom:
            status = os.EX_CONFIG
            remedy = "see whether ACME_ALPN_PROXY_RULESPEC is right for this command"
        else:
            status, remedy = os.EX_OSERR, f"see why '{binary} -t nat -L' does not work here"
        if family == 6 and status != os.EX_NOPERM:
            remedy += ", or set ACME_ALPN_PROXY_DISABLEV6=y to steer IPv4 alone"
        return StartError(
            f"'{shlex.join(result.argv)}' failed with status {result.code}: "
            f"{result.one_line}; {remedy}",
            status,
        )
