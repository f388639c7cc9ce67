"""The commands of the console script: C{acme-alpn-proxy COMMAND}.

Only the commands that start the proxy import Twisted's reactor and twistd: the others do not need
them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from twisted.python.usage import UsageError

from ..addresses import parse_address
from ..errors import AlreadyRunning, StartError, refused_by_system
from ..host.handle import ProcessHandle
from ..host.pidfile import PIDFile
from ..host.returnpath import sweep
from ..host.unixsockets import remove_if_dead
from ..monitoring.status import (
    SILENT,
    VERSION,
    Answer,
    InstanceStatus,
    instances,
    remove_stale,
    request,
    socket_path,
)
from ..monitoring.status import ask as ask_instance
from ..options import DEFAULT_LOGFILE, PORT, ConsoleOptions, Unusable, of_the_proxy
from ..responder.client import ControlError, NotListening, ask, control_path
from ..wording import counted
from . import display
from .child import CannotRun, run_command
from .terminal import (
    Waiting,
    coloured,
    fill_standard_descriptors,
    is_terminal,
    nobody_reads,
    tell,
)
from .watch import WATCH_SECONDS, watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..diagnosis.finding import Finding

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
NOT_RUNNING: Final = 3
"""Exit status of C{status}, as for init scripts (LSB Core)."""

TRY_LATER: Final = os.EX_TEMPFAIL
"""75: exit status of C{run} if an instance runs already."""

TARGET_VARIABLES: Final = ("ACME_ALPN_PROXY_TARGET", "LEGO_TLS_ADDRESS")
"""Variables that tell the command of C{run} where the ACME client has to answer; lego reads the
second one since version 5."""

STOP_DEADLINE: Final = 30.0
"""Seconds for an instance to remove its redirect."""

ANSWER_DEADLINE: Final = 2.0
"""Seconds until a starting instance must answer; normally some tenths of a second."""

ANSWER_STEP: Final = 0.02


def run_command_line(argv: Sequence[str] | None = None) -> int:
    """Run the command in C{argv} and return its exit status."""
    fill_standard_descriptors()
    options = ConsoleOptions()
    try:
        options.parseOptions(sys.argv[1:] if argv is None else argv)
        return COMMANDS[options["command"]](options, PIDFile(options["pidfile"]))
    except UsageError as problem:
        text = str(problem).removeprefix("Parameter type enforcement failed: ")
        if isinstance(problem, Unusable):
            tell(text)
            return problem.status
        tell(f"{text} (see acme-alpn-proxy --help)")
        return WRONG_USAGE
    except AlreadyRunning as instance:
        tell(str(instance))
        return DONE
    except StartError as problem:
        tell(str(problem))
        return problem.status
    except ControlError as problem:
        tell(str(problem))
        return FAILED
    except BrokenPipeError:
        nobody_reads()
        return DONE
    except OSError as problem:
        refusal = refused_by_system(problem)
        tell(str(refusal))
        return refusal.status


def start(options: ConsoleOptions, pidfile: PIDFile) -> int:
    """Start the proxy; raises L{StartError}."""
    try:
        if options["nodaemon"]:
            from . import daemon

            _refuse_if_running(pidfile)
            daemon.serve(options, pidfile, lambda: True)
        else:
            _start_in_background(options, pidfile).close()
    except AlreadyRunning as instance:
        _refuse_other_options(options, pidfile, instance)
        if (connection := request(pidfile.path, instance.pid, "keep")) is not None:
            connection.close()
        raise
    return DONE


def run(options: ConsoleOptions, pidfile: PIDFile) -> int:
    """Steer while a command runs, and return its exit status; raises L{StartError}.

    The daemon waits at the other end of a socket of this process. However this process ends, the
    socket is closed, and the proxy stops steering.
    """
    from .handover import reason_of_end

    try:
        connection = _start_in_background(options, pidfile)
    except AlreadyRunning as instance:
        if options["shared"]:
            return _run_shared(options, pidfile, instance.pid)
        if _is_on_demand(pidfile):
            _refuse_other_options(options, pidfile, instance, chosen_only=True)
            return _run_shared(options, pidfile, instance.pid)
        tell(f"{instance}; to use that instance, add --shared, or wait until it ends")
        return TRY_LATER
    with connection:
        pid = pidfile.owner()
        status = _run_command(options, options["alpn"].host_and_port)
        owner = pidfile.owner()
        if owner is not None and owner == pid:
            answer = _answer_of(pidfile, pid) if is_terminal(sys.__stderr__) else None
            account = [] if answer is None else display.account(answer, time.time())
            try:
                stop(options, pidfile)
            except StartError as problem:
                tell(str(problem))
                return status or FAILED
            for line in account:
                tell(line)
        else:  # it was stopped or killed, or has stopped by itself
            reason = reason_of_end(connection)
            if owner is None:
                with suppress(StartError):  # "stop" will report what is wrong
                    clean_up(options)
            if reason is not None:
                tell(str(reason))
                return status or reason.status
            tell(
                "the proxy ended before the command, so later validations did not reach the ACME"
                f" client; see {options['logfile']}"
            )
    return status


def stop(options: ConsoleOptions, pidfile: PIDFile) -> int:
    """Make the running instance stop steering; raises L{StartError}."""
    pid = pidfile.owner()
    if pid is None:
        removed = clean_up(options)
        if options["wait"] and _await_drains(options, pidfile):
            return DONE
        also = [f"removed {counted(removed, 'rule')} of a killed instance"] if removed else []
        also += map(display.draining, _draining(pidfile))
        tell("; ".join(["no instance runs", *also]))
        return DONE
    try:
        with ProcessHandle(pid) as process:
            if pidfile.owner() == pid:  # if not, it may be another program's PID
                if _is_held(pidfile, pid):
                    return DONE
                process.send(signal.SIGTERM)
                _await_let_go(process, pidfile)
                pidfile.remove_of(pid)
                remove_if_dead(_control(options))  # it may lack the right to do it
                if options["wait"]:
                    _await_end(options, process, pidfile)
                if options["wait"] and options["command"] == "stop":
                    _await_drains(options, pidfile)
                if not process.ended(0):
                    return DONE
    except PermissionError:
        raise StartError(
            f"no permission to signal PID {pid}; run this as root", os.EX_NOPERM
        ) from None
    except ProcessLookupError:
        pass
    clean_up(options)  # it may have been killed in between
    return DONE


def status(options: ConsoleOptions, pidfile: PIDFile) -> int:
    """Show the instances that run or drain; raises L{StartError}."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly after "head -1"
    if options["watch"]:
        watch(lambda: _status(options, pidfile)[1])
    found, text = _status(options, pidfile)
    print(text, end="", flush=True)
    return DONE if found else NOT_RUNNING


