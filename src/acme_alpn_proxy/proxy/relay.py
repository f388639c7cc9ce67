"""Moves bytes both ways between two connected transports.

The relay behaves like a direct connection: it passes a FIN on as a FIN, after all earlier bytes,
and a reset as a reset. While one side cannot take more bytes, the relay does not read the other.
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
from zope.interface import Interface, implementer

from ..transports.interfaces import IHangupWatch
from ..transports.sockets import tune_transport


class IRelay(Interface):
    """Moves the bytes of one connection between its two ends until both have ended.

    The transports belong to their protocols, which pass their events to the relay. Only the relay
    writes to the transports and closes them.
    """

    def start(first: bytes, sent_ahead: int = 0) -> None:
        """Begin to move bytes.

        @param first: what the visitor has sent so far.
        @param sent_ahead: how many of these bytes the target has already been sent.
        """

    def received(source: object, data: bytes) -> None:
        """C{data} came from C{source}: pass it on."""

    def finished(source: object) -> None:
        """C{source} sent its FIN: pass it on at once, after all earlier bytes."""

    def lost(source: object) -> None:
        """C{source} is closed; unless the relay closed it, reset the other end."""

    def abort() -> None:
        """Reset both ends now."""


@implementer(IPushProducer)
class Source:
    """One end, as the producer of the bytes that are written to the other end, the sink.

    The sink asks for a pause when more than 64 KiB wait in it (C{FileDescriptor.bufferSize} of
    L{twisted.internet.abstract}). One more read of 64 KiB can follow, so the memory for each
    direction is bounded.
    """

    __slots__ = ("_end", "_relay")

    def __init__(self, relay: Relay, end: Any) -> None:
        self._relay = relay
        self._end = end

    def pauseProducing(self) -> None:
        self._relay.pause(self._end)

    def resumeProducing(self) -> None:
        self._relay.resume(self._end)

    def stopProducing(self) -> None:
        """The sink is closed; its protocol reports that to the relay."""


@implementer(IRelay)
class Relay:
    """The relay between two transports that report a reset even while they are not read.

    @ivar quiet: set to 0 whenever bytes move; the code that looks for idle relays increases it.
    """

    __slots__ = ("_back", "_ended", "_finished", "_from_back", "_from_front", "_front", "quiet")

    def __init__(self, front: Any, back: Any) -> None:
        self._front = front
        self._back = back
        self._from_front = self._from_back = 0
        self._finished: Any = None
        self._ended = False
        self.quiet = 0

    @property
    def back(self) -> Any:
        """The transport to the target."""
        return self._back

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes passed on so far: those from the front, and those from the back."""
        return self._from_front, self._from_back

    def start(self, first: bytes, sent_ahead: int = 0) -> None:
        front, back = self._front, self._back
        self._from_front += len(first)
        self._take_over()
        front.resumeProducing()
        rest = first[sent_ahead:]
        if rest:
            self.pass_on(front, back, rest)

    def received(self, source: object, data: bytes) -> None:
        self.count(source, len(data))
        self.pass_on(source, self._other(source), data)

    def count(self, source: object, size: int) -> None:
        """Count C{size} bytes of C{source} as passed on."""
        self.quiet = 0
        if source is self._front:
            self._from_front += size
        else:
            self._from_back += size

    def _take_over(self) -> None:
        """Pause each end while the other one has bytes waiting."""
        self._back.registerProducer(Source(self, self._front), True)
        self._front.registerProducer(Source(self, self._back), True)

    def pass_on(self, source: Any, sink: Any, data: bytes) -> None:
        """Write C{data} from C{source} to C{sink}; it is already counted."""
        sink.write(data)

    def finished(self, source: Any) -> None:
        sink = self._other(source)
        sink.unregisterProducer()
        if self._finished is None or self._finished is source:
            self._finished = source
            sink.loseWriteConnection()
        else:
            self._ended = True
            sink.loseConnection()  # this sends the FIN
            source.loseConnection()

    def lost(self, source: object) -> None:
        if not self._ended:
            self._reset(self._other(source))

    def abort(self) -> None:
        self._ended = True
        self._back.abortConnection()
        self._front.abortConnection()

    def pause(self, source: Any) -> None:
        """Stop reading C{source}: the other end does not take its bytes."""
        source.pauseProducing()

    def resume(self, source: Any) -> None:
        """Read C{source} again: the other end has taken all waiting bytes."""
        self.quiet = 0
        source.resumeProducing()

    def _other(self, end: object) -> Any:
        return self._back if end is self._front else self._front

    def _reset(self, sink: Any) -> None:
        """Pass a reset on, after as many of the waiting bytes as the kernel takes at once.

        They came before the reset: a direct connection would have delivered them.
        """
        self._ended = True
        sink.unregisterProducer()
        if IWriteDescriptor.providedBy(sink):
            sink.doWrite()
        sink.abortConnection()


class TransportRelay(Relay):
    """The relay for transports of any kind: while it does not read a side, a hangup watch reports
    that side's reset."""

    __slots__ = ("_hangups",)

    def __init__(self, front: Any, back: Any, hangups: IHangupWatch) -> None:
        super().__init__(front, back)
        self._hangups = hangups

    def start(self, first: bytes, sent_ahead: int = 0) -> None:
        tune_transport(self._front)
        tune_transport(self._back, is_target=True)
        super().start(first, sent_ahead)

    def finished(self, source: Any) -> None:
        if _has_error(source):
            self._hung_up(source)
        else:
            super().finished(source)
            self._watch(source)

    def lost(self, source: object) -> None:
        self._hangups.discard(source)
        super().lost(source)

    def pause(self, source: Any) -> None:
        super().pause(source)
        self._watch(source)

    def resume(self, source: Any) -> None:
        self._hangups.discard(source)
        super().resume(source)

    def _watch(self, transport: object) -> None:
        """Notice a reset while C{transport} is not read.

        Not for Unix sockets: there, EPOLLHUP also means an orderly close.
        """
        if not self._ended and not IUNIXTransport.providedBy(transport):
            self._hangups.add(transport, lambda: self._hung_up(transport))

    def _hung_up(self, source: Any) -> None:
        source.abortConnection()
        if not self._ended:
            self._reset(self._other(source))


def _has_error(transport: Any) -> bool:
    """Whether its socket has a pending error.

    The kernel sets a socket's error before it shuts the socket down. Between the two, epoll reports
    EPOLLERR alone, and Twisted's reactor takes that for an orderly end.
    """
    if not ISystemHandle.providedBy(transport):
        return False
    handle: Any = transport.getHandle()
    return bool(handle.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
