"""The set of live connections, and the wait until it is empty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime


class Abortable(Protocol):
    """An element of the set."""

    def abort(self) -> None:
        """Reset every side now."""

    def dialled(self) -> tuple[tuple[str, int], tuple[str, int]] | None:
        """See L{acme_alpn_proxy.proxy.protocols.ProxyServer.dialled}."""

    def look(self) -> None:
        """See L{acme_alpn_proxy.proxy.protocols.ProxyServerFactory.look_for_idle}."""


def _no_limit() -> None:
    """Do nothing: there is no limit."""


class LiveConnections:
    """Connections that were accepted and have not ended.

    @ivar entered: how many have been accepted so far.
    @ivar aborted: how many were reset by L{abort_all} since the last L{bound}.
    """

    def __init__(self) -> None:
        self.entered = 0
        self.aborted = 0
        self._limit: float = math.inf
        self._full: Callable[[], None] = _no_limit
        self._room: Callable[[], None] = _no_limit
        self._live: set[Abortable] = set()
        self._resetting: set[Abortable] = set()
        self._waiting: list[Deferred[None]] = []

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Abortable]:
        return iter(self._live)

    def bound(self, limit: int, full: Callable[[], None], room: Callable[[], None]) -> None:
        """Call C{full()} when the set reaches C{limit} connections, and C{room()} when it is
        smaller again."""
        self._limit, self._full, self._room = limit, full, room
        self.aborted = 0

    def enter(self, connection: Abortable) -> None:
        """C{connection} was accepted."""
        self._live.add(connection)
        self.entered += 1
        if len(self._live) == self._limit:
            self._full()

    def leave(self, connection: Abortable) -> None:
        """C{connection} has ended on all its sides; a second call is harmless."""
        if connection not in self._live:
            return
        self._live.remove(connection)
        self._resetting.discard(connection)
        if len(self._live) == self._limit - 1:
            self._room()
        if not self._live:
            waiting, self._waiting = self._waiting, []
            for deferred in waiting:
                deferred.callback(None)

    def abort_all(self) -> None:
        """Reset every connection."""
        for connection in self._live - self._resetting:
            self.aborted += 1
            self._resetting.add(connection)
        for connection in list(self._live):
            connection.abort()

    def drained(self, clock: IReactorTime, seconds: float) -> Deferred[None]:
        """Return a Deferred that fires when the set is empty; after C{seconds}, reset the rest."""
        if not self._live:
            return succeed(None)
        done: Deferred[None] = Deferred()
        self._waiting.append(done)
        deadline = clock.callLater(seconds, self.abort_all)

        def cancel_deadline(result: Any) -> Any:
            if deadline.active():
                deadline.cancel()
            return result

        return done.addBoth(cancel_deadline)