def explain(options: ConsoleOptions, pidfile: PIDFile) -> int:
    """Show what was seen of the last validations; raises L{StartError}."""
    from ..diagnosis.check import document
    from ..diagnosis.explanation import explain_last_order
    from ..diagnosis.finding import Level, worst
    from ..proxy.identifiers import BadIdentifier

    try:
        findings = explain_last_order(options, instances(pidfile.path, pidfile.owner()))
    except BadIdentifier as problem:
        raise UsageError(f"explain: {problem}") from None
    try:
        print(
            document(findings) if options["json"] else "\n".join(map(_line, findings)), flush=True
        )
    except BrokenPipeError:
        nobody_reads()
    return FAILED if worst(findings) is Level.FAILED else DONE


def hook(options: ConsoleOptions, pidfile: PIDFile) -> int:
    """Handle a call of an ACME client's hook; raises L{ControlError} or L{StartError}."""
    from .hook import HOOKS, WrongWords

    client, *words = options["argv"] or [""]
    if client not in HOOKS:
        raise UsageError(f"hook: name the ACME client, one of {', '.join(HOOKS)}, not {client!r}")
    try:
        return HOOKS[client](words, lambda line: _ask_or_start(options, pidfile, line))
    except WrongWords as problem:
        raise UsageError(f"hook {client}: {problem}") from None


def _ask_or_start(options: ConsoleOptions, pidfile: PIDFile, line: str) -> str:
    """Ask the daemon. If none runs, start one that ends when nothing is pending any more."""
    path = _control(options)
    try:
        return ask(path, line)
    except NotListening:
        if not line.startswith("auth "):
            return ""  # no daemon runs, so nothing is pending
    options["on-demand"] = True
    options.check_responder("hook")
    try:
        _start_in_background(options, pidfile).close()
    except AlreadyRunning as instance:
        raise StartError(
            f"the running instance (PID {instance.pid}) has no control socket at {path}; stop it,"
            " or give the path of its socket with --control"
        ) from None
    try:
        return ask(path, line)
    finally:
        with suppress(ControlError):  # it may end before it has answered
            ask(path, "leave")


def _control(options: ConsoleOptions) -> str:
    """The path of the control socket."""
    return options["control"] or control_path(options["pidfile"])


def check(options: ConsoleOptions, pidfile: PIDFile) -> int:
    """Check whether the proxy would work here."""
    from ..diagnosis.check import check_this_host, document
    from ..diagnosis.finding import Level, summary, worst

    def show(text: str) -> None:
        waiting.clear()
        try:
            print(text, flush=True)
        except BrokenPipeError:  # go on: the probe must still stop steering
            nobody_reads()

    def tell_finding(finding: Finding) -> None:
        if not options["json"]:
            show(_line(finding))

    with Waiting() as waiting:
        findings = check_this_host(options, pidfile, tell_finding, waiting.show)
        show(document(findings) if options["json"] else summary(findings))
    return FAILED if worst(findings) is Level.FAILED else DONE


