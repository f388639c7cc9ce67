"""Moves bytes both ways between two connected transports.

What a direct connection would do, the relay does: a FIN is passed on as a FIN, behind the bytes
before it, and a reset as a reset. What one side cannot take yet is not read from the other.
"""

from __future__ import annotations

import fcntl
import os
import socket
from typing import Any, Final, TypeAlias

from twisted.internet.interfaces import (
    IPushProducer,
    ISystemHandle,
    IUNIXTransport,
    IWriteDescriptor,
)
from zope.interface import implementer

from .hangup import NoHangupWatch
from .interfaces import IDescriptorTransport, IHangupWatch, IRelay

PIPE_SIZE: Final = 1_048_576
"""Bytes that a pipe takes (fs.pipe-max-size, which root may exceed): fewer system calls a byte."""

_ENOUGH: Final = 16_384
"""Below this, bytes are copied as fast as pages are moved, and a pipe is not worth its calls."""


@implementer(IPushProducer)
class _Flow:
    """One direction: reads from C{source} while C{sink} takes the bytes.

    The sink asks for a pause when over 64 KiB wait in it (C{FileDescriptor.bufferSize} of
    L{twisted.internet.abstract}); with one read of 64 KiB more that bounds a direction's memory.
    """

    __slots__ = ("_relay", "finished", "moved", "sink", "source")

    def __init__(self, relay: TransportRelay, source: Any, sink: Any) -> None:
        self._relay = relay
        self.source = source
        self.sink = sink
        self.moved = 0
        self.finished = False

    def received(self, data: bytes) -> None:
        """The source gave this."""
        self.sink.write(data)

    def pauseProducing(self) -> None:
        self.source.pauseProducing()
        self._relay.watch(self.source)

    def resumeProducing(self) -> None:
        self._relay.quiet = 0
        self._relay.unwatch(self.source)
        self.source.resumeProducing()

    def stopProducing(self) -> None:
        """The sink is gone: its protocol tells the relay."""

    def finish(self) -> None:
        """The source's FIN has been read: send one behind the bytes that wait in the sink."""
        self.sink.unregisterProducer()
        self.sink.loseWriteConnection()
        self._relay.watch(self.source)

    def drop(self) -> None:
        """The connection has ended: what waits here is nobody's."""


