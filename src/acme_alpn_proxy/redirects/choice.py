"""Choose the first of several redirects that works on this host."""

from __future__ import annotations

import os
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
    """Takes the first of C{ways} that does not refuse, and logs why the earlier ones refused."""

    _log = Logger()

    def __init__(
        self,
        ways: Sequence[IRedirect],
        first: str = "it works here",
        *,
        others: Sequence[IRedirect] = (),
        by_default: bool = False,
    ) -> None:
        """
        @param ways: one or more, the preferred one first.
        @param first: the reason to log if the first one is taken; empty: nothing to explain.
        @param others: these are never taken; if all C{ways} refuse, the remedy names those of them
            that work here.
        @param by_default: whether the operator has chosen nothing; then no message goes to the
            terminal if the first one is taken, only to the log.
        """
        self._ways = ways
        self._first = first
        self._others = others
        self._by_default = by_default
        self._chosen: IRedirect | None = None

    def __str__(self) -> str:
        return ",".join(map(str, self._ways)) if self._chosen is None else str(self._chosen)

    @inlineCallbacks
    def prepare(self, commands: ICommands) -> Generator[Deferred[Any], Any, Sequence[str]]:
        """Ask one way after the other."""
        refusals: list[tuple[str, StartError]] = []
        for way in self._ways:
            try:
                hosts: Sequence[str] = yield way.prepare(commands)
            except StartError as problem:
                refusals.append((str(way), problem))
            else:
                self._choose(way, refusals)
                return hosts
        raise (yield self._advised(commands, _all_refuse(refusals)))

    @inlineCallbacks
    def apply(
        self, commands: ICommands, listeners: Sequence[socket]
    ) -> Generator[Deferred[Any], Any, None]:
        try:
            yield self._redirect.apply(commands, listeners)
        except StartError as problem:
            raise (yield self._advised(commands, problem)) from None

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
        why = "; ".join(
            f"{name} cannot be used, because {problem.cause}" for name, problem in refusals
        )
        if not why and not self._first:
            return
        self._log.info(
            "Steering with {redirect}: {reason}",
            redirect=way,
            reason=why or self._first,
            for_operator=bool(refusals) or not self._by_default,
        )

    @inlineCallbacks
    def _advised(
        self, commands: ICommands, problem: StartError
    ) -> Generator[Deferred[Any], Any, StartError]:
        """The refusal, with another way as the remedy if one works here."""
        if problem.status == os.EX_TEMPFAIL:  # another instance steers, or the lock is held
            return problem
        names = []
        for way in self._others:
            try:
                yield way.prepare(commands)
            except StartError:
                continue
            names.append(str(way))
        if not names:
            return problem
        return StartError(
            f"{problem.cause}; {or_another_way(names, problem.remedy)}", problem.status
        )


def or_another_way(names: Sequence[str], remedy: str) -> str:
    """The remedy, with the advice to try another way before it.

    @param names: the ways that work here.
    """
    ways = " or ".join(f"--redirect {name}" for name in names)
    return ", or ".join(filter(None, [f"use {ways}", remedy]))


def _all_refuse(refusals: Sequence[tuple[str, StartError]]) -> StartError:
    """All causes, and the remedy of the first refusal."""
    (name, first), *others = refusals
    if not others:
        return first
    causes = "; ".join(f"{each}: {problem.cause}" for each, problem in refusals)
    remedy = first.remedy if first.status == os.EX_NOPERM else f"for {name}: {first.remedy}"
    return StartError(f"none of these ways works here: {causes}; {remedy}", first.status)
