"""Moves bytes both ways between two connected transports.

What a direct connection would do, the relay does: a FIN is passed on as a FIN, behind the bytes
before it, and a reset as a reset. What one side cannot take yet is not read from the other.
"""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.interfaces import (
    IPushProducer,
    ISystemHandle,
    IUNIXTransport,
    IWriteDescriptor,
)
from zope.interface import implementer

from .interfaces import IHangupWatch, IRelay


@implementer(IPushProducer)
class _Flow:
    """One direction: reads from C{source} while C{sink} takes the bytes.

    The sink asks for a pause when over 64 KiB wait in it (C{FileDescriptor.bufferSize} of
    L{twisted.internet.abstract}); with one read of 64 KiB more that bounds a direction's memory.
    """

    def __init__(self, relay: TransportRelay, source: Any, sink: Any) -> None:
        self._relay = relay
        self.source = source
        self.sink = sink
        self.moved = 0
        self.finished = False

    def pauseProducing(self) -> None:
        self.source.pauseProducing()
        self._relay.watch(self.source)

    def resumeProducing(self) -> None:
        self._relay.unwatch(self.source)
        self.source.resumeProducing()

    def stopProducing(self) -> None:
        """The sink is gone: its protocol tells the relay."""

    def finish(self) -> None:
        """The source's FIN has been read: send one behind the bytes that wait in the sink."""
        self.finished = True
        self.sink.unregisterProducer()
        self.sink.loseWriteConnection()
        self._relay.watch(self.source)


@implementer(IRelay)
class TransportRelay:
    """The relay over Twisted's own transports."""

    def __init__(self, front: Any, back: Any, hangups: IHangupWatch) -> None:
        self._hangups = hangups
        self._front, self._back = front, back
        self._flows: dict[object, _Flow] = {
            front: _Flow(self, front, back),
            back: _Flow(self, back, front),
        }
        self._ended = False

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes passed on so far, from the front and from the back."""
        return self._flows[self._front].moved, self._flows[self._back].moved

    def start(self, first: bytes) -> None:
        self._flows[self._front].moved = len(first)
        for flow in self._flows.values():
            flow.sink.registerProducer(flow, True)
        self._front.resumeProducing()
        self._back.write(first)

    def received(self, source: object, data: bytes) -> None:
        flow = self._flows[source]
        flow.moved += len(data)
        flow.sink.write(data)

    def finished(self, source: object) -> None:
        if _has_error(source):
            self._hung_up(source)
            return
        self._flows[source].finish()
        if all(flow.finished for flow in self._flows.values()):
            self._ended = True
            for flow in self._flows.values():
                flow.sink.loseConnection()

    def lost(self, source: object) -> None:
        self.unwatch(source)
        if not self._ended:
            self._reset(self._flows[source].sink)

    def abort(self) -> None:
        self._ended = True
        for flow in self._flows.values():
            flow.sink.abortConnection()

    def watch(self, transport: object) -> None:
        """Nobody reads from C{transport} now: hear of a reset all the same.

        A Unix socket is left out: there EPOLLHUP also means an orderly close.
        """
        if not self._ended and not IUNIXTransport.providedBy(transport):
            self._hangups.add(transport, lambda: self._hung_up(transport))

    def unwatch(self, transport: object) -> None:
        """C{transport} is read from again, or gone."""
        self._hangups.discard(transport)

    def _hung_up(self, source: Any) -> None:
        source.abortConnection()
        if not self._ended:
            self._reset(self._flows[source].sink)

    def _reset(self, sink: Any) -> None:
        """Pass a reset on, behind as many of the waiting bytes as the kernel takes at once.

        They came before the reset: on a direct connection they would have been delivered.
        """
        self._ended = True
        sink.unregisterProducer()
        if IWriteDescriptor.providedBy(sink):
            sink.doWrite()
        sink.abortConnection()


def _has_error(transport: Any) -> bool:
    """Whether its socket has an error to tell.

    The kernel sets a socket's error before it shuts the socket down. Who looks in between sees
    EPOLLERR alone, and Twisted's reactor takes that for an orderly end.
    """
    if not ISystemHandle.providedBy(transport):
        return False
    handle: Any = transport.getHandle()
    return bool(handle.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
