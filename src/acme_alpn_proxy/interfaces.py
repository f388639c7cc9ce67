"""Contracts, no logic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from socket import socket
from typing import TYPE_CHECKING, Any

from zope.interface import Interface

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from .commands import Result


class IRelay(Interface):
    """Moves the bytes of one connection between its two ends until both have ended.

    The transports belong to their protocols, which pass on what they are told; the relay is the
    only one to write to them and to close them.
    """

    def start(first: bytes) -> None:
        """Write C{first}, what the visitor has sent so far, to the back, and begin to move."""

    def received(source: object, data: bytes) -> None:
        """C{source} gave C{data}: pass it on."""

    def finished(source: object) -> None:
        """C{source} sent its FIN: pass it on at once, behind the bytes before it."""

    def lost(source: object) -> None:
        """C{source} is gone; unless it was closed here, the other end gets a reset."""

    def abort() -> None:
        """Reset both ends now."""


class IHangupWatch(Interface):
    """Notices a reset on a descriptor from which nobody reads at the moment."""

    def add(transport: Any, hung_up: Callable[[], None]) -> None:
        """Call C{hung_up()}, once, when the peer of C{transport} resets the connection."""

    def discard(transport: Any) -> None:
        """Watch C{transport} no longer; it need not have been watched."""

    def close() -> None:
        """Give the watch's own descriptor back. Nothing is watched any more."""


class IPIDFile(Interface):
    """The mark that an instance is running."""

    def claim() -> None:
        """Take the mark for this process; raises L{acme_alpn_proxy.errors.StartError}."""

    def release() -> None:
        """Take the mark away if it is still this process's. Never raises."""


class ICommands(Interface):
    """A way to run commands and to wait, blocking or on the reactor."""

    def run(argv: Sequence[str]) -> Deferred[Result]:
        """Run C{argv} without a shell.

        @return: never fails: a missing binary and a passed deadline are results too.
        """

    def pause(seconds: float) -> Deferred[None]:
        """Fires after that time."""


class IRedirect(Interface):
    """A way to be given new connections to :443.

    Each Deferred may fail with L{acme_alpn_proxy.errors.StartError}. With blocking C{commands} it
    has fired when it is returned.
    """

    def prepare(commands: ICommands) -> Deferred[Sequence[str]]:
        """Refuse now what can be known to go wrong. Changes nothing.

        @return: a Deferred of the numeric addresses to listen on; C{"::"} is every address of both
            families. Those that this host has not are left out, as long as one is left.
        """

    def apply(commands: ICommands, listeners: Sequence[socket]) -> Deferred[None]:
        """Steer new connections to C{listeners}, the listening sockets.

        If it fails, nothing is left applied. What is applied goes when the process does, by
        whatever end.
        """

    def look_after(commands: ICommands) -> Deferred[None]:
        """Put back what others have wiped. Is called every few seconds."""

    def remove(commands: ICommands) -> Deferred[None]:
        """Steer no more. Connections that were steered go on. Nothing applied: does nothing."""

    def release(commands: ICommands) -> Deferred[None]:
        """The last steered connection has ended: let go of what kept them going."""
