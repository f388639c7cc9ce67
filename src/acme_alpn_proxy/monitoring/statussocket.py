"""The socket by which C{status} asks; see L{acme_alpn_proxy.monitoring.status}."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from .. import __version__
from .status import VERSION, remove_stale, short, socket_path


@implementer(IReadDescriptor)
class StatusService(Service):
    """Listens from the start, with the privileges of then, until the last connection has ended.

    Not by a port of Twisted's: those look for the socket at the name that it was bound to.
    """

    _log = Logger()
    _listener: socket.socket

    def __init__(self, reactor: Any, pidfile: str, describe: Callable[[], dict[str, Any]]) -> None:
        """
        @param pidfile: its path; the socket goes beside it.
        @param describe: gives what is to be told, for L{json.dumps}.
        """
        self._reactor = reactor
        self._pidfile = pidfile
        self._describe = describe
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
        """Answer whoever has connected."""
        about = {"version": VERSION, "program": __version__, "pid": os.getpid()}
        line = json.dumps(about | self._describe()).encode() + b"\n"
        try:
            with self._listener.accept()[0] as asking:
                asking.setblocking(False)
                asking.send(line)  # it is a few hundred bytes: the kernel takes it whole
        except OSError:
            pass  # who asked is gone

    def close(self) -> None:
        self._reactor.removeReader(self)
        self._listener.close()
        try:
            os.unlink(self._path)
        except OSError:
            pass  # privileges were dropped: 'stop --wait' or the next start removes it

    def fileno(self) -> int:
        return self._listener.fileno()

    def connectionLost(self, reason: Failure) -> None:
        """Part of L{IReadDescriptor}: the reactor ends with all its descriptors."""

    def logPrefix(self) -> str:
        return "status socket"


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
