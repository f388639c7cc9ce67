"""Deadlines with equal durations: the first to begin is the first to end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from twisted.internet.interfaces import IReactorTime

T = TypeVar("T")


class Unanswered(Exception):
    """A target did not accept the connection in time."""


class DeadlineQueue(Generic[T]):
    """Calls C{expired} for each item that is still in the queue C{seconds} after it was added.

    One timer serves all items. It keeps running after the last item is removed, so that the next
    item can use it; L{close} stops it.
    """

    def __init__(self, clock: IReactorTime, seconds: float, expired: Callable[[T], None]) -> None:
        self._clock = clock
        self.seconds = seconds
        self._expired = expired
        # Not a dict: finding its first item takes longer with every item removed at its front.
        self._due: OrderedDict[T, float] = OrderedDict()
        self._timer: Any = None

    def __len__(self) -> int:
        return len(self._due)

    def add(self, item: T) -> None:
        """C{item}'s time starts now."""
        self._due[item] = self._clock.seconds() + self.seconds
        if self._timer is None:
            self._timer = self._clock.callLater(self.seconds, self._look)

    def discard(self, item: T) -> None:
        """C{item} was in time; no error if it was never added."""
        self._due.pop(item, None)

    def oldest(self) -> T:
        """The item whose time ends first."""
        return next(iter(self._due))

    def close(self) -> None:
        """Forget all items."""
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        while self._due and self._due[self.oldest()] <= now:
            item, _ = self._due.popitem(last=False)
            self._expired(item)
        if self._due and self._timer is None:
            self._timer = self._clock.callLater(self._due[self.oldest()] - now, self._look)
