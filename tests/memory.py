"""A reactor in memory, and the log in a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IProcessProtocol
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from acme_alpn_proxy.interfaces import ISteerable


class MemoryReactor(MemoryReactorClock):
    """Twisted's C{MemoryReactorClock}, with the other methods that the proxy uses."""

    def callFromThread(self, function: Callable[..., Any], *arguments: object) -> None:
        function(*arguments)

    def spawnProcess(
        self, protocol: IProcessProtocol, executable: str, *arguments: Any, **named: Any
    ) -> object:
        raise AssertionError(f"no test runs {executable} here")


@implementer(ISteerable)
class AlwaysSteers:
    """A proxy that steers for everything that needs it."""

    def need(self, what: object) -> Deferred[None]:
        return succeed(None)

    def needed_no_more(self, what: object) -> None:
        pass


def log_of(case: SynchronousTestCase) -> list[LogEvent]:
    """The events that are logged until the test has ended."""
    events: list[LogEvent] = []
    observer = cast(ILogObserver, events.append)
    globalLogPublisher.addObserver(observer)
    case.addCleanup(globalLogPublisher.removeObserver, observer)
    return events
