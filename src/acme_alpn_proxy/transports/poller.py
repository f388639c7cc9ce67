"""One epoll(7) for all lean descriptors, and a queue for retries after a shortage of
descriptors."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any, Final, Protocol

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..host.descriptors import ReadDescriptor
from ..interfaces import Reactor
from .interfaces import IPoller, IPollerHost

_log = Logger()

_EVENTS: Final = 256

_LOOKS: Final = 8
"""How often a poller that is one of the reactor's readers polls in each turn of the reactor: the
next event often comes at once, and a turn of the reactor costs more than a poll."""

_RETRY: Final = 0.1


class Handler(Protocol):
    """What a L{Poller} calls for a descriptor."""

    def ready(self, events: int) -> None:
        """epoll(7) reports C{events}; does nothing if the connection has already ended."""

    def connectionLost(self, reason: Failure) -> None:
        """C{ready} has raised an exception: end the connection."""


@implementer(IPoller)
class Poller(ReadDescriptor):
    """One epoll for all lean descriptors.

    Either it is one of the reactor's descriptors, or the reactor's epoll is one of its own.

    @ivar alone: whether the event that is being handled is the only one of its batch.
    """

    READ = select.EPOLLIN
    log_prefix = "poller"

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._handlers: dict[int, Handler] = {}
        self.alone = False

    def open(self) -> None:
        """Open the epoll. To be called before anything is added."""
        self._epoll = select.epoll()
        if IPollerHost.providedBy(self._reactor):
            self._reactor.invite(self)
        else:
            self._reactor.addReader(self)

    def add(self, descriptor: int, handler: Handler, events: int) -> None:
        """Report C{events}, which are those of epoll(7), EPOLLERR and EPOLLHUP to C{handler}."""
        self._epoll.register(descriptor, events)
        self._handlers[descriptor] = handler

    def change(self, descriptor: int, events: int) -> None:
        """Report C{events} from now on, including those that are already there."""
        self._epoll.modify(descriptor, events)

    def remove(self, descriptor: int) -> None:
        """Stop reporting events of C{descriptor}."""
        self._epoll.unregister(descriptor)
        del self._handlers[descriptor]

    def forget(self, descriptor: int) -> None:
        """Forget C{descriptor}, an edge-triggered one (EPOLLET) that is about to be closed.

        Closing takes it out of the epoll, unless a process that is just being spawned holds a copy.
        An event of the copy is then reported once, to the handler that is registered for this
        number at that time.
        """
        del self._handlers[descriptor]

    def close(self) -> None:
        """Close the epoll; nothing is reported any more."""
        if IPollerHost.providedBy(self._reactor):
            self._reactor.dismiss(self)
        else:
            self._reactor.removeReader(self)
        self._handlers.clear()
        self._epoll.close()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def doRead(self) -> None:
        for _ in range(_LOOKS):
            if not self.turn(0) or self._epoll.closed:
                return

    def turn(self, timeout: float) -> bool:
        handlers = self._handlers
        found = self._epoll.poll(timeout, _EVENTS)
        self.alone = len(found) == 1
        for descriptor, events in found:
            handler = handlers.get(descriptor)
            if handler is None:  # it has already ended
                continue
            try:
                handler.ready(events)
            except Exception:
                reason = Failure()
                _log.failure("Error in a connection", reason)
                handler.connectionLost(reason)
        return bool(found)


class RetryQueue:
    """Calls that failed because descriptors or memory ran out, and are tried again a little later.

    @ivar waiting: the functions to call then, in order.
    @ivar reported: whether a shortage has been logged that may still last.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self.reported = False
        self._timer: Any = None
        self.waiting: list[Callable[[], None]] = []

    def add(self, retry: Callable[[], None]) -> None:
        """Call C{retry()} after a tenth of a second."""
        self.waiting.append(retry)
        if self._timer is None:
            self._timer = self._clock.callLater(_RETRY, self._retry)

    def report(self, problem: OSError) -> None:
        """Log one line for each shortage."""
        if not self.reported:
            self.reported = True
            _log.warn(
                "New connections wait: {problem}; is the limit on open files (ulimit -n) too low?",
                problem=problem.strerror,
            )

    def over(self) -> None:
        """The shortage is over: every visitor that waited has been accepted."""
        self.reported = False

    def close(self) -> None:
        """Forget all retries."""
        self.waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _retry(self) -> None:
        self._timer = None
        waiting, self.waiting = self.waiting, []
        for retry in waiting:
            retry()
