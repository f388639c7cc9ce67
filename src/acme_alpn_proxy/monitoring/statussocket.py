"""The socket by which C{status} asks, and other commands hold an instance.

Every connection gets the status, one line. It may then send a word on a line, answered by C{OK}:

  - C{hold}: go on until this connection is closed, even if C{leave} comes meanwhile;
  - C{leave}: stop when nothing holds the instance;
  - C{keep}: forget an earlier C{leave}.

L{acme_alpn_proxy.monitoring.status} is the other end.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Final

from twisted.application.service import Service
from twisted.logger import Logger

from .. import __version__
from ..host.descriptors import ReadDescriptor
from ..interfaces import Reactor
from .status import VERSION, InstanceStatus, ProxyStatus, remove_stale, short, socket_path

_LONGEST_REQUEST: Final = 64


class Holders:
    """What holds an instance, and whether it is to stop when nothing does."""

    def __init__(self, stop: Callable[[], None]) -> None:
        """
        @param stop: is called then.
        """
        self._stop = stop
        self._holders: set[object] = set()
        self._leaving = False

    def __len__(self) -> int:
        return len(self._holders)

    def hold(self, holder: object) -> None:
        """Hold it until C{holder} is released."""
        self._holders.add(holder)

    def release(self, holder: object) -> None:
        """C{holder} needs it no longer; it need not have held it."""
        self._holders.discard(holder)
        self._look()

    def leave(self) -> None:
        """Stop when nothing holds the instance; perhaps that is now."""
        self._leaving = True
        self._look()

    def keep(self) -> None:
        """Forget an earlier C{leave}."""
        self._leaving = False

    def _look(self) -> None:
        if self._leaving and not self._holders:
            self._leaving = False
            self._stop()


class _Client(ReadDescriptor):
    """A connection."""

    log_prefix = "status client"

    def __init__(self, reactor: Reactor, stream: socket.socket, holders: Holders) -> None:
        self._reactor = reactor
        self._stream = stream
        self._holders = holders
        self._wishes: dict[bytes, Callable[[], None]] = {
            b"hold": lambda: holders.hold(self),
            b"leave": holders.leave,
            b"keep": holders.keep,
        }
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._stream.fileno()

    def doRead(self) -> None:
        try:
            data = self._stream.recv(_LONGEST_REQUEST)
            wish = self._wishes.get(data.rstrip(b"\n"))
            if wish is not None:
                self._stream.send(b"OK\n")
                wish()
                return
        except OSError:
            pass
        self._reactor.removeReader(self)
        self._stream.close()
        self._holders.release(self)


class StatusService(Service, ReadDescriptor):
    """Listens from the start, with the privileges of then, until the last connection has ended.

    Not by a port of Twisted's: those look for the socket at the name that it was bound to.
    """

    log_prefix = "status socket"
    _log = Logger()
    _listener: socket.socket

    def __init__(
        self,
        reactor: Reactor,
        pidfile: str,
        describe: Callable[[], ProxyStatus],
        holders: Holders,
    ) -> None:
        """
        @param pidfile: its path; the socket goes beside it.
        @param describe: gives the numbers.
        """
        self._reactor = reactor
        self._pidfile = pidfile
        self._describe = describe
        self._holders = holders
        self._path = ""

    def privilegedStartService(self) -> None:
        remove_stale(self._pidfile)
        self._path = socket_path(self._pidfile, os.getpid())
        try:
            self._listener = _listener(self._path)
        except OSError as problem:
            self._log.warn(
                "Cannot listen on {path}: {why}; 'status' will not know more than the PID",
                path=self._path,
                why=problem.strerror,
            )
            return
        self._reactor.addReader(self)
        # Not when this service stops: live connections are to be seen for as long as they drain.
        self._reactor.addSystemEventTrigger("during", "shutdown", self.close)

    def doRead(self) -> None:
        """Answer the client that has connected."""
        answer: InstanceStatus = {
            "version": VERSION,
            "program": __version__,
            "pid": os.getpid(),
            "holders": len(self._holders),
            **self._describe(),
        }
        try:
            stream, _ = self._listener.accept()
        except OSError:
            return
        try:
            stream.setblocking(False)
            stream.sendall(json.dumps(answer).encode() + b"\n")  # far less than its buffer takes
        except OSError:  # the client has gone
            stream.close()
        else:
            _Client(self._reactor, stream, self._holders)

    def close(self) -> None:
        self._reactor.removeReader(self)
        self._listener.close()
        try:
            os.unlink(self._path)
        except OSError:
            pass  # privileges were dropped: 'stop --wait' or the next start removes it

    def fileno(self) -> int:
        return self._listener.fileno()


def _listener(path: str) -> socket.socket:
    """A listening socket for its owner alone. At C{path} it is only ever seen when it listens."""
    unfinished = f"{path}.new"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        if os.path.lexists(unfinished):
            os.unlink(unfinished)
        listener.setblocking(False)
        with short(unfinished) as name:
            listener.bind(name)
        listener.listen()
        os.rename(unfinished, path)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener
