"""The socket through which C{status} asks an instance, and through which C{run} keeps it running.

Every connection gets the status, one line. The client may then send lines of one word. The answer
is C{OK}, or C{ERR STATUS WHY} if the proxy cannot steer:

  - C{hold}: go on until this connection is closed, even if a C{leave} comes in between;
  - C{leave}: stop when nothing holds the instance;
  - C{keep}: forget an earlier C{leave}.

The client's side is L{acme_alpn_proxy.monitoring.status}.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from .. import __version__
from ..errors import StartError
from ..host.descriptors import ReadDescriptor
from ..host.unixlistener import UnixListener
from ..interfaces import ISteerable, Reactor
from .status import VERSION, DaemonStatus, InstanceStatus, remove_stale, socket_path

_LONGEST_REQUEST: Final = 64


class Holders:
    """The commands that hold an instance, and whether it stops when none of them is left."""

    def __init__(
        self,
        stop: Callable[[], None],
        proxy: ISteerable,
    ) -> None:
        """
        @param stop: called when the instance has to stop.
        @param proxy: must steer while something holds the instance.
        """
        self._stop = stop
        self._proxy = proxy
        self._holders: set[object] = set()
        self._leaving = False

    def __len__(self) -> int:
        return len(self._holders)

    def hold(self, holder: object) -> Deferred[None]:
        """Hold the instance until C{holder} is released; the Deferred fires when the proxy
        steers."""
        self._holders.add(holder)
        return self._proxy.need(holder)

    def release(self, holder: object) -> None:
        """C{holder} does not need it any more; no error if it never held it."""
        self._holders.discard(holder)
        self._proxy.needed_no_more(holder)
        self._look()

    def leave(self) -> None:
        """Stop as soon as nothing holds the instance, which may be now."""
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
    """The connection of one client."""

    log_prefix = "status client"

    def __init__(self, reactor: Reactor, stream: socket.socket, holders: Holders) -> None:
        self._reactor = reactor
        self._stream = stream
        self._holders = holders
        self._wishes: dict[bytes, Callable[[], Deferred[None] | None]] = {
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
                maybeDeferred(wish).addCallbacks(self._done, self._refused)
                return
        except OSError:
            pass
        self._reactor.removeReader(self)
        self._stream.close()
        self._holders.release(self)

    def _done(self, result: None) -> None:
        self._tell("OK")

    def _refused(self, failure: Failure) -> None:
        problem = failure.value
        assert isinstance(problem, StartError)
        self._tell(f"ERR {problem.status} {problem}")

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # the client has gone
            self._stream.send(f"{text}\n".encode())


class StatusService(Service):
    """Listens from its start, when the process still has its privileges, until the last connection
    has ended."""

    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        pidfile: str,
        describe: Callable[[], DaemonStatus],
        holders: Holders,
        options: Mapping[str, str],
    ) -> None:
        """
        @param pidfile: the path of the PID file; the socket is made next to it.
        @param describe: returns the numbers.
        @param options: the options of C{start}.
        """
        self._reactor = reactor
        self._pidfile = pidfile
        self._describe = describe
        self._holders = holders
        self._options = dict(options)

    def privilegedStartService(self) -> None:
        remove_stale(self._pidfile)
        path = socket_path(self._pidfile, os.getpid())
        listener = UnixListener(self._reactor, path, self._answer)
        try:
            listener.open()
        except OSError as problem:
            self._log.warn(
                "Cannot listen on {path}: {why}; 'status' will not know more than the PID",
                path=path,
                why=problem.strerror,
            )
            return
        # Close the socket at the reactor's end, not when this service stops: C{status} must show
        # live connections as long as they drain.
        self._reactor.addSystemEventTrigger("during", "shutdown", listener.close)

    def _answer(self, stream: socket.socket) -> None:
        answer: InstanceStatus = {
            "version": VERSION,
            "program": __version__,
            "pid": os.getpid(),
            "holders": len(self._holders),
            "options": self._options,
            **self._describe(),
        }
        try:
            stream.sendall(json.dumps(answer).encode() + b"\n")  # fits into the buffer
        except OSError:  # the client has gone
            stream.close()
        else:
            _Client(self._reactor, stream, self._holders)
