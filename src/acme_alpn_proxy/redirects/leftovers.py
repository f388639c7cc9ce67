"""The iptables rules that dead instances left: found in one place, for start, stop and check.

An instance that was killed together with its guard leaves rules that send visitors to a port where
no program listens. The original program leaves its rule in the same way.
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
from ..wording import counted
from .claim import claim_redirect
from .rules import COMMENT, KEEPER, is_redirect, word_after

LIFE_SIGN: Final = 1.0
"""Seconds to wait for the claim; a process that holds it for longer is alive."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A rule of a dead instance.

    @ivar words: the rule, as C{iptables -D} takes it: the chain first.
    @ivar steers: whether it is a redirect; otherwise it is a keeper, which is harmless.
    """

    family: int
    words: tuple[str, ...]
    steers: bool

    @property
    def table(self) -> str:
        return "nat" if self.steers else "mangle"


class Leftovers:
    """Finds and removes leftovers. Only for the process that holds the claim: while it holds it, no
    live instance has a rule to the port."""

    _log = Logger()

    def __init__(self, port: int, rulespec: Sequence[str] | None, families: Iterable[int]) -> None:
        """
        @param port: the port that the rules redirect to.
        @param rulespec: the operator's own rule; L{None}: the default one, found by its comment.
        """
        self._port = port
        self._custom = None if rulespec is None else ["PREROUTING", *rulespec]
        self._families = tuple(families)

    @inlineCallbacks
    def find(
        self, commands: ICommands, family: int
    ) -> Generator[Deferred[Any], Any, list[Leftover]]:
        """The leftovers of one family; fails with L{StartError} if the rules cannot be listed."""
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
        """Remove the leftovers of all families; fails with L{StartError}.

        @return: a Deferred of the number of rules removed.
        """
        total = 0
        for family in self._families:
            total += yield self._remove(commands, family)
        return total

    def clean_up(self) -> int:
        """Take the claim, remove all leftovers, and return the number of rules removed. Blocks.

        Raises L{StartError} if that fails, or if an instance is alive.
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
        """Whether rules can exist. Without iptables, or without its tables in the kernel, there are
        none."""
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
                "Removed {rules} that a killed instance left behind",
                rules=counted(count, f"{BINARIES[family]} rule"),
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
    """A comment that names the process whose connections the keeper keeps. A PID alone is not
    enough: the kernel reuses it, and another PID namespace has a process with the same one.

    @param number: the number of this redirect within the process. An earlier redirect, whose
        connections may still be under way, has another keeper.
    """
    return f"{KEEPER} {pid} {facts.process_start_time(pid)} {facts.pid_namespace()} {number}"


def is_dead_keeper(words: Sequence[str]) -> bool:
    """Whether a mangle rule is a keeper whose process has ended. This is known only for processes
    of the same PID namespace."""
    name, _, owner = word_after(words, "--comment").partition(" keeper ")
    pid, started, namespace = [*owner.split(), "", "", ""][:3]
    if name != COMMENT or not pid.isdigit() or namespace != str(facts.pid_namespace()):
        return False
    return facts.process_start_time(pid) != started
