"""Twisted's epoll reactor with the roles swapped, for a process that runs only the proxy.

Normally the lean transports' poller is one descriptor of the reactor: each of its events takes two
calls of epoll_wait(2), and the reactor makes a logging context for it. Here the reactor's epoll is
one descriptor of the poller.
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
    """Waits in a poller, if there is one.

    Code that the poller calls may make and cancel delayed calls, but must not move one to an
    earlier time (C{DelayedCall.reset}): that would not be noticed until the next call is due.
    """

    _guest: IPoller | None = None
    _wanted = False
    """Whether the reactor has to check its own calls and descriptors."""

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
        """Run turns of the poller until the reactor itself has something to do: a delayed call that
        is due or new, one of its own descriptors, or its end. C{timeout} in seconds, L{None}: no
        limit.

        The path from one wait to the next is as short as possible: it runs for each event of a
        visitor's connection, often after this process has slept, when each line takes several times
        as long.
        """
        if self._guest is None:
            self.doPoll(timeout)
            return
        self._wanted = False
        wait, until = (-1.0, None) if timeout is None else (timeout, monotonic() + timeout)
        found = False
        while True:
            # After events, poll once without sleeping: the events that follow from them are often
            # there at once, and waking up delays a visitor more than the poll costs the processor.
            found = self._guest.turn(0 if found else wait)
            if self._wanted or self._guest is None or not self.running:
                return
            if until is not None:
                wait = until - monotonic()
                if wait <= 0:
                    return

    def look(self) -> None:
        """One of the reactor's own descriptors is ready."""
        self._wanted = True
        self.doPoll(0)

    def seconds(self) -> float:
        """A clock that nobody can set back: timers do not depend on the wall clock."""
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
    """The reactor's own epoll: everything that it waits for itself."""

    def __init__(self, reactor: ProxyReactor) -> None:
        self._reactor = reactor

    def ready(self, events: int) -> None:
        self._reactor.look()

    def connectionLost(self, reason: Failure) -> None:
        """Never called: C{doPoll} raises nothing, it logs."""


def install() -> Any:
    """Install it as the reactor of this process, which must not have one yet."""
    from twisted.internet.main import installReactor

    reactor = ProxyReactor()
    installReactor(reactor)
    return reactor
