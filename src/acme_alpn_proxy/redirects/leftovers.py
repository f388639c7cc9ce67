"""The iptables rules that dead instances have left: found once, for start, stop and check.

An instance that was killed together with its guard leaves rules that send visitors to a port where
nobody listens. The original program leaves its rule in the same way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.logger import Logger
from twisted.python.failure import Failure

from ..firewall.xtables import (
    BINARIES,
    NO_SUCH_RULE,
    NO_SUCH_TABLE,
    command,
    failed,
    listed,
)
from ..host import facts
from ..host.processes import BlockingCommands
from ..interfaces import NOT_FOUND, ICommands, Result
from .claim import claim_redirect
from .rules import COMMENT, KEEPER, is_redirect, word_after

LIFE_SIGN: Final = 1.0
"""Seconds to wait for the claim; who holds it for longer is alive."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A rule of a dead instance.

    @ivar words: the rule, as C{iptables -D} takes it: the chain first.
    @ivar steers: whether it is a redirect; otherwise it is a keeper, which harms nobody.
    """

    family: int
    words: tuple[str, ...]
    steers: bool

    @property
    def table(self) -> str:
        return "nat" if self.steers else "mangle"


class Leftovers:
    """Finds and removes them. Only for the process that holds the claim: while it does, no live
    instance has a rule to the port."""

    _log = Logger()

    def __init__(self, port: int, rulespec: Sequence[str] | None, families: Iterable[int]) -> None:
        """
        @param port: to which the rules redirect.
        @param rulespec: the operator's own rule; L{None}: the usual one, found by its comment.
        """
        self._port = port
        self._custom = None if rulespec is None else ["PREROUTING", *rulespec]
        self._families = tuple(families)

    @inlineCallbacks
    def find(
        self, commands: ICommands, family: int
    ) -> Generator[Deferred[Any], Any, list[Leftover]]:
        """Those of one family; fails with L{StartError} if they cannot be listed."""
        found = []
        for table in ("nat", "mangle"):
            listing = yield _run(commands, family, table, "-S", "PREROUTING")
            for _, *words in listed(listing.output):
                steers = table == "nat"
                if is_redirect(words, self._port) if steers else is_dead_keeper(words):
                    found.append(Leftover(family, tuple(words), steers))
        if self._custom is not None and not found:
            result: Result = yield commands.run(command(family, "nat", "-C", *self._custom))
            if result.code == 0:
                found.append(Leftover(family, tuple(self._custom), steers=True))
            elif result.code != NO_SUCH_RULE:
                raise failed(result, custom_rule=True)
        return found

    @inlineCallbacks
    def remove(self, commands: ICommands) -> Generator[Deferred[Any], Any, int]:
        """Remove those of all families; fails with L{StartError}.

        @return: a Deferred of their number.
        """
        total = 0
        for family in self._families:
            total += yield self._remove(commands, family)
        return total

    def clean_up(self) -> int:
        """Take the claim, remove what there is, and give the number of rules removed. Blocks.

        Raises L{StartError} if that cannot be done, or an instance is alive.
        """
        removed: list[int] = []
        problems: list[Failure] = []
        done = self._clean_up(BlockingCommands())
        done.addCallbacks(removed.append, problems.append)
        for problem in problems:
            problem.raiseException()
        return sum(removed)

    @inlineCallbacks
    def _clean_up(self, commands: ICommands) -> Generator[Deferred[Any], Any, int]:
        total = 0
        with (yield claim_redirect(commands, LIFE_SIGN)):
            for family in self._families:
                if (yield self._has_rules(commands, family)):
                    total += yield self._remove(commands, family)
        return total

    @inlineCallbacks
    def _has_rules(self, commands: ICommands, family: int) -> Generator[Deferred[Any], Any, bool]:
        """Whether there can be rules: not without iptables, nor where the kernel has no tables."""
        result: Result = yield commands.run(command(family, "nat", "-S", "PREROUTING"))
        return result.code not in (NOT_FOUND, NO_SUCH_TABLE)

    @inlineCallbacks
    def _remove(self, commands: ICommands, family: int) -> Generator[Deferred[Any], Any, int]:
        count = 0
        while found := (yield self.find(commands, family)):
            for rule in found:
                yield _run(commands, family, rule.table, "-D", *rule.words)
                count += 1
        if count:
            self._log.warn(
                "Removed {count} {binary} rules that a killed instance had left",
                count=count,
                binary=BINARIES[family],
            )
        return count


@inlineCallbacks
def _run(
    commands: ICommands, family: int, table: str, *words: str
) -> Generator[Deferred[Any], Any, Result]:
    result: Result = yield commands.run(command(family, table, *words))
    if result.code != 0:
        raise failed(result)
    return result


def keeper_comment(pid: int, number: int) -> str:
    """Names the process whose connections the keeper keeps: a PID alone is used again, and is
    another process's in another PID namespace.

    @param number: of the redirect among those of the process. An earlier one, with connections of
        its own that are still under way, has another keeper.
    """
    return f"{KEEPER} {pid} {facts.process_start_time(pid)} {facts.pid_namespace()} {number}"


def is_dead_keeper(words: Sequence[str]) -> bool:
    """Whether a mangle rule is a keeper whose process has ended. That can be said of processes of
    the same PID namespace alone."""
    name, _, owner = word_after(words, "--comment").partition(" keeper ")
    pid, started, namespace = [*owner.split(), "", "", ""][:3]
    if name != COMMENT or not pid.isdigit() or namespace != str(facts.pid_namespace()):
        return False
    return facts.process_start_time(pid) != started
