"""Both ends of the socket between C{start} and the daemon.

The daemon sends JSON objects, one on each line: if it has to wait, what it waits for (L{Waits}),
and then the result of its start (L{Told}). C{start} answers with one byte before it exits with 0.
So if C{start} is killed, no daemon keeps running unnoticed. And if the daemon dies before it has
sent the result, C{start} notices the end-of-file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Final, TypedDict

from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from zope.interface import implementer

from ..errors import AlreadyRunning, StartError
from ..host.handle import ProcessHandle

START_DEADLINE: Final = 120.0
"""Seconds to wait for the result of the start. Each command of the daemon has 15 s, and a dozen may
be slow; a healthy start takes a few tenths of a second."""

RUNNER_DEADLINE: Final = 2.0
"""Seconds for the process between C{start} and the daemon to end; normally a few milliseconds."""

_ACK_DEADLINE: Final = 5.0
"""Seconds for the answer of C{start}, which only waits for the result."""

_FORKS_OF_TWISTD: Final = 2
"""The number of forks after which the process is the daemon."""


class Told(TypedDict):
    """The result of the start.

    @ivar lines: further lines for the operator.
    @ivar error: the line and the exit status of a start that failed.
    @ivar running: if an instance that runs already is the reason, its PID and its PID file.
    """

    lines: list[str]
    error: tuple[str, int] | None
    running: tuple[int, str] | None


class Waits(TypedDict):
    """Sent by the daemon when it has to wait.

    @ivar waiting: what it waits for, and how long at most.
    """

    waiting: str


class DaemonDied(Exception):
    """The daemon ended before it had sent the result of its start, or before it got the answer."""


def await_report(
    stream: socket.socket,
    child: int,
    patience: float,
    tell: Callable[[str], None],
    waits: Callable[[str], None],
) -> None:
    """The last part of C{start}: wait for the report, and answer it.

    Raises L{StartError} if the report is an error, and L{DaemonDied}.

    @param child: the PID of twistd's first process, a child of this process; ended on return.
    @param patience: seconds to wait for the report.
    @param tell: called with each line for the operator.
    @param waits: called with each thing that the daemon waits for.
    """
    stream.settimeout(patience)
    with stream.makefile("rb") as reader:
        while True:
            try:
                line = reader.readline()
            except TimeoutError:
                line = b""
            if not line:
                raise _died(child)
            message = json.loads(line)
            if "waiting" not in message:
                break
            waits(message["waiting"])
        told: Told = message
        for text in told["lines"]:
            tell(text)
        if told["running"] is not None or told["error"] is not None:
            with contextlib.suppress(TimeoutError):
                reader.read()  # until the daemon ends, which also closes its listener
            _await_runner(child)
            if told["running"] is not None:
                raise AlreadyRunning(*told["running"])
            assert told["error"] is not None
            raise StartError(*told["error"])
        try:
            stream.sendall(b"1")
        except BrokenPipeError:  # it was killed right after its report
            raise _died(child) from None
        _await_runner(child)


def _died(child: int) -> DaemonDied:
    """After the daemon has died: kill twistd's first process, which might wait for ever."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return DaemonDied()


def _await_runner(child: int) -> None:
    """Wait for twistd's first process. It ends when the daemon allows it; if the daemon was killed,
    kill this process, too."""
    with ProcessHandle(child) as process:
        if not process.ended(RUNNER_DEADLINE):
            os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def tell_end(stream: socket.socket, problem: StartError) -> None:
    """Report to C{run} why the proxy has stopped by itself."""
    told: Told = {"lines": [], "error": (str(problem), problem.status), "running": None}
    with contextlib.suppress(OSError):
        stream.sendall(json.dumps(told).encode() + b"\n")


def reason_of_end(stream: socket.socket) -> StartError | None:
    """Why the proxy has stopped by itself; L{None} if it was stopped or killed."""
    stream.settimeout(_ACK_DEADLINE)
    try:
        line = stream.makefile("rb").readline()
    except OSError:
        return None
    error = json.loads(line)["error"] if line else None
    return None if error is None else StartError(*error)


@implementer(ILogObserver)
class Report:
    """The daemon's end of the socket."""

    def __init__(self, stream: socket.socket, *, keep: bool = False) -> None:
        """
        @param keep: leave the socket open after the start, since C{run} waits at its other end.
        """
        self.stream = stream
        self.keep = keep
        self.lines: list[str] = []
        self._told = False
        # Commands that run during the start inherit the socket (see L{BlockingCommands}). So an
        # end-of-file also means that no command can still change a rule.
        stream.set_inheritable(True)
        # When twistd's runner forks, the parent must not keep the socket open: an end-of-file means
        # that the daemon has died. The daemon itself forks, too, for its commands.
        self._forks_to_come = _FORKS_OF_TWISTD
        os.register_at_fork(after_in_parent=self._forget, after_in_child=self._count_fork)

    def started(self) -> bool:
        """Report that it steers. Return whether C{start} is still there and has answered."""
        try:
            self._tell(None)
            heard = self.stream.recv(1) != b""
        except OSError:
            heard = False
        if not (heard and self.keep):
            self.stream.close()
        return heard

    def failed(self, problem: StartError) -> None:
        """Report why the start failed. C{start} then waits for the end of this process."""
        with contextlib.suppress(OSError):
            self._tell(problem)

    def __call__(self, event: LogEvent) -> None:
        """The report is a log observer: C{start} prints warnings and events with C{for_operator},
        and shows events with C{is_waiting} while they last.
        """
        if self._told:
            return
        if event.get("is_waiting"):
            with contextlib.suppress(OSError):
                self._send({"waiting": formatEvent(event)})
        elif event.get("log_level") == LogLevel.warn:
            self.lines.append(f"warning: {formatEvent(event)}")
        elif event.get("for_operator"):
            self.lines.append(formatEvent(event))

    def _forget(self) -> None:
        if self._forks_to_come > 0:
            self.stream.close()

    def _count_fork(self) -> None:
        self._forks_to_come -= 1

    def _tell(self, problem: StartError | None) -> None:
        self._told = True
        told: Told = {
            "lines": self.lines,
            "error": None if problem is None else (str(problem), problem.status),
            "running": (problem.pid, problem.path) if isinstance(problem, AlreadyRunning) else None,
        }
        self._send(told)

    def _send(self, message: Told | Waits) -> None:
        self.stream.settimeout(_ACK_DEADLINE)
        self.stream.sendall(json.dumps(message).encode() + b"\n")