@implementer(IRelay)
class TransportRelay:
    """The relay over transports of any kind.

    @ivar quiet: set to 0 whenever bytes move; whoever looks for idle relays counts it up.
    """

    __slots__ = ("_ended", "_from_back", "_from_front", "_front", "_hangups", "quiet")

    def __init__(self, front: Any, back: Any, hangups: IHangupWatch) -> None:
        self._hangups = hangups
        self._front = front
        self._from_front = self._flow(front, back)
        self._from_back = self._flow(back, front)
        self._ended = False
        self.quiet = 0

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes passed on so far, from the front and from the back."""
        return self._from_front.moved, self._from_back.moved

    def start(self, first: bytes) -> None:
        self._from_front.moved = len(first)
        self._from_front.sink.registerProducer(self._from_front, True)
        self._front.registerProducer(self._from_back, True)
        self._front.resumeProducing()
        self._from_front.sink.write(first)

    def received(self, source: object, data: bytes) -> None:
        self.quiet = 0
        flow = self._from_front if source is self._front else self._from_back
        flow.moved += len(data)
        flow.received(data)

    def finished(self, source: object) -> None:
        if _has_error(source):
            self._hung_up(source)
            return
        flow, other = self._from_front, self._from_back
        if source is not self._front:
            flow, other = other, flow
        flow.finished = True
        if not other.finished:
            flow.finish()
            return
        self._ended = True
        flow.sink.unregisterProducer()
        flow.sink.loseConnection()  # which sends the FIN
        other.sink.loseConnection()

    def lost(self, source: object) -> None:
        self.unwatch(source)
        if not self._ended:
            self._reset(self._other(source))
        self._from_front.drop()
        self._from_back.drop()

    def abort(self) -> None:
        self._ended = True
        for flow in (self._from_front, self._from_back):
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

    def _flow(self, source: Any, sink: Any) -> _Flow:
        return _Flow(self, source, sink)

    def _other(self, end: object) -> Any:
        return (self._from_front if end is self._front else self._from_back).sink

    def _hung_up(self, source: Any) -> None:
        source.abortConnection()
        if not self._ended:
            self._reset(self._other(source))

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


Pipe: TypeAlias = tuple[int, int]
"""The end to read from and the end to write to."""


class PipePool:
    """Lends pipes to flows while bytes are in them.

    @ivar limit: how many there may be, lent and kept: each may hold L{PIPE_SIZE} of the kernel's
        memory for as long as a receiver is slow.
    """

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self.lent = 0
        self._kept: list[Pipe] = []

    def borrow(self) -> Pipe | None:
        """An empty pipe, or L{None} if there can be no more now."""
        if self._kept:
            self.lent += 1
            return self._kept.pop()
        if self.lent >= self.limit:
            return None
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        self.lent += 1
        try:
            fcntl.fcntl(pipe[0], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            pass  # over the user's share (pipe-user-pages-soft): it works, only slower
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """C{pipe} is empty again."""
        self.lent -= 1
        self._kept.append(pipe)

    def discard(self, pipe: Pipe) -> None:
        """C{pipe} may hold bytes that nobody wants any more."""
        self.lent -= 1
        _close(pipe)

    def close(self) -> None:
        """Keep none."""
        while self._kept:
            _close(self._kept.pop())


def _close(pipe: Pipe) -> None:
    for end in pipe:
        os.close(end)


class _SpliceFlow(_Flow):
    """One direction between descriptors: by a pipe, in the kernel, while the source is fast.

    Into an empty pipe only, else EAGAIN has two meanings (splice(2)).
    """

    __slots__ = ("_held", "_pipe", "_pipes")

    def __init__(self, relay: TransportRelay, source: Any, sink: Any, pipes: PipePool) -> None:
        super().__init__(relay, source, sink)
        self._pipes = pipes
        self._pipe: Pipe | None = None
        self._held = 0

    def received(self, data: bytes) -> None:
        self.sink.write(data)
        if len(data) == self.source.read_size:
            self.source.read_by(self._move)

    def _move(self) -> None:
        """The source can be read."""
        self._relay.quiet = 0
        pipe = self._pipes.borrow()
        if pipe is None:
            self._read_bytes()
            return
        try:
            got = _splice(self.source.fileno(), pipe[1], PIPE_SIZE)
        except BlockingIOError:
            self._pipes.give_back(pipe)
            return
        except OSError as problem:
            self._pipes.give_back(pipe)
            self.source.failed(problem)
            return
        if got:
            self._pipe, self._held = pipe, got
            self.moved += got
            if got < _ENOUGH:
                self.source.read_by(None)
            if not self._push():
                self.source.pauseProducing()
                self.sink.write_by(self._push_rest)
        else:
            self._pipes.give_back(pipe)
            self._read_bytes()  # the end-of-file

    def _read_bytes(self) -> None:
        self.source.read_by(None)
        self.source.doRead()

    def _push(self) -> bool:
        """Whether the sink has taken all, or will take nothing any more."""
        pipe = self._pipe
        assert pipe is not None
        try:
            while self._held:
                self._held -= _splice(pipe[0], self.sink.fileno(), self._held)
        except BlockingIOError:
            return False
        except OSError as problem:
            self.sink.failed(problem)
            return True
        self._pipe = None
        self._pipes.give_back(pipe)
        return True

    def _push_rest(self) -> None:
        """The sink takes bytes again."""
        self._relay.quiet = 0
        if self._push():
            self.sink.write_by(None)
            self.source.resumeProducing()

    def drop(self) -> None:
        if self._pipe is not None:
            self._pipes.discard(self._pipe)
            self._pipe = None


def _splice(source: int, sink: int, count: int) -> int:
    return os.splice(source, sink, count, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)


class SpliceRelay(TransportRelay):
    """The relay over two transports whose descriptors it may use, and which tell of resets."""

    __slots__ = ("_pipes",)

    def __init__(self, front: Any, back: Any, pipes: PipePool) -> None:
        self._pipes = pipes
        super().__init__(front, back, NoHangupWatch())

    def watch(self, transport: object) -> None:
        """There is no need to."""

    unwatch = watch

    def _flow(self, source: Any, sink: Any) -> _SpliceFlow:
        return _SpliceFlow(self, source, sink, self._pipes)


def relay_between(front: Any, back: Any, hangups: IHangupWatch, pipes: PipePool) -> TransportRelay:
    """The relay that suits both transports."""
    if IDescriptorTransport.providedBy(front) and IDescriptorTransport.providedBy(back):
        return SpliceRelay(front, back, pipes)
    return TransportRelay(front, back, hangups)
