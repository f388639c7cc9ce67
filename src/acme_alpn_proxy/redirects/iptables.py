"""Redirect by iptables(8) and ip6tables(8).

Two rules for each family. The I{redirect} in the nat table steers new connections. The I{keeper}
in the mangle table has no target and does nothing but use connection tracking: when the last rule
that uses it goes, the kernel stops translating and every steered connection is cut. So it is there
before the redirect is, and goes only when the last steered connection has ended.
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

from ..commands import NOT_FOUND, Result
from ..errors import StartError
from ..interfaces import ICommands, IRedirect
from . import hostfacts
from .firewall import look
from .xtables import BINARIES, LOCK_WAIT, listed

COMMENT: Final = "acme-alpn-proxy"

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
    return f"{COMMENT} keeper {pid} {hostfacts.process_start_time(pid)}"


def is_dead_keeper(words: Sequence[str]) -> bool:
    """Whether a mangle rule is a keeper whose process is no more."""
    name, _, owner = _follows(words, "--comment").partition(" keeper ")
    pid, _, started = owner.partition(" ")
    return name == COMMENT and pid.isdigit() and hostfacts.process_start_time(pid) != started


@implementer(IRedirect)
class IptablesRedirect:
    """Steers by one rule a family in nat PREROUTING.

    @ivar hosts: the kernel redirects to the address of the interface that a visitor comes in by, so
        the listener must be on all of them.
    """

    hosts = ("::",)
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
        self._redirected: list[int] = []
        self._kept: list[int] = []

    def __str__(self) -> str:
        return f"iptables to port {self._port}"

    @inlineCallbacks
    def apply(
        self, commands: ICommands, listeners: Sequence[socket.socket]
    ) -> Generator[Deferred[Any], Any, None]:
        families = self._families(listeners)
        self._refuse_unnumbered(families)
        if not self._force:
            yield self._refuse_firewall(commands, families)
        idle = hostfacts.tracked_connections() == 0
        try:
            for family in families:
                yield self.remove_leftovers(commands, family)
            for family in families:
                yield self._keep(commands, family)
            for family in families:
                yield self._redirect(commands, family)
        except StartError:
            yield self._undo(commands)
            raise
        if idle:
            self._warn_of_small_table()

    @inlineCallbacks
    def remove(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        yield self._delete_all(commands, self._redirected, "nat", self._rulespec)

    @inlineCallbacks
    def release(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        yield self._delete_all(commands, self._kept, "mangle", self._keeper)

    @inlineCallbacks
    def remove_leftovers(
        self, commands: ICommands, family: int
    ) -> Generator[Deferred[Any], Any, int]:
        """Remove what instances that were killed have left, the original program's rules too.

        Only for the one that holds the port: rules to it can then be nobody else's.

        @return: a Deferred of the number of rules removed.
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
        match = ["-m", "conntrack", "--ctstate", "INVALID"]
        return [*match, "-m", "comment", "--comment", keeper_comment(os.getpid())]

    def _families(self, listeners: Sequence[socket.socket]) -> list[int]:
        """IPv6 first: it is the likelier one to fail, and then no visitor has been steered yet."""
        if not self._ipv6:
            return [4]
        if not hostfacts.has_ipv6() or all(s.family != socket.AF_INET6 for s in listeners):
            self._log.info("This host has no IPv6: steering IPv4 alone")
            return [4]
        return [6, 4]

    def _refuse_unnumbered(self, families: Sequence[int]) -> None:
        if "REDIRECT" not in self._rulespec:
            return
        for family in families:
            names = hostfacts.unnumbered_interfaces(family)
            if names:
                raise StartError(
                    f"visitors come in by {', '.join(names)}, which has no IPv{family} address for "
                    "REDIRECT to map them to, so they would all be dropped; set "
                    f"ACME_ALPN_PROXY_RULESPEC='{shlex.join(_as_dnat(self._rulespec))}', "
                    "which keeps the address they dialled"
                )

    @inlineCallbacks
    def _refuse_firewall(
        self, commands: ICommands, families: Sequence[int]
    ) -> Generator[Deferred[Any], Any, None]:
        for family in families:
            reason = yield look(commands, family, self._port)
            if reason is not None:
                remedy = "use --redirect sk-lookup, for which the firewall need not be changed,"
                if os.geteuid() != 0:
                    remedy = f"run this as root, {remedy}"
                raise StartError(f"{reason}; {remedy} or steer all the same with --force")

    def _warn_of_small_table(self) -> None:
        limit = hostfacts.max_tracked_connections()
        count = hostfacts.tcp_connections()
        if limit is not None and count > limit / 2:
            self._log.warn(
                "Connection tracking was idle and is now on for the whole host: its {count} TCP "
                "connections are over half of what the table takes ({limit}), and a full table "
                "drops packets; raise net.netfilter.nf_conntrack_max",
                count=count,
                limit=limit,
            )

    @inlineCallbacks
    def _keep(self, commands: ICommands, family: int) -> Generator[Deferred[Any], Any, None]:
        yield self._iptables(commands, family, "mangle", "-A", "PREROUTING", *self._keeper)
        self._kept.append(family)

    @inlineCallbacks
    def _redirect(self, commands: ICommands, family: int) -> Generator[Deferred[Any], Any, None]:
        yield self._iptables(commands, family, "nat", "-I", "PREROUTING", *self._rulespec)
        self._redirected.append(family)

    @inlineCallbacks
    def _undo(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        for step in (self.remove, self.release):
            try:
                yield step(commands)
            except StartError as problem:
                self._log.critical("While undoing: {problem}", problem=problem)

    @inlineCallbacks
    def _delete_all(
        self, commands: ICommands, families: list[int], table: str, rule: Sequence[str]
    ) -> Generator[Deferred[Any], Any, None]:
        """Delete C{rule} for each of C{families}, and those that it worked for from the list."""
        problem = None
        for family in list(families):
            try:
                yield self._delete(commands, family, table, rule)
                families.remove(family)
            except StartError as this:
                problem = this
        if problem is not None:
            raise problem

    @inlineCallbacks
    def _delete(
        self, commands: ICommands, family: int, table: str, rule: Sequence[str]
    ) -> Generator[Deferred[Any], Any, None]:
        """Delete C{rule}; that it is gone already is no error, only a line in the log."""
        result = yield commands.run(self._argv(family, table, "-D", "PREROUTING", *rule))
        if result.code == 0:
            return
        check = yield commands.run(self._argv(family, table, "-C", "PREROUTING", *rule))
        if check.code != _NO_SUCH_RULE:
            raise self._refusal(family, result)
        self._log.warn(
            "The {binary} rule in {table} was gone before it was removed",
            binary=BINARIES[family],
            table=table,
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
            remedy = f"install {binary}, or put its folder (often /usr/sbin) on PATH"
        elif os.geteuid() != 0:
            remedy = "run this as root"
        elif "lock" in result.output:
            remedy = "another program holds the lock of iptables: try again when it has finished"
        elif self._custom:
            remedy = "see whether ACME_ALPN_PROXY_RULESPEC is right for this command"
        else:
            remedy = f"see why '{binary} -t nat -L' does not work here"
        if family == 6:
            remedy += ", or set ACME_ALPN_PROXY_DISABLEV6=y to steer IPv4 alone"
        return StartError(
            f"'{shlex.join(result.argv)}' failed with status {result.code}: "
            f"{result.one_line}; {remedy}"
        )
