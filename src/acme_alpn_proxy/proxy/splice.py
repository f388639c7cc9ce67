"""The relay that moves bytes within the kernel, by splice(2) and pipes."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import Any, Final, TypeAlias

from ..transports.interfaces import IDescriptorTransport, IHangupWatch
from .relay import Relay, Source, TransportRelay

PIPE_SIZE: Final = 1_048_576
"""Bytes that a pipe takes (fs.pipe-max-size, which root may exceed): fewer system calls a byte."""

_ENOUGH: Final = 16_384
"""Below this, bytes are copied as fast as pages are moved, and a pipe is not worth its calls."""


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


class _Splice:
    """One direction between descriptors: by a pipe, in the kernel, while the source is fast.

    Into an empty pipe only, else EAGAIN has two meanings (splice(2)).
    """

    __slots__ = ("_held", "_pipe", "_pipes", "_relay", "_sink", "source")

    def __init__(self, relay: SpliceRelay, source: Any, sink: Any, pipes: PipePool) -> None:
        self._relay = relay
        self._pipes = pipes
        self._pipe: Pipe | None = None
        self._held = 0
        self._sink = sink
        self.source = source

    def move(self) -> None:
        """The source can be read."""
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
            self._relay.count(self.source, got)
            if got < _ENOUGH:
                self.source.read_by(None)
            if self._push():
                self.source.rearm()
            else:
                self.source.pauseProducing()
                self._sink.write_by(self._push_rest)
        else:
            self._pipes.give_back(pipe)
            self._read_bytes()  # the end-of-file

    def drop(self) -> None:
        """The connection has ended: what waits here is nobody's."""
        if self._pipe is not None:
            self._pipes.discard(self._pipe)
            self._pipe = None

    def _read_bytes(self) -> None:
        self.source.read_by(None)
        self.source.rearm()  # there may be more, or a FIN, than one read finds
        self.source.doRead()

    def _push(self) -> bool:
        """Whether the sink has taken all, or will take nothing any more."""
        pipe = self._pipe
        assert pipe is not None
        try:
            while self._held:
                self._held -= _splice(pipe[0], self._sink.fileno(), self._held)
        except BlockingIOError:
            return False
        except OSError as problem:
            self._sink.failed(problem)
            return True
        self._pipe = None
        self._pipes.give_back(pipe)
        return True

    def _push_rest(self) -> None:
        """The sink takes bytes again."""
        self._relay.quiet = 0
        if self._push():
            self._sink.write_by(None)
            self.source.resumeProducing()


def _splice(source: int, sink: int, count: int) -> int:
    return os.splice(source, sink, count, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)


class SpliceRelay(Relay):
    """The relay over two transports whose descriptors it may use."""

    __slots__ = ("_pipes", "_splices")

    def __init__(self, front: Any, back: Any, pipes: PipePool) -> None:
        super().__init__(front, back)
        self._pipes = pipes
        self._splices: dict[Any, _Splice] | None = None

    def _take_over(self) -> None:
        """Without a detour by the protocols; an end is held back once the other one is behind."""
        self._front.receive, self._back.receive = self._to_back, self._to_front

    def _to_back(self, data: bytes) -> None:
        self._from_front += len(data)
        self._pass_on(self._front, self._back, data)

    def _to_front(self, data: bytes) -> None:
        self._from_back += len(data)
        self._pass_on(self._back, self._front, data)

    def _pass_on(self, source: Any, sink: Any, data: bytes) -> None:
        self.quiet = 0
        # A FIN that follows goes with the bytes, in one segment (MSG_MORE of send(2)).
        sink.write(data, socket.MSG_MORE if source.finishing else 0)
        if sink.waiting:
            if sink.producer is None:
                sink.registerProducer(Source(self, source), True)
        elif len(data) == source.read_size and not self._ended:
            self._speed_up(source)

    def lost(self, source: Any) -> None:
        super().lost(source)
        splices, self._splices = self._splices, None  # they know the relay, too
        for splice in (splices or {}).values():
            splice.drop()

    def _speed_up(self, source: Any) -> None:
        if self._splices is None:
            ends = (self._front, self._back)
            for end in ends:
                os.set_blocking(end.fileno(), False)  # splice(2) can be told of pipes alone
            self._splices = {end: _Splice(self, end, self._other(end), self._pipes) for end in ends}
        source.read_by(self._splices[source].move)


def relay_between(front: Any, back: Any, hangups: IHangupWatch, pipes: PipePool) -> Relay:
    """The relay that suits both transports."""
    if IDescriptorTransport.providedBy(front) and IDescriptorTransport.providedBy(back):
        return SpliceRelay(front, back, pipes)
    return TransportRelay(front, back, hangups)
