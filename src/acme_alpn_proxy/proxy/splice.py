"""The relay that moves bytes within the kernel, with splice(2) and a pipe."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import Any, Final, TypeAlias

from ..transports.interfaces import IDescriptorTransport, IHangupWatch
from .relay import Relay, Source, TransportRelay

PIPE_SIZE: Final = 1_048_576
"""Bytes of the pipe (root may exceed fs.pipe-max-size): a large pipe needs fewer system calls."""

_ENOUGH: Final = 16_384
"""For fewer bytes, copying is as fast as moving pages, so the pipe's system calls do not pay."""

_READS_ON: Final = 8_388_608
"""The bytes with which a receiver has shown that it keeps reading. After that, the bytes that wait
for it are no longer limited: the limit costs CPU time with each gigabyte."""

Pipe: TypeAlias = tuple[int, int]
"""The end to read from and the end to write to."""


class SharedPipe:
    """The pipe through which all relays move bytes, one move at a time.

    It is empty between two moves: bytes that a receiver does not take never wait in it. So one pipe
    is enough, and visitors that stop reading cannot block it for others.
    @ivar lent: whether a move is using it.
    """

    def __init__(self) -> None:
        self.lent = False
        self._kept: Pipe | None = None

    def borrow(self) -> Pipe | None:
        """The pipe, or L{None} if none is available now."""
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
        """C{pipe} may still hold bytes that nobody needs."""
        self.lent = False
        _close(pipe)

    def close(self) -> None:
        """Close the pipe if there is one."""
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
        pass  # the user's pipe pages are used up (pipe-user-pages-soft): works, but slower
    return pipe


def _close(pipe: Pipe) -> None:
    for end in pipe:
        os.close(end)


class _Splice:
    """One direction between descriptors: through the pipe, in the kernel, if the source is fast."""

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
        # A little more than the sink has room for, so that the kernel sees that more data
        # waits, and makes more room.
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
        self._source.rearm()  # one read may leave more bytes, or a FIN, unread
        self._source.doRead()


def _empty(pipe: Pipe, sink: int, held: int) -> bytes:
    """Move the C{held} bytes in C{pipe} to C{sink}; returns the bytes that it does not take."""
    try:
        while held:
            held -= _splice(pipe[0], sink, held)
    except BlockingIOError:
        return os.read(pipe[0], held)
    return b""


def _splice(source: int, sink: int, count: int) -> int:
    return os.splice(source, sink, count, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)


class SpliceRelay(Relay):
    """The relay for two transports whose descriptors it may use."""

    __slots__ = ("_pipe", "_splices")

    def __init__(self, front: Any, back: Any, pipe: SharedPipe) -> None:
        super().__init__(front, back)
        self._pipe = pipe
        self._splices: dict[Any, _Splice] | None = None

    def _take_over(self) -> None:
        """Read and write without the protocols; pause an end while the other has bytes waiting."""
        self._front.receive, self._back.receive = self._to_back, self._to_front

    def _to_back(self, data: bytes) -> None:
        self._from_front += len(data)
        self.pass_on(self._front, self._back, data)

    def _to_front(self, data: bytes) -> None:
        self._from_back += len(data)
        self.pass_on(self._back, self._front, data)

    def pass_on(self, source: Any, sink: Any, data: bytes) -> None:
        self.quiet = 0
        # A FIN that follows is sent with the bytes, in one segment (MSG_MORE of send(2)).
        sink.write(data, socket.MSG_MORE if source.finishing else 0)
        if sink.waiting:
            if sink.producer is None:
                sink.registerProducer(Source(self, source), True)
        elif len(data) == source.read_size and not self._ended:
            self._speed_up(source)

    def lost(self, source: Any) -> None:
        super().lost(source)
        self._splices = None  # they refer to the relay, too: break the cycle

    def _speed_up(self, source: Any) -> None:
        if self._splices is None:
            ends = (self._front, self._back)
            for end in ends:
                os.set_blocking(end.fileno(), False)  # SPLICE_F_NONBLOCK affects only pipes
            self._splices = {end: _Splice(self, end, self._other(end), self._pipe) for end in ends}
        source.read_by(self._splices[source].move)


def relay_between(front: Any, back: Any, hangups: IHangupWatch, pipe: SharedPipe) -> Relay:
    """The relay that is best for both transports."""
    if IDescriptorTransport.providedBy(front) and IDescriptorTransport.providedBy(back):
        return SpliceRelay(front, back, pipe)
    return TransportRelay(front, back, hangups)
