"""Running commands and waiting: blocking before the reactor runs, through the reactor afterwards.

Both ways return Deferreds, so the code that uses them is written only once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from zope.interface import implementer

from ..interfaces import CANNOT_RUN, KILLED, NOT_FOUND, ICommands, Reactor, Result

DEADLINE: Final = 15.0
"""Seconds a command may take: more than the 5 s for which iptables may wait for its lock."""


def _too_slow(argv: Sequence[str]) -> Result:
    """The result of a command that was killed at its deadline."""
    return Result(tuple(argv), KILLED, "", f"not finished after {DEADLINE:g} s")


@implementer(ICommands)
class BlockingCommands:
    """For the time before the reactor runs: each Deferred has already fired when it is returned."""

    def run(self, argv: Sequence[str]) -> Deferred[Result]:
        if shutil.which(argv[0]) is None:
            return succeed(Result.not_found(argv))
        try:
            done = subprocess.run(
                argv,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=DEADLINE,
                close_fds=False,  # the command keeps our inheritable sockets open until it ends
            )
        except subprocess.TimeoutExpired:
            return succeed(_too_slow(argv))
        except OSError as problem:
            code = NOT_FOUND if isinstance(problem, FileNotFoundError) else CANNOT_RUN
            return succeed(Result(tuple(argv), code, "", str(problem)))
        code = done.returncode if done.returncode >= 0 else KILLED
        return succeed(Result.of(argv, code, done.stdout, done.stderr))

    def pause(self, seconds: float) -> Deferred[None]:
        time.sleep(seconds)
        return succeed(None)


class _Collector(ProcessProtocol):
    """Collects a process's output and how it ends."""

    def __init__(self, argv: Sequence[str], clock: IReactorTime) -> None:
        self.ended: Deferred[Result] = Deferred()
        self._argv = argv
        self._output = b""
        self._errors = b""
        self._late = False
        self._deadline = clock.callLater(DEADLINE, self._kill)

    def _kill(self) -> None:
        self._late = True
        transport: Any = self.transport
        try:
            transport.signalProcess("KILL")
        except ProcessExitedAlready:
            pass
        transport.loseConnection()  # a process that it has started may hold its outputs open

    def outReceived(self, data: bytes) -> None:
        self._output += data

    def errReceived(self, data: bytes) -> None:
        self._errors += data

    def processEnded(self, reason: Failure) -> None:
        if self._late:
            self.ended.callback(_too_slow(self._argv))
            return
        self._deadline.cancel()
        code = 0
        if isinstance(reason.value, ProcessTerminated):
            code = KILLED if reason.value.signal is not None else reason.value.exitCode
        self.ended.callback(Result.of(self._argv, code, self._output, self._errors))


def _inheritable() -> list[int]:
    """The descriptors, besides the standard ones, that a child inherits."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            pass  # the descriptor of this listing, closed by now
    return found


@implementer(ICommands)
class SpawningCommands:
    """For a running reactor: nothing blocks it."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor

    def run(self, argv: Sequence[str]) -> Deferred[Result]:
        program = shutil.which(argv[0])
        if program is None:
            return succeed(Result.not_found(argv))
        collector = _Collector(argv, self._reactor)
        # As above, the command keeps our inheritable sockets open until it ends.
        descriptors = {0: "w", 1: "r", 2: "r"} | {each: each for each in _inheritable()}
        self._reactor.spawnProcess(collector, program, argv, env=None, childFDs=descriptors)
        return collector.ended

    def pause(self, seconds: float) -> Deferred[None]:
        return deferLater(self._reactor, seconds, lambda: None)


def commands_for(reactor: Reactor) -> BlockingCommands | SpawningCommands:
    """Blocking commands while the reactor does not run; after that, commands that it waits for."""
    return SpawningCommands(reactor) if reactor.running else BlockingCommands()
