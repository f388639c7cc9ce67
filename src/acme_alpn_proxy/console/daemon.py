"""Launching twistd's own runner for the console script, in the foreground or as a daemon.

C{start} forks before anything of the reactor is there. The child runs twistd's runner, which
daemonizes; what becomes of it is told through a socket, so that the caller hears errors whole, and
hears at once if the daemon dies before it can tell.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import (
    ILogObserver,
    LogEvent,
    Logger,
    LogLevel,
    formatEvent,
    globalLogPublisher,
)
from twisted.python.failure import Failure
from twisted.scripts.twistd import ServerOptions, runApp  # type: ignore[attr-defined]
from zope.interface import implementer

from ..errors import AlreadyRunning, StartError, refused_by_system
from ..host.facts import has_capabilities
from .startup import loaded
from ..monitoring.logs import observer, open_log_file, reopen
from .systemd import notify
from ..options import ConsoleOptions
from ..host.pidfile import PIDFile
from ..program import Program
from ..tap import make_program

_ACK_DEADLINE: Final = 5.0
"""Seconds for C{start}, which does nothing but wait, to answer."""

_LET_GO_DEADLINE: Final = 30.0
"""Seconds for the redirect to go, at a stop."""

_CAP_SETGID: Final = 6
_CAP_SETUID: Final = 7

_FORKS_OF_TWISTD: Final = 2
"""After these it is the daemon that runs."""

_log = Logger()


@implementer(ILogObserver)
class Report:
    """The daemon's end of the socket to C{start}: how it went, in one JSON object on one line.

    Its fields: C{error}, the one line and the exit status, or null; C{running}, whether that is
    because an instance runs already; C{lines}, what else the operator is to read. C{start} answers
    with a byte before it exits 0, so that a C{start} that was killed leaves nothing running that
    nobody knows of.
    """

    def __init__(self, stream: socket.socket, *, keep: bool = False) -> None:
        """
        @param keep: leave the socket open when it has started: C{run} stays at its other end.
        """
        self.stream = stream
        self.keep = keep
        self.lines: list[str] = []
        self._told = False
        # The commands that run meanwhile do hold it (see L{BlockingCommands}): its end-of-file then
        # also says that none of them is about to change a rule.
        stream.set_inheritable(True)
        # The processes that twistd's runner leaves behind must not hold the socket open: its
        # end-of-file says that the daemon has died. The daemon itself forks for its commands.
        self._forks_to_come = _FORKS_OF_TWISTD
        os.register_at_fork(after_in_parent=self._forget, after_in_child=self._go_on)

    def started(self) -> bool:
        """Tell that it steers. Whether C{start} is there and has heard."""
        try:
            self._tell(None)
            heard = self.stream.recv(1) != b""
        except OSError:
            heard = False
        if not (heard and self.keep):
            self.stream.close()
        return heard

    def failed(self, problem: StartError) -> None:
        """Tell why it could not start. C{start} then waits for the end of this process."""
        with contextlib.suppress(OSError):
            self._tell(problem)

    def __call__(self, event: LogEvent) -> None:
        """As a log observer: C{start} prints warnings, and what is C{for_operator}."""
        if self._told:
            return
        if event.get("log_level") == LogLevel.warn:
            self.lines.append(f"warning: {formatEvent(event)}")
        elif event.get("for_operator"):
            self.lines.append(formatEvent(event))

    def _forget(self) -> None:
        if self._forks_to_come > 0:
            self.stream.close()

    def _go_on(self) -> None:
        self._forks_to_come -= 1

    def _tell(self, problem: StartError | None) -> None:
        self._told = True
        error = None if problem is None else (str(problem), problem.status)
        running = isinstance(problem, AlreadyRunning)
        told = {"error": error, "running": running, "lines": self.lines}
        self.stream.settimeout(_ACK_DEADLINE)
        self.stream.sendall(json.dumps(told).encode() + b"\n")


def be_the_daemon(options: ConsoleOptions, pidfile: PIDFile, report: Report) -> int:
    """The child of C{start}: from here on to the end of the process; gives its exit status."""
    _drop_descriptors(report.stream.fileno())
    globalLogPublisher.addObserver(report)
    try:
        run(options, pidfile, report.started, report.stream if report.keep else None)
    except StartError as problem:
        report.failed(problem)
        return 1
    except OSError as problem:
        _log.failure("Cannot start")
        report.failed(refused_by_system(problem))
        return 1
    except Exception as problem:
        report.failed(
            StartError(f"internal error: {problem!r}; see {options['logfile']}", os.EX_SOFTWARE)
        )
        raise
    return 0


def _drop_descriptors(keep: int) -> None:
    """Hold nothing of the caller's: who waits for the end-of-file of a pipe must get it."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != keep:
            try:
                os.close(int(name))
            except OSError:
                pass  # the listing's own


