"""A listening Unix socket that only its owner can connect to."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from ..interfaces import Reactor
from .descriptors import ReadDescriptor
from .unixsockets import remove_if_dead, require_free, short


class UnixListener(ReadDescriptor):
    """Accepts connections at a path, with mode 0600.

    This is not one of Twisted's ports: those expect the socket at the name that it was bound to.
    Here it is bound to another name and renamed, so that a socket at the path always listens.
    """

    log_prefix = "Unix socket"
    _listener: socket.socket

    def __init__(
        self, reactor: Reactor, path: str, accepted: Callable[[socket.socket], None]
    ) -> None:
        """
        @param accepted: called with each connection, a non-blocking socket.
        """
        self._reactor = reactor
        self._path = path
        self._accepted = accepted

    def open(self) -> None:
        """Start listening; replaces the socket of a dead program. Raises L{OSError}."""
        unfinished = f"{self._path}.new"
        for path in (unfinished, self._path):
            require_free(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            remove_if_dead(unfinished)
            listener.setblocking(False)
            with short(unfinished) as name:
                listener.bind(name)
            listener.listen()
            os.rename(unfinished, self._path)
            self._inode = os.stat(self._path).st_ino
        except OSError:
            listener.close()
            remove_if_dead(unfinished)
            raise
        finally:
            os.umask(before)
        self._listener = listener
        self._reactor.addReader(self)

    def close(self) -> None:
        """Stop listening, and remove the socket, unless another one is at the path now."""
        self._reactor.removeReader(self)
        self._listener.close()
        try:
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except OSError:
            pass  # privileges were dropped: the clean-up after dead instances removes it

    def fileno(self) -> int:
        return self._listener.fileno()

    def doRead(self) -> None:
        try:
            stream, _ = self._listener.accept()
        except OSError:
            return
        stream.setblocking(False)
        self._accepted(stream)
