"""The relay that moves bytes within the kernel, by splice(2) and a pipe."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import Any, Final, TypeAlias

from ..transports.interfaces import IDescriptorTransport, IHangupWatch
from .relay import Relay, Source, TransportRelay

PIPE_SIZE: Final = 1_048_576
"""Bytes of the pipe (fs.pipe-max-size, which root may exceed): fewer system calls a byte."""

_ENOUGH: Final = 16_384
"""Below this, bytes are copied as fast as pages are moved, and a pipe is not worth its calls."""

_READS_ON: Final = 8_388_608
"""Bytes after which a receiver has shown that it goes on reading. To bound what waits for it costs
CPU time with each gigabyte."""

Pipe: TypeAlias = tuple[int, int]
"""The end to read from and the end to write to."""


class SharedPipe:
    """The pipe by which all relays move bytes, one move at a time.

    It is empty between two moves: bytes that a receiver does not take do not wait in it, so one is
    enough, and visitors that stop reading cannot take it from the others.

    @ivar lent: whether a move is under way.
    """

    def __init__(self) -> None:
        self.lent = False
        self._kept: Pipe | None = None

    def borrow(self) -> Pipe | None:
        """The pipe, or L{None} if there can be none now."""
        if self.lent:
            return None
        pipe, self._kept = self._kept or _pipe(), None
        self.lent = pipe is not None
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """C{pipe} is empty again."""
        self.lent = False
        self._kept = pipe

    def discard(self, pipe: Pipe) -> None:
        """C{pipe} may hold bytes that nobody wants any more."""
        self.lent = False
        _close(pipe)

    def close(self) -> None:
        """Keep none."""
        pipe, self._kept = self._kept, None
        if pipe is not None:
            _close(pipe)


def _pipe() -> Pipe | None:
    try:
        pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.fcntl(pipe[0], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass  # over the user's share (pipe-user-pages-soft): it works, only slower
    return pipe


def _close(pipe: Pipe) -> None:
    for end in pipe:
        os.close(end)


class _Splice:
    """One direction between descriptors: by the pipe, in the kernel, while the source is fast."""

    __slots__ = ("_moved", "_pipe", "_relay", "_sink", "_source")

    def __init__(self, relay: SpliceRelay, source: Any, sink: Any, pipe: SharedPipe) -> None:
        self._relay = relay
        self._source = source
        self._sink = sink
        self._pipe = pipe
        self._moved = 0

    def move(self) -> None:
        """The source can be read."""
        pipe = self._pipe.borrow()
        if pipe is None:
            self._read_bytes()
            return
        # No more than the sink has room for, and a little, so that the kernel learns that there
        # was more, and makes more room.
        count = min(self._sink.room() + _ENOUGH, PIPE_SIZE)
        try:
            got = _splice(self._source.fileno(), pipe[1], count)
        except BlockingIOError:
            self._pipe.give_back(pipe)
            return
        except OSError as problem:
            self._pipe.give_back(pipe)
            self._source.failed(problem)
            return
        if not got:
            self._pipe.give_back(pipe)
            self._read_bytes()  # the end-of-file
            return
        self._relay.count(self._source, got)
        self._moved += got
        if self._moved > _READS_ON:
            self._sink.trust()
        if got < _ENOUGH:
            self._source.read_by(None)
        try:
            rest = _empty(pipe, self._sink.fileno(), got)
        except OSError as problem:
            self._pipe.discard(pipe)
            self._sink.failed(problem)
            return
        self._pipe.give_back(pipe)
        if rest:
            self._relay.pass_on(self._source, self._sink, rest)
        self._source.rearm()

    def _read_bytes(self) -> None:
        self._source.read_by(None)
        self._source.rearm()  # there may be more, or a FIN, than one read finds
        self._source.doRead()


def _empty(pipe: Pipe, sink: int, held: int) -> bytes:
    """Move C{held} bytes, which are all that is in C{pipe}, to C{sink}; gives what it does not
    take."""
    try:
        while held:
            held -= _splice(pipe[0], sink, held)
    except BlockingIOError:
        return os.read(pipe[0], held)
    return b""


def _splice(source: int, sink: int, count: int) -> int:
    return os.splice(source, sink, count, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)


class SpliceRelay(Relay):
    """The relay over two transports whose descriptors it may use."""

    __slots__ = ("_pipe", "_splices")

    def __init__(self, front: Any, back: Any, pipe: SharedPipe) -> None:
        super().__init__(front, back)
        self._pipe = pipe
        self._splices: dict[Any, _Splice] | None = None

    def _take_over(self) -> None:
        """Without a detour by the protocols; an end is held back once the other one is behind."""
        self._front.receive, self._back.receive = self._to_back, self._to_front

    def _to_back(self, data: bytes) -> None:
        self._from_front += len(data)
        self.pass_on(self._front, self._back, data)

    def _to_front(self, data: bytes) -> None:
        self._from_back += len(data)
        self.pass_on(self._back, self._front, data)

    def pass_on(self, source: Any, sink: Any, data: bytes) -> None:
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
        self._splices = None  # they know the relay, too

    def _speed_up(self, source: Any) -> None:
        if self._splices is None:
            ends = (self._front, self._back)
            for end in ends:
                os.set_blocking(end.fileno(), False)  # splice(2) can be told of pipes alone
            self._splices = {end: _Splice(self, end, self._other(end), self._pipe) for end in ends}
        source.read_by(self._splices[source].move)


def relay_between(front: Any, back: Any, hangups: IHangupWatch, pipe: SharedPipe) -> Relay:
    """The relay that suits both transports."""
    if IDescriptorTransport.providedBy(front) and IDescriptorTransport.providedBy(back):
        return SpliceRelay(front, back, pipe)
    return TransportRelay(front, back, hangups)
