"""Notices resets on descriptors that are not read.

A connection is not read while its bytes would only pile up (back-pressure), after its FIN, and
while its target is being connected. Twisted's reactors do not watch such a descriptor, so they do
not notice a reset. epoll(7) reports EPOLLERR and EPOLLHUP even if nothing was asked for. So an
epoll of our own, itself a descriptor in the reactor, waits for only these two. EPOLLHUP without
EPOLLERR is not a reset: both sides have ended, and bytes may still wait to be read.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReactorFDSet
from zope.interface import implementer

from ..host.descriptors import ReadDescriptor
from ..interfaces import Reactor
from .interfaces import IDescriptorTransport, IHangupWatch


@implementer(IHangupWatch)
class NoHangupWatch:
    """If there is no epoll or the reactor takes no descriptors: a reset is noticed by the next
    read."""

    def add(self, transport: Any, hung_up: Callable[[], None]) -> None:
        pass

    def discard(self, transport: Any) -> None:
        pass

    def close(self) -> None:
        pass


@implementer(IHangupWatch)
class EpollHangupWatch(ReadDescriptor):
    """One epoll for all connections; a descriptor is in it only while it is watched."""

    log_prefix = "hangup watch"

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._epoll = select.epoll()
        self._descriptors: dict[object, int] = {}
        self._watched: dict[int, tuple[object, Callable[[], None]]] = {}
        reactor.addReader(self)

    def add(self, transport: Any, hung_up: Callable[[], None]) -> None:
        if transport not in self._descriptors and not IDescriptorTransport.providedBy(transport):
            descriptor = transport.fileno()
            try:
                self._epoll.register(descriptor, select.EPOLLET)
            except OSError:  # epoll_ctl(2) has no memory or watches left; the visitor goes on
                return
            self._descriptors[transport] = descriptor
            self._watched[descriptor] = transport, hung_up

    def discard(self, transport: Any) -> None:
        descriptor = self._descriptors.pop(transport, None)
        if descriptor is not None:
            del self._watched[descriptor]
            if transport.fileno() == descriptor:  # if not, closing has removed it
                self._epoll.unregister(descriptor)

    def close(self) -> None:
        self._reactor.removeReader(self)
        self._descriptors.clear()
        self._watched.clear()
        self._epoll.close()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def doRead(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            # An earlier event of this batch may have ended the connection. And if the descriptor is
            # closed, but a process that is just being spawned has a copy, its old number is
            # reported once (EPOLLET).
            if descriptor in self._watched and _is_reset(descriptor):
                transport, hung_up = self._watched[descriptor]
                self.discard(transport)
                hung_up()


def _is_reset(descriptor: int) -> bool:
    """Whether poll(2) reports an error right now."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def hangup_watch(reactor: Reactor) -> IHangupWatch:
    """The watch that works with this reactor."""
    if IReactorFDSet.providedBy(reactor) and hasattr(select, "epoll"):
        return EpollHangupWatch(reactor)
    return NoHangupWatch()
