"""No redirect: the operator steers with other means."""

from __future__ import annotations

from collections.abc import Sequence
from socket import socket

from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from ..interfaces import ICommands, IRedirect


@implementer(IRedirect)
class NoRedirect:
    """Does nothing, and listens on every address, since it cannot know where visitors come from."""

    def __str__(self) -> str:
        return "none"

    def prepare(self, commands: ICommands) -> Deferred[Sequence[str]]:
        return succeed(("::",))

    def apply(self, commands: ICommands, listeners: Sequence[socket]) -> Deferred[None]:
        return succeed(None)

    def look_after(self, commands: ICommands) -> Deferred[None]:
        return succeed(None)

    def remove(self, commands: ICommands) -> Deferred[None]:
        return succeed(None)

    def release(self, commands: ICommands) -> Deferred[None]:
        return succeed(None)