class _Started(Service):
    """Starts last: the proxy steers by then."""

    def __init__(self, program: Program, started: Callable[[], bool]) -> None:
        self._program = program
        self._started = started

    def startService(self) -> None:
        super().startService()
        if not self._program.ending and not self._started():
            self._program.end()


@implementer(IReadDescriptor)
class _Leash:
    """The socket to C{run}, which closes when that ends, by whatever end: then the proxy stops."""

    _log = Logger()

    def __init__(self, reactor: Any, program: Program, stream: socket.socket) -> None:
        self._reactor = reactor
        self._program = program
        self._stream = stream

    def hold(self) -> None:
        self._stream.set_inheritable(False)
        self._reactor.addReader(self)

    def fileno(self) -> int:
        return self._stream.fileno()

    def doRead(self) -> None:
        self._reactor.removeReader(self)
        self._stream.close()
        if not self._program.ending:
            self._log.info("Stopping: 'run' has ended")
            self._program.end()

    def connectionLost(self, reason: Failure) -> None:
        """Part of L{IReadDescriptor}: the reactor ends with all its descriptors."""

    def logPrefix(self) -> str:
        return "leash"


@implementer(ILogObserver)
class ServiceManager(Service):
    """Tells systemd, if it has started this process, when it steers, when it stops, and what it
    does meanwhile. Starts last, and so stops first.

    @param patience: seconds that a stop may take. systemd is told, so that its own deadline need
        not know of the drain's.
    """

    def __init__(self, program: Program, patience: float) -> None:
        self._program = program
        self._patience = patience

    def startService(self) -> None:
        super().startService()
        if not self._program.ending:
            notify(os.environ, READY=1, MAINPID=os.getpid())

    def stopService(self) -> None:
        super().stopService()
        notify(os.environ, STOPPING=1, EXTEND_TIMEOUT_USEC=int(self._patience * 1e6))

    def __call__(self, event: LogEvent) -> None:
        """As a log observer: what the service says of itself is its status."""
        if str(event.get("log_namespace")).startswith(f"{__package__}.service."):
            notify(os.environ, STATUS=formatEvent(event))


@dataclass
class _Maker:
    """What twistd takes for a plugin."""

    program: Program
    tapname = "acme-alpn-proxy"

    def makeService(self, options: ConsoleOptions) -> Program:
        return self.program


def _refuse_other_user(uid: int | None, gid: int | None) -> None:
    """Unless this process can become it: twistd would end it only when connections are steered."""
    is_own = uid in (None, os.geteuid()) and gid in (None, os.getegid())
    if not is_own and not has_capabilities(_CAP_SETGID, _CAP_SETUID):
        raise StartError(
            "may not become another user or group; run this as root, with CAP_SETUID and CAP_SETGID"
            " where it runs in a container, or without --uid and --gid",
            os.EX_NOPERM,
        )


def run(
    options: ConsoleOptions,
    pidfile: PIDFile,
    started: Callable[[], bool],
    leash: socket.socket | None = None,
) -> None:
    """Run the proxy by twistd's runner until it ends; raises L{StartError}.

    @param started: is called when it steers; if it says no, the proxy stops again.
    @param leash: once it steers, its end-of-file stops it.
    """
    from ..transports.reactor import install  # which exists on Linux only

    _refuse_other_user(options["uid"], options["gid"])
    reactor = install()
    program = make_program(options, reactor, pidfile)
    if options["nodaemon"]:
        program.on_refusal = lambda problem: None  # the caller prints it

    def steers() -> bool:
        heard = started()
        if heard and leash is not None:
            _Leash(reactor, program, leash).hold()
        return heard

    _Started(program, steers).setServiceParent(program)
    if options["nodaemon"]:
        patience = options["linger"] + options["drain-timeout"] + _LET_GO_DEADLINE
        manager = ServiceManager(program, patience)
        manager.setServiceParent(program)
        globalLogPublisher.addObserver(manager)
    config: Any = ServerOptions()
    config.parseOptions(["--pidfile=", "--rundir=/"])
    config["no_save"] = True
    config["nodaemon"] = bool(options["nodaemon"])
    config["uid"], config["gid"] = options["uid"], options["gid"]
    stream: Any = sys.__stderr__
    if not options["nodaemon"]:
        stream = file = open_log_file(options["logfile"])
        signal.signal(signal.SIGUSR1, lambda *_: reactor.callFromThread(reopen, file))
    log = observer(stream, options["log-format"], options["log-level"])
    config["logger"] = lambda: log
    config.subCommand, config.subOptions = _Maker.tapname, options
    config.loadedPlugins = {_Maker.tapname: _Maker(program)}
    loaded()
    runApp(config)
