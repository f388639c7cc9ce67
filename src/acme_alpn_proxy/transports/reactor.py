"""Twisted's epoll reactor, turned inside out for a process that is the proxy's own.

Elsewhere the lean transports' poller is one descriptor of the reactor, and each of its events takes
two waits and the way through the reactor's logging contexts. Here the reactor's epoll is one
descriptor of the poller.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from twisted.internet.base import DelayedCall
from twisted.internet.epollreactor import EPollReactor
from twisted.python.failure import Failure
from zope.interface import implementer

from .interfaces import IPoller, IPollerHost


@implementer(IPollerHost)
class ProxyReactor(EPollReactor):
    """Waits by a poller, if there is one.

    Who is called by the poller may make and cancel calls, but not move one to an earlier time
    (C{DelayedCall.reset}): nobody would look at that before the next call is due.
    """

    _guest: IPoller | None = None
    _wanted = False
    """Whether it has to look what there is to do for itself."""

    def invite(self, poller: IPoller) -> None:
        if self._guest is None:
            self._guest = poller
            poller.add(self._poller.fileno(), _All(self), poller.READ)
        else:
            self.addReader(poller)

    def dismiss(self, poller: IPoller) -> None:
        if self._guest is poller:
            self._guest = None
        else:
            self.removeReader(poller)

    def doIteration(self, timeout: float | None) -> None:
        """Turns of the poller until there is something to do for the reactor itself: a call that
        is due or new, one of its own descriptors, or the end. C{timeout} in seconds, L{None}:
        until something happens.

        The way from one wait to the next is as short as can be: a visitor's connection takes it at
        each of its events, often behind a sleep, when every line costs several times as much.
        """
        if self._guest is None:
            self.doPoll(timeout)
            return
        self._wanted = False
        wait, until = (-1.0, None) if timeout is None else (timeout, monotonic() + timeout)
        found = False
        while True:
            # Behind events it looks once before it sleeps: what they lead to is often there at
            # once, and to be woken takes a visitor longer than the look takes the processor.
            found = self._guest.turn(0 if found else wait)
            if self._wanted or self._guest is None or not self.running:
                return
            if until is not None:
                wait = until - monotonic()
                if wait <= 0:
                    return

    def look(self) -> None:
        """One of its own descriptors is ready."""
        self._wanted = True
        self.doPoll(0)

    def seconds(self) -> float:
        """A clock that nobody sets: timers do not wait for the wall clock's time to come again."""
        return monotonic()

    def callLater(
        self,
        delay: float,
        callable: Callable[..., Any],  # noqa: A002
        *args: object,
        **kw: object,
    ) -> DelayedCall:
        self._wanted = True
        return super().callLater(delay, callable, *args, **kw)

    def stop(self) -> None:
        self._wanted = True
        super().stop()


class _All:
    """All that the reactor itself waits for."""

    def __init__(self, reactor: ProxyReactor) -> None:
        self._reactor = reactor

    def ready(self, events: int) -> None:
        self._reactor.look()

    def connectionLost(self, reason: Failure) -> None:
        """C{doPoll} raises nothing: it logs."""


def install() -> Any:
    """Make it the reactor of this process, which has none yet."""
    from twisted.internet.main import installReactor

    reactor = ProxyReactor()
    installReactor(reactor)
    return reactor
