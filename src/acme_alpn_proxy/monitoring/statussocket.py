"""The socket by which C{status} asks; see L{acme_alpn_proxy.monitoring.status}."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable

from twisted.application.service import Service
from twisted.logger import Logger

from .. import __version__
from ..host.descriptors import ReadDescriptor
from ..interfaces import Reactor
from .status import VERSION, InstanceStatus, ProxyStatus, remove_stale, short, socket_path


class StatusService(Service, ReadDescriptor):
    """Listens from the start, with the privileges of then, until the last connection has ended.

    Not by a port of Twisted's: those look for the socket at the name that it was bound to.
    """

    log_prefix = "status socket"
    _log = Logger()
    _listener: socket.socket

    def __init__(self, reactor: Reactor, pidfile: str, describe: Callable[[], ProxyStatus]) -> None:
        """
        @param pidfile: its path; the socket goes beside it.
        @param describe: gives the numbers.
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
        """Answer the client that has connected."""
        answer: InstanceStatus = {
            "version": VERSION,
            "program": __version__,
            "pid": os.getpid(),
            **self._describe(),
        }
        line = json.dumps(answer).encode() + b"\n"
        try:
            with self._listener.accept()[0] as asking:
                asking.setblocking(False)
                asking.send(line)  # it is a few hundred bytes: the kernel takes it whole
        except OSError:
            pass  # the client has gone

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
