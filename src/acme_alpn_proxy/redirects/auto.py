"""The best redirect that works on this host: sk-lookup, else iptables."""

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
class AutoRedirect:
    """Takes C{preferred} unless it refuses, or there is a reason not to; then C{other}."""

    _log = Logger()

    def __init__(self, preferred: IRedirect, other: IRedirect, reason: str | None = None) -> None:
        """
        @param reason: why C{other} is to be taken in any case.
        """
        self._preferred = preferred
        self._other = other
        self._reason = reason
        self._chosen: IRedirect | None = None

    def __str__(self) -> str:
        return "auto" if self._chosen is None else str(self._chosen)

    @inlineCallbacks
    def prepare(self, commands: ICommands) -> Generator[Deferred[Any], Any, Sequence[str]]:
        reason = self._reason
        if reason is None:
            try:
                hosts: Sequence[str] = yield self._preferred.prepare(commands)
            except StartError as problem:
                reason = str(problem)
            else:
                self._choose(self._preferred, "it works here")
                return hosts
        hosts = yield self._other.prepare(commands)
        self._choose(self._other, f"not {self._preferred}, since {reason}")
        return hosts

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

    def _choose(self, redirect: IRedirect, reason: str) -> None:
        self._chosen = redirect
        self._log.info(
            "Steering by {redirect}: {reason}", redirect=redirect, reason=reason, for_operator=True
        )
