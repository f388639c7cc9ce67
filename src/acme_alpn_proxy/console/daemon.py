"""The proxy's own process: twistd's runner, in the foreground or as a daemon.

C{start} forks before there is a reactor. The child runs twistd's runner, which makes itself a
daemon. The result of the start is sent through a socket (L{acme_alpn_proxy.console.handover}).
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from twisted.application.service import Service
from twisted.logger import Logger, globalLogPublisher
from twisted.scripts.twistd import ServerOptions, runApp  # type: ignore[attr-defined]

from ..errors import StartError, refused_by_system
from ..host.descriptors import ReadDescriptor
from ..host.facts import has_capabilities
from ..host.pidfile import PIDFile
from ..host.privileges import drop_privileges
from ..interfaces import Reactor
from ..monitoring.logs import observer, open_log_file, reopen
from ..options import ConsoleOptions, of_the_proxy, responder_is_installed
from ..program import Program
from ..responder.client import control_path
from ..responder.control import load as load_responder
from ..tap import make_program
from ..transports.reactor import install
from .handover import Report, tell_end
from .startup import loading_done
from .systemd import ServiceManager

_LET_GO_DEADLINE: Final = 30.0
"""Seconds for removing the redirect, at a stop."""

_CAP_SETGID: Final = 6
_CAP_SETUID: Final = 7

_log = Logger()


def be_the_daemon(options: ConsoleOptions, pidfile: PIDFile, report: Report) -> int:
    """The child of C{start}, from here to the end of the process; returns its exit status."""
    _drop_descriptors(report.stream.fileno())
    globalLogPublisher.addObserver(report)
    try:
        serve(options, pidfile, report.started, report.stream if report.keep else None)
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
    """Close the caller's descriptors: a program that waits for a pipe's end-of-file must get it."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != keep:
            try:
                os.close(int(name))
            except OSError:
                pass  # the descriptor of this listing, closed by now


class _Started(Service):
    """The last service to start: when it starts, the proxy steers."""

    def __init__(self, program: Program, started: Callable[[], bool]) -> None:
        self._program = program
        self._started = started

    def startService(self) -> None:
        super().startService()
        if not self._program.ending and not self._started():
            self._program.end()


class CallerWatch(ReadDescriptor):
    """Stops the proxy when C{run}, at the other end of the socket, has ended for any reason."""

    log_prefix = "caller watch"
    _log = Logger()

    def __init__(self, reactor: Reactor, program: Program, stream: socket.socket) -> None:
        self._reactor = reactor
        self._program = program
        self._stream = stream

    def begin(self) -> None:
        """Start watching."""
        self._stream.set_inheritable(False)
        self._reactor.addReader(self)

    def fileno(self) -> int:
        return self._stream.fileno()

    def doRead(self) -> None:
        self._reactor.removeReader(self)
        self._stream.close()
        if not self._program.ending:
            self._log.info("Stopping: 'run' has ended")
            self._program.holders.leave()


@dataclass
class _Maker:
    """The plugin object that twistd expects."""

    program: Program
    tapname = "acme-alpn-proxy"

    def makeService(self, options: ConsoleOptions) -> Program:
        return self.program


class _OtherUser(Service):
    """Becomes the user of C{--uid} and the group of C{--gid}, after the services before it, which
    may need privileges, have started.

    twistd's own options are not used: twistd keeps the bounding set and does not set no_new_privs.
    """

    def __init__(self, program: Program, uid: int | None, gid: int | None) -> None:
        """
        @param program: keeps the capabilities that it needs.
        """
        self._program = program
        self._uid = uid
        self._gid = gid

    def privilegedStartService(self) -> None:
        try:
            if self._uid:
                drop_privileges(self._uid, self._gid, self._program.capabilities)
            elif self._gid is not None:
                os.setresgid(self._gid, self._gid, self._gid)
        except OSError:  # a filter of system calls forbids it
            raise _may_not_become_it() from None


def _refuse_other_user(uid: int | None, gid: int | None) -> None:
    """Raise L{StartError} if this process cannot become that user or group. Without this check it
    would fail later, when connections are already steered."""
    is_own = uid in (None, os.geteuid()) and gid in (None, os.getegid())
    if not is_own and not has_capabilities(_CAP_SETGID, _CAP_SETUID):
        raise _may_not_become_it()


def _may_not_become_it() -> StartError:
    return StartError(
        "no permission to change to another user or group; run this as root (in a container: with"
        " CAP_SETUID and CAP_SETGID), or leave out --uid and --gid",
        os.EX_NOPERM,
    )


def _load_responder() -> None:
    """Load the responder while its files can still be read. If that fails, only log it: visitors
    are served without the responder."""
    try:
        load_responder()
    except Exception as problem:  # cffi raises MemoryError under MemoryDenyWriteExecute=
        _log.warn(
            "Cannot load the responder: {why}. Hooks and the certbot plugin will not work; other"
            " ACME clients are not affected",
            why=str(problem),
        )


def serve(
    options: ConsoleOptions,
    pidfile: PIDFile,
    started: Callable[[], bool],
    caller: socket.socket | None = None,
) -> None:
    """Run the proxy in twistd's runner until it ends; raises L{StartError}.

    @param started: called when it steers; if it returns C{False}, the proxy stops again.
    @param caller: a socket to C{run}; once the proxy steers, an end-of-file on it stops the proxy.
    """
    _refuse_other_user(options["uid"], options["gid"])
    told = of_the_proxy(options)
    if options["control"] is None and responder_is_installed():
        options["control"] = control_path(pidfile.path)
    reactor = install()
    if options["uid"] and options["control"]:
        _load_responder()
    program = make_program(options, reactor, pidfile, told)
    if options["nodaemon"]:
        program.on_refusal = lambda problem: None  # the caller prints it

    def steers() -> bool:
        heard = started()
        if heard and caller is not None:
            CallerWatch(reactor, program, caller).begin()
        return heard

    _OtherUser(program, options["uid"], options["gid"]).setServiceParent(program)
    _Started(program, steers).setServiceParent(program)
    if options["nodaemon"]:
        patience = options["linger"] + options["drain-timeout"] + _LET_GO_DEADLINE
        manager = ServiceManager(reactor, program, patience)
        manager.setServiceParent(program)
        globalLogPublisher.addObserver(manager)
    config: Any = ServerOptions()
    config.parseOptions(["--pidfile=", "--rundir=/"])
    config["no_save"] = True
    config["nodaemon"] = bool(options["nodaemon"])
    stream: Any = sys.__stderr__
    if not options["nodaemon"]:
        stream = file = open_log_file(options["logfile"])
        signal.signal(signal.SIGUSR1, lambda *_: reactor.callFromThread(reopen, file))
    log = observer(stream, options["log-format"], options["log-level"])
    config["logger"] = lambda: log
    config.subCommand, config.subOptions = _Maker.tapname, options
    config.loadedPlugins = {_Maker.tapname: _Maker(program)}
    if caller is not None:
        program.on_loss = functools.partial(tell_end, caller)
    loading_done()
    runApp(config)
    if program.problem is not None:
        raise program.problem
