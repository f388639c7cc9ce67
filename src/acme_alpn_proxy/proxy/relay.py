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
    ITCPTransport,
    IUNIXTransport,
    IWriteDescriptor,
)
from zope.interface import implementer

from ..interfaces import IDescriptorTransport, IHangupWatch, IRelay

PIPE_SIZE: Final = 1_048_576
"""Bytes that a pipe takes (fs.pipe-max-size, which root may exceed): fewer system calls a byte."""

_ENOUGH: Final = 16_384
"""Below this, bytes are copied as fast as pages are moved, and a pipe is not worth its calls."""


@implementer(IPushProducer)
class _Source:
    """One end, as the producer of what is written to the other.

    The sink asks for a pause when over 64 KiB wait in it (C{FileDescriptor.bufferSize} of
    L{twisted.internet.abstract}); with one read of 64 KiB more that bounds a direction's memory.
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
        """The sink is gone: its protocol tells the relay."""


@implementer(IRelay)
class Relay:
    """The relay between two transports which tell of a reset whether they are read or not.

    @ivar quiet: set to 0 whenever bytes move; whoever looks for idle relays counts it up.
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
    def moved(self) -> tuple[int, int]:
        """Bytes passed on so far, from the front and from the back."""
        return self._from_front, self._from_back

    def start(self, first: bytes) -> None:
        front, back = self._front, self._back
        self._from_front = len(first)
        self._take_over()
        front.resumeProducing()
        rest = first[getattr(back, "sent_ahead", 0) :]  # see IDescriptorTransport
        if rest:
            self._pass_on(front, back, rest)

    def received(self, source: object, data: bytes) -> None:
        self.count(source, len(data))
        self._pass_on(source, self._other(source), data)

    def count(self, source: object, size: int) -> None:
        """So many bytes of C{source} are passed on."""
        self.quiet = 0
        if source is self._front:
            self._from_front += size
        else:
            self._from_back += size

    def _take_over(self) -> None:
        """Each end is held back while the other one is behind."""
        self._back.registerProducer(_Source(self, self._front), True)
        self._front.registerProducer(_Source(self, self._back), True)

    def _pass_on(self, source: Any, sink: Any, data: bytes) -> None:
        sink.write(data)

    def finished(self, source: Any) -> None:
        sink = self._other(source)
        sink.unregisterProducer()
        if self._finished is None or self._finished is source:
            self._finished = source
            sink.loseWriteConnection()
        else:
            self._ended = True
            sink.loseConnection()  # which sends the FIN
            source.loseConnection()

    def lost(self, source: object) -> None:
        if not self._ended:
            self._reset(self._other(source))

    def abort(self) -> None:
        self._ended = True
        self._back.abortConnection()
        self._front.abortConnection()

    def pause(self, source: Any) -> None:
        """The other end does not take what C{source} sends."""
        source.pauseProducing()

    def resume(self, source: Any) -> None:
        """It has taken all."""
        self.quiet = 0
        source.resumeProducing()

    def _other(self, end: object) -> Any:
        return self._back if end is self._front else self._front

    def _reset(self, sink: Any) -> None:
        """Pass a reset on, behind as many of the waiting bytes as the kernel takes at once.

        They came before the reset: on a direct connection they would have been delivered.
        """
        self._ended = True
        sink.unregisterProducer()
        if IWriteDescriptor.providedBy(sink):
            sink.doWrite()
        sink.abortConnection()


class TransportRelay(Relay):
    """The relay over transports of any kind: from whom it does not read, somebody watches."""

    __slots__ = ("_hangups",)

    def __init__(self, front: Any, back: Any, hangups: IHangupWatch) -> None:
        super().__init__(front, back)
        self._hangups = hangups

    def start(self, first: bytes) -> None:
        for transport in (self._front, self._back):
            _tune(transport)
        super().start(first)

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
        """Hear of a reset all the same.

        A Unix socket is left out: there EPOLLHUP also means an orderly close.
        """
        if not self._ended and not IUNIXTransport.providedBy(transport):
            self._hangups.add(transport, lambda: self._hung_up(transport))

    def _hung_up(self, source: Any) -> None:
        source.abortConnection()
        if not self._ended:
            self._reset(self._other(source))


def _tune(transport: Any) -> None:
    """Add no delay of our own (Nagle's), and find peers that vanished (TCP keepalive)."""
    if ITCPTransport.providedBy(transport) and not IUNIXTransport.providedBy(transport):
        transport.setTcpNoDelay(True)
        transport.setTcpKeepAlive(True)


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
                self.source.again()
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
        self.source.again()  # there may be more, or a FIN, than one read finds
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
                sink.registerProducer(_Source(self, source), True)
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
