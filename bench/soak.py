"""Whether the proxy works correctly: much data both ways to slow readers, and every way to end.

The speed of a proxy does not matter if it loses or mixes up a byte.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from tests.hellos import openssl_hello
from tests.integration.netns import Namespace, Street, street
from tests.integration.proxy import PORT, Proxy

SIZE = 200_000_000
LAST_WORDS = 10_000_000
"""Bytes to send after the other side has ended its direction."""
RESETS = 100
"""Resets by each side. There are many, because passing one on may depend on the moment."""

_WEB_PORT = 8443
_SECONDS = 30.0
_BLOCK = os.urandom(1_000_003)
_READS = (262_144, 1, 4_096, 65_536, 1_447, 131_072)
_PAUSE_EVERY, _PAUSE_SECONDS = 8_000_000, 0.01
_STALL_SECONDS = 0.5


class SoakFailed(Exception):
    """The proxy did not pass on the bytes or the end of a connection."""


class _End:
    """One end of a connection. It sends, and at the same time reads slowly."""

    def __init__(self, connection: socket.socket, begin: bytes, size: int, last: int) -> None:
        self._connection = connection
        self._begin = begin
        self._size = size
        self._last = last
        self._other_has_ended = Event()

    def send(self) -> bytes:
        """Send C{size} bytes, C{last} of them after the other side ended; return their SHA-256."""
        digest = hashlib.sha256()
        for piece in self._pieces():
            self._connection.sendall(piece)
            digest.update(piece)
        self._connection.shutdown(socket.SHUT_WR)
        return digest.digest()

    def _pieces(self) -> Iterator[bytes]:
        yield self._begin
        left = self._size - len(self._begin)
        waited = not self._last
        while left:
            if left <= self._last and not waited:
                if not self._other_has_ended.wait(_SECONDS):
                    raise SoakFailed("an end-of-file was not passed on")
                waited = True
            most = left if waited else left - self._last
            piece = _BLOCK[:most]
            yield piece
            left -= len(piece)

    def read(self) -> bytes:
        """Read until end-of-file, in pieces of all sizes, with pauses. Return the SHA-256."""
        digest = hashlib.sha256()
        room = memoryview(bytearray(max(_READS)))
        received = reads = 0
        pause_at, stall_at = _PAUSE_EVERY, self._size // 2
        while size := self._connection.recv_into(room, _READS[reads % len(_READS)]):
            digest.update(room[:size])
            received += size
            reads += 1
            if received >= pause_at:
                pause_at += _PAUSE_EVERY
                time.sleep(_PAUSE_SECONDS)
            if received >= stall_at:  # until all buffers on the way are full
                stall_at = 2 * self._size
                time.sleep(_STALL_SECONDS)
        self._other_has_ended.set()
        return digest.digest()


class _Soak:
    """Connections through the proxy; both ends are in this process."""

    def __init__(self, road: Street, listener: socket.socket) -> None:
        self._road = road
        self._listener = listener
        self._hello = openssl_hello(b"h2", b"http/1.1", server_name=b"site.example")

    def _accept(self) -> socket.socket:
        """The next connection with bytes; at its start the proxy makes one without, as a check."""
        while True:
            theirs, _ = self._listener.accept()
            if theirs.recv(1, socket.MSG_PEEK):
                return theirs
            theirs.close()

    @contextmanager
    def _pair(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        visitor = self._road.visitor.namespace
        with visitor.connect(self._road.host.ipv4, PORT, _SECONDS) as ours:
            ours.sendall(self._hello)
            theirs = self._accept()
            with theirs:
                theirs.settimeout(_SECONDS)
                if theirs.recv(len(self._hello), socket.MSG_WAITALL) != self._hello:
                    raise SoakFailed("the hello was not replayed as it was sent")
                yield ours, theirs

    def both_ways(self, size: int, *, visitor_ends_first: bool) -> None:
        """Send C{size} bytes each way at once; one side ends before the other has sent all."""
        with self._pair() as (ours, theirs), ThreadPoolExecutor(4) as pool:
            last = (0, LAST_WORDS) if visitor_ends_first else (LAST_WORDS, 0)
            visitor = _End(ours, b"from the visitor", size, last[0])
            backend = _End(theirs, b"from the backend", size, last[1])
            jobs: list[Callable[[], bytes]] = [
                visitor.send,
                backend.read,
                backend.send,
                visitor.read,
            ]
            up_sent, up_read, down_sent, down_read = (
                future.result() for future in [pool.submit(job) for job in jobs]
            )
        if (up_sent, down_sent) != (up_read, down_read):
            raise SoakFailed("what arrived is not what was sent")

    def reset(self, *, by_visitor: bool) -> None:
        """A reset on one side must arrive as a reset on the other."""
        with self._pair() as (ours, theirs):
            breaks, sees = (ours, theirs) if by_visitor else (theirs, ours)
            for sender, receiver in ((breaks, sees), (sees, breaks)):
                sender.sendall(_BLOCK[:1000])
                if len(receiver.recv(1000, socket.MSG_WAITALL)) != 1000:
                    raise SoakFailed("an end-of-file came before its time")
            breaks.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            breaks.close()
            try:
                sees.recv(1)
            except ConnectionResetError:
                return
            raise SoakFailed("a reset was passed on as an end-of-file")


def soak(directory: Path, size: int) -> None:
    """Raise L{SoakFailed} unless C{size} bytes each way, and every ending, go through the proxy."""
    with street() as road:
        host: Namespace = road.host.namespace
        proxy = Proxy(host, directory)
        options = ["--redirect=none", "--linger=0", "--drain-timeout=2"]
        with host.listen("127.0.0.1", _WEB_PORT) as listener:
            proxy.start(*options, f"--fallback=127.0.0.1:{_WEB_PORT}")
            try:
                case = _Soak(road, listener)
                case.both_ways(size, visitor_ends_first=True)
                case.both_ways(size, visitor_ends_first=False)
                for _ in range(RESETS):
                    case.reset(by_visitor=True)
                    case.reset(by_visitor=False)
            except OSError as error:
                raise SoakFailed(f"a connection broke: {error}") from error
            finally:
                proxy.stop(wait=True)
