"""The first of several redirects that works on this host."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from socket import socket
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.logger import Logger
from zope.interface import implementer

from ..errors import StartError
from ..interfaces import ICommands, IRedirect


@implementer(IRedirect)
class ChosenRedirect:
    """Takes the first of C{ways} that does not refuse, and says why not the earlier ones."""

    _log = Logger()

    def __init__(
        self, ways: Sequence[IRedirect], first: str = "it works here", *, by_default: bool = False
    ) -> None:
        """
        @param ways: one or more, the preferred one first.
        @param first: why the first one is taken, if it is.
        @param by_default: whether nobody chose: that the first one is taken, is for the log alone.
        """
        self._ways = ways
        self._first = first
        self._by_default = by_default
        self._chosen: IRedirect | None = None

    def __str__(self) -> str:
        return ",".join(map(str, self._ways)) if self._chosen is None else str(self._chosen)

    @inlineCallbacks
    def prepare(self, commands: ICommands) -> Generator[Deferred[Any], Any, Sequence[str]]:
        """Ask one after the other."""
        refusals: list[tuple[str, StartError]] = []
        for way in self._ways:
            try:
                hosts: Sequence[str] = yield way.prepare(commands)
            except StartError as problem:
                refusals.append((str(way), problem))
            else:
                self._choose(way, refusals)
                return hosts
        raise _all_refuse(refusals)

    def apply(self, commands: ICommands, listeners: Sequence[socket]) -> Deferred[None]:
        return self._redirect.apply(commands, listeners)

    def look_after(self, commands: ICommands) -> Deferred[None]:
        return self._redirect.look_after(commands)

    def remove(self, commands: ICommands) -> Deferred[None]:
        return self._redirect.remove(commands)

    def release(self, commands: ICommands) -> Deferred[None]:
        return self._redirect.release(commands)

    @property
    def _redirect(self) -> IRedirect:
        assert self._chosen is not None, "prepare comes first"
        return self._chosen

    def _choose(self, way: IRedirect, refusals: Sequence[tuple[str, StartError]]) -> None:
        self._chosen = way
        why = "; ".join(f"not {name}, since {problem.cause}" for name, problem in refusals)
        self._log.info(
            "Steering by {redirect}: {reason}",
            redirect=way,
            reason=why or self._first,
            for_operator=bool(refusals) or not self._by_default,
        )


def _all_refuse(refusals: Sequence[tuple[str, StartError]]) -> StartError:
    """The first refusal with the causes of the others, and a remedy that names none of them."""
    (_, first), *others = refusals
    if not others:
        return first
    nor = "; nor by ".join(f"{name}: {problem.cause}" for name, problem in others)
    remedies = (_without_other_ways(problem.remedy) for _, problem in refusals)
    remedy = next(filter(None, remedies), first.remedy)
    return StartError(f"{first.cause} (nor by {nor}); {remedy}", first.status)


def _without_other_ways(remedy: str) -> str:
    """A remedy without those of its alternatives that are another redirect."""
    alternatives = remedy.split(", or ")
    return ", or ".join(each for each in alternatives if "--redirect" not in each)