def _line(finding: Finding) -> str:
    level, name, rest = finding.parts()
    return f"{coloured(level, sys.stdout)} {name}{rest}"


def show_help(options: ConsoleOptions, pidfile: PIDFile) -> int:
    """Print the help, or that of one command."""
    from .help import help_text

    print(help_text(options["about"]), end="", flush=True)
    return DONE


def completion(options: ConsoleOptions, pidfile: PIDFile) -> int:
    """Print the completions for a shell."""
    from .completion import COMPLETIONS

    print(COMPLETIONS[options["about"]](), end="", flush=True)
    return DONE


def manual(options: ConsoleOptions, pidfile: PIDFile) -> int:
    """Show the man page; if the output is no terminal, or there is no man(1), print its source."""
    from .manual import manual

    if is_terminal(sys.stdout):
        page = os.memfd_create("manual")
        os.write(page, manual().encode())
        os.lseek(page, 0, os.SEEK_SET)
        os.dup2(page, 0)
        with suppress(FileNotFoundError):
            os.execvp("man", ["man", "-l", "-"])  # noqa: S606, S607
    print(manual(), end="", flush=True)
    return DONE


COMMANDS: Final[dict[str, Callable[[ConsoleOptions, PIDFile], int]]] = {
    "start": start,
    "stop": stop,
    "run": run,
    "status": status,
    "check": check,
    "explain": explain,
    "hook": hook,
    "help": show_help,
    "completion": completion,
    "manual": manual,
}


def clean_up(options: ConsoleOptions) -> int:
    """Remove what killed instances have left; raises L{StartError} if that fails.

    @return: the number of rules removed.
    """
    remove_stale(options["pidfile"])
    remove_if_dead(_control(options))
    removed = sweep()
    if options["redirect"] == "none":
        return removed
    from ..redirects.leftovers import Leftovers

    return removed + Leftovers(PORT, options["rulespec"], (4, 6)).clean_up()


def _await_let_go(process: ProcessHandle, pidfile: PIDFile) -> None:
    """Wait until the instance has removed its redirect and its PID file, or has ended."""
    for _ in range(int(STOP_DEADLINE / 0.02)):
        if pidfile.owner() != process.pid or process.ended(0.02):
            return
    raise StartError(
        f"PID {process.pid} has not stopped steering port 443 within {STOP_DEADLINE:g} s; see its"
        f" log (by default {DEFAULT_LOGFILE})"
    )


def _await_end(options: ConsoleOptions, process: ProcessHandle, pidfile: PIDFile) -> None:
    """Wait until a stopped instance has ended; on a terminal, show how many connections it waits
    for."""
    pid, seconds = process.pid, options["linger"] + options["drain-timeout"] + STOP_DEADLINE
    deadline = time.monotonic() + seconds
    with Waiting() as waiting:
        while (left := deadline - time.monotonic()) > 0:
            if waiting:
                waiting.show(display.drain(_ask(pidfile, pid), pid, time.time()))
            if process.ended(min(left, WATCH_SECONDS) if waiting else left):
                return
    raise StartError(
        f"PID {pid} still has open connections after {seconds:g} s; wait longer, or reset them"
        f" with: kill {pid}",
        os.EX_TEMPFAIL,
    )


def _draining(pidfile: PIDFile) -> list[InstanceStatus]:
    """The instances that were stopped earlier and still serve their last connections."""
    found = instances(pidfile.path, None)
    return [answer for answer in found if answer["state"] == "draining"]


def _await_drains(options: ConsoleOptions, pidfile: PIDFile) -> bool:
    """Wait for the instances that were stopped earlier; returns whether there were any."""
    found = _draining(pidfile)
    for answer in found:
        with suppress(ProcessLookupError), ProcessHandle(answer["pid"]) as process:
            _await_end(options, process, pidfile)
    return bool(found)


def _status(options: ConsoleOptions, pidfile: PIDFile) -> tuple[list[Answer], str]:
    """The answers that C{status} got, and the text that it prints."""
    found = instances(pidfile.path, pidfile.owner())
    if options["json"]:
        return found, json.dumps({"version": VERSION, "instances": found}) + "\n"
    return found, display.table(found, time.time())


def _ask(pidfile: PIDFile, pid: int) -> InstanceStatus | None:
    """The answer of an instance; L{None} if it does not answer."""
    try:
        return ask_instance(socket_path(pidfile.path, pid))
    except OSError:
        return None


def _answer_of(pidfile: PIDFile, pid: int) -> InstanceStatus | None:
    """The answer of the running instance, as soon as it answers; L{None} if it does not."""
    deadline = time.monotonic() + ANSWER_DEADLINE
    while pidfile.owner() == pid and time.monotonic() < deadline:
        if (answer := _ask(pidfile, pid)) is not None:
            return answer
        time.sleep(ANSWER_STEP)
    return None


