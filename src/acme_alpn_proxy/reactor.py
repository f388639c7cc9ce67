"""Twisted's epoll reactor, turned inside out for a process that is the proxy's own.

Elsewhere the lean transports' poller is one descriptor of the reactor, and each of its events takes
two waits and the way through the reactor's logging contexts. Here the reactor's epoll is one
descriptor of the poller.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.epollreactor import EPollReactor
from twisted.python.failure import Failure
from zope.interface import implementer

from .interfaces import IPoller, IPollerHost


@implementer(IPollerHost)
class ProxyReactor(EPollReactor):
    """Waits by a poller, if there is one."""

    _guest: IPoller | None = None
    _goes_on = True

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
        """Turns until there is something to do for the reactor itself: a call that is due or comes
        from a thread, or the end. C{timeout} in seconds, L{None}: until something happens."""
        self._goes_on = True
        while self._guest is not None:
            self._guest.turn(-1 if timeout is None else timeout)
            timeout = self.timeout()
            if timeout == 0 or self.threadCallQueue or not (self._goes_on and self.running):
                return
        self.doPoll(timeout)

    def stop(self) -> None:
        self._goes_on = False
        super().stop()


class _All:
    """All that the reactor itself waits for."""

    def __init__(self, reactor: ProxyReactor) -> None:
        self._reactor = reactor

    def ready(self, events: int) -> None:
        self._reactor.doPoll(0)

    def connectionLost(self, reason: Failure) -> None:
        """C{doPoll} raises nothing: it logs."""


def install() -> Any:
    """Make it the reactor of this process, which has none yet."""
    from twisted.internet.main import installReactor

    reactor = ProxyReactor()
    installReactor(reactor)
    return reactor