def _refuse_other_options(
    options: ConsoleOptions,
    pidfile: PIDFile,
    instance: AlreadyRunning,
    *,
    chosen_only: bool = False,
) -> None:
    """Raise L{StartError} if the running instance was started with other options.

    @param chosen_only: compare only the options that do not have their default here.
    """
    unchosen = _defaults(options) if chosen_only else {}
    answer = _answer_of(pidfile, instance.pid)
    running = {} if answer is None else answer["options"]  # also empty for older releases
    differences = [
        f"{name} {running[name]} / {wanted}"
        for name, wanted in of_the_proxy(options).items()
        if running.get(name, wanted) != wanted and unchosen.get(name) != wanted
    ]
    if differences:
        raise StartError(
            f"already running as PID {instance.pid} ({instance.path}) with other options (running /"
            f" requested): {', '.join(differences)}; stop that instance first, or use its options",
            os.EX_TEMPFAIL,
        )


def _defaults(options: ConsoleOptions) -> Mapping[str, str]:
    """What the options are if the operator chooses none."""
    unchosen = ConsoleOptions()
    unchosen.environment = options.environment
    unchosen.parseOptions([options["command"], *["--", "true"] * (options["command"] == "run")])
    return of_the_proxy(unchosen)


def _refuse_if_running(pidfile: PIDFile) -> None:
    pid = pidfile.owner()
    if pid is not None:
        raise AlreadyRunning(pid, pidfile.path)


def _start_in_background(options: ConsoleOptions, pidfile: PIDFile) -> socket.socket:
    """Start the daemon; returns our end of a socket to it. For C{run}, both ends stay open."""
    from ..firewall.largetables import read_meanwhile

    _refuse_if_running(pidfile)
    with read_meanwhile():
        from ..monitoring.logs import make_log_file
        from . import daemon
        from .handover import START_DEADLINE, DaemonDied, Report, await_report

    make_log_file(options["logfile"])
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        ours.close()
        report = Report(theirs, keep=options["command"] == "run")
        raise SystemExit(daemon.be_the_daemon(options, pidfile, report))
    theirs.close()
    try:
        with Waiting() as waiting:
            patience = START_DEADLINE + options["linger"]
            await_report(ours, child, patience, waiting.tell, waiting.show)
    except DaemonDied:
        ours.close()
        with suppress(StartError):  # "stop" will report what is wrong
            clean_up(options)
        raise StartError(
            f"the proxy process ended during its start; see {options['logfile']}"
        ) from None
    except BaseException:
        ours.close()
        raise
    return ours


def _is_held(pidfile: PIDFile, pid: int) -> bool:
    """Whether commands of C{run} still use the instance. If so, make it stop when the last of them
    has ended."""
    answer = _answer_of_the_running(pidfile)
    if answer is None or answer["pid"] != pid or not answer["holders"]:
        return False
    connection = request(pidfile.path, pid, "leave")
    if connection is None:
        return False
    connection.close()
    tell(
        f"PID {pid} still steers for {counted(answer['holders'], 'command')} of 'run'; it stops"
        " when the last one has ended"
    )
    return True


def _run_shared(options: ConsoleOptions, pidfile: PIDFile, pid: int) -> int:
    """Run the command with the running instance, which goes on until the command has ended."""
    from .handover import START_DEADLINE

    target = _target_of_the_running(options, pidfile)
    connection = request(pidfile.path, pid, "hold", START_DEADLINE)
    try:
        return _run_command(options, target)
    finally:
        if connection is not None:
            connection.close()


def _answer_of_the_running(pidfile: PIDFile) -> InstanceStatus | None:
    """The status of the instance that holds the PID file."""
    owner = pidfile.owner()
    for answer in instances(pidfile.path, owner):
        if answer["pid"] == owner and answer["state"] != SILENT:
            return answer
    return None


def _is_on_demand(pidfile: PIDFile) -> bool:
    """Whether the running instance steers on demand, for each command that needs it."""
    answer = _answer_of_the_running(pidfile)
    return answer is not None and answer["on_demand"]


def _target_of_the_running(options: ConsoleOptions, pidfile: PIDFile) -> str:
    """The address of the running instance's ACME client."""
    answer = _answer_of_the_running(pidfile)
    if answer is None:
        return str(options["alpn"].host_and_port)
    return parse_address(answer["routes"]["acme"]["target"]).host_and_port


def _run_command(options: ConsoleOptions, target: str) -> int:
    """Run the command of C{run}; returns its exit status."""
    try:
        return run_command(options["argv"], dict.fromkeys(TARGET_VARIABLES, target))
    except CannotRun as problem:
        tell(str(problem))
        return problem.status
