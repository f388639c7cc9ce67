"""What a real process shows rarely: races and deadlines of the commands."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.console import cli
from acme_alpn_proxy.console import daemon
from acme_alpn_proxy.errors import AlreadyRunning, StartError
from acme_alpn_proxy.options import ConsoleOptions


class OwnerFile:
    """A PID file that tells its owners one after the other, the last for good."""

    path = "/nowhere/pid"

    def __init__(self, *owners: int | None) -> None:
        self._owners = list(owners)

    def owner(self) -> int | None:
        return self._owners.pop(0) if len(self._owners) > 1 else self._owners[0]

    def remove_of(self, pid: int) -> None:
        pass


class CommandCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.addCleanup(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        self.stderr = io.StringIO()
        self.patch(sys, "__stderr__", self.stderr)

    def options(self, *words: str) -> ConsoleOptions:
        options = ConsoleOptions()
        options.environment = {}
        options.parseOptions(["--redirect", "none", "--linger", "0", *words])
        return options

    def process(self) -> subprocess.Popen[bytes]:
        """One that SIGTERM does not end, and that has been told so by now."""
        line = "trap '' TERM; echo ready; read line"
        process = subprocess.Popen(
            ["sh", "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self.addCleanup(process.stdin.close)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        process.stdout.readline()
        return process

    def stop(self, pidfile: OwnerFile, *words: str) -> int:
        return cli.stop(self.options("stop", *words), pidfile)  # type: ignore[arg-type]


class StopTests(CommandCase):
    def test_ends_by_itself(self) -> None:
        """An instance that ends just when it is to be stopped has been stopped."""

        def gone(pid: int) -> int:
            raise ProcessLookupError

        self.patch(os, "pidfd_open", gone)
        self.assertEqual(self.stop(OwnerFile(7)), cli.DONE)

    def test_pid_of_another_program(self) -> None:
        """Should its PID have become another program's meanwhile, that one gets no signal."""
        sent: list[int] = []
        self.patch(signal, "pidfd_send_signal", lambda process, number: sent.append(number))
        self.assertEqual(self.stop(OwnerFile(os.getpid(), None)), cli.DONE)
        self.assertEqual(sent, [])

    def test_does_not_let_go(self) -> None:
        """An instance that keeps :443 past the deadline is told of, with where to look."""
        self.patch(cli, "STOP_DEADLINE", 0.1)
        pid = self.process().pid
        with self.assertRaisesRegex(StartError, f"PID {pid} has not let go .* its log says why"):
            self.stop(OwnerFile(pid))

    def test_does_not_end(self) -> None:
        """C{stop --wait} does not wait for ever either."""
        self.patch(cli, "STOP_DEADLINE", 0.1)
        pid = self.process().pid
        with self.assertRaisesRegex(
            StartError, f"PID {pid} still has live connections .*; wait on, .*: kill {pid}$"
        ) as refusal:
            self.stop(OwnerFile(pid, pid, None), "--wait", "--drain-timeout", "0")
        self.assertEqual(refusal.exception.status, os.EX_TEMPFAIL)


class ReportTests(CommandCase):
    def test_daemon_tells_nothing(self) -> None:
        """A daemon that does not tell in time is ended, and C{start} says that it failed."""
        self.patch(cli, "START_DEADLINE", 0.1)
        process = self.process()
        ours, theirs = socket.socketpair()
        with ours, theirs, self.assertRaisesRegex(StartError, "it died before it had started"):
            cli._await_report(self.options("start"), process.pid, ours)
        process.returncode = -signal.SIGKILL  # it was waited for
        with self.assertRaises(ProcessLookupError):
            os.kill(process.pid, 0)

    def test_process_in_between_hangs(self) -> None:
        """Should twistd's parent process wait for ever, C{start} ends it when it has succeeded."""
        self.patch(cli, "RUNNER_DEADLINE", 0.1)
        process = self.process()
        ours, theirs = socket.socketpair()
        self.tell(theirs, None)
        with ours, theirs:
            cli._await_report(self.options("start"), process.pid, ours)
            self.assertEqual(theirs.recv(1), b"1")
        process.returncode = -signal.SIGKILL  # it was waited for
        with self.assertRaises(ProcessLookupError):
            os.kill(process.pid, 0)

    def test_refusal_waits_for_the_end(self) -> None:
        """A daemon that could not start is let end before its error is told, with its status; and
        should twistd's parent process wait for ever, nothing is left of that either."""
        self.patch(cli, "RUNNER_DEADLINE", 0.1)
        process = self.process()
        ours, theirs = socket.socketpair()
        self.tell(theirs, ("no", os.EX_CONFIG), "warning: careful")
        threading.Timer(0.1, theirs.close).start()
        with ours, self.assertRaisesRegex(StartError, "no") as refusal:
            cli._await_report(self.options("start"), process.pid, ours)
        self.assertEqual(refusal.exception.status, os.EX_CONFIG)
        self.assertEqual(theirs.fileno(), -1)
        self.assertEqual(self.stderr.getvalue(), "acme-alpn-proxy: warning: careful\n")
        process.returncode = -signal.SIGKILL  # it was waited for
        with self.assertRaises(ProcessLookupError):
            os.kill(process.pid, 0)

    def tell(self, stream: socket.socket, error: tuple[str, int] | None, *lines: str) -> None:
        """As the daemon does."""
        told = {"error": error, "running": False, "lines": lines}
        stream.sendall(json.dumps(told).encode() + b"\n")


class StartTests(CommandCase):
    def test_child(self) -> None:
        """The child of C{start} becomes the daemon, and holds its own end of the socket alone."""
        made: list[socket.socket] = []
        pair = socket.socketpair
        self.patch(socket, "socketpair", lambda: made.extend(pair()) or tuple(made))
        self.patch(os, "fork", lambda: 0)
        reports: list[daemon.Report] = []
        self.patch(os, "register_at_fork", lambda **hooks: None)
        self.patch(daemon, "be_the_daemon", lambda *words: reports.append(words[2]) or 7)
        options = self.options("--logfile", os.devnull, "start")
        with self.assertRaises(SystemExit) as end:
            cli.start(options, OwnerFile(None))  # type: ignore[arg-type]
        self.addCleanup(made[1].close)
        self.assertEqual(end.exception.code, 7)
        self.assertIs(reports[0].stream, made[1])
        self.assertFalse(reports[0].keep)
        self.assertEqual(made[0].fileno(), -1)


class RunTests(CommandCase):
    """C{run}, with start and stop of another instance played by the PID file."""

    def run_true(self, *owners: int | None, words: tuple[str, ...] = ("--", "true")) -> int:
        ours, theirs = socket.socketpair()
        self.addCleanup(theirs.close)
        self.theirs = theirs
        self.patch(cli, "_start_in_background", lambda options, pidfile: ours)
        self.patch(cli, "clean_up", lambda options: self.cleaned.append(None))
        self.cleaned: list[None] = []
        return cli.run(self.options("run", *words), OwnerFile(*owners))  # type: ignore[arg-type]

    def test_was_stopped(self) -> None:
        """Somebody stopped the proxy meanwhile: C{run} says so, and what was left is removed."""
        self.assertEqual(self.run_true(7, None), 0)
        self.assertRegex(self.stderr.getvalue(), "the proxy has ended before the command did; see ")
        self.assertEqual(self.cleaned, [None])
        self.assertEqual(self.theirs.recv(1), b"")

    def test_another_instance(self) -> None:
        """Somebody started another one meanwhile: that one is left alone."""
        self.assertEqual(self.run_true(7, 8), 0)
        self.assertRegex(self.stderr.getvalue(), "the proxy has ended before the command did; see ")
        self.assertEqual(self.cleaned, [])

    def test_does_not_let_go(self) -> None:
        """A proxy that keeps :443 is an error even if the command succeeded."""
        self.patch(cli, "STOP_DEADLINE", 0.1)
        pid = self.process().pid
        self.assertEqual(self.run_true(pid), cli.FAILED)
        self.assertRegex(self.stderr.getvalue(), "has not let go")
        self.assertEqual(self.run_true(pid, words=("--", "sh", "-c", "exit 7")), 7)


class SharedRunTests(CommandCase):
    """C{run --shared}, with an instance played by a PID file."""

    def run_shared(self, *answers: dict[str, object]) -> str:
        """What the command is told to be its target."""

        def running(options: object, pidfile: object) -> None:
            raise AlreadyRunning("already running as PID 7")

        told: list[str] = []
        self.patch(cli, "_start_in_background", running)
        self.patch(cli, "instances", lambda path, owner: answers)
        self.patch(cli, "_run_command", lambda options, target: told.append(target))
        cli.run(self.options("run", "--shared", "--", "true"), OwnerFile(7))  # type: ignore[arg-type]
        return told[0]

    def test_target(self) -> None:
        """The command is told where that one has its ACME client, not one that drains beside it."""
        answers = [
            {"pid": pid, "state": "running", "routes": {"acme": {"target": f"10.0.0.{pid}:5001"}}}
            for pid in (6, 7)
        ]
        self.assertEqual(self.run_shared(*answers), "10.0.0.7:5001")

    def test_silent(self) -> None:
        """If that one does not answer, it is told what the options say."""
        self.assertEqual(self.run_shared({"pid": 7, "state": cli.SILENT}), "127.0.0.1:31443")


class Terminal(io.StringIO):
    """Standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


class Interrupted(Exception):
    """Somebody has seen enough."""


class WatchTests(CommandCase):
    def test_redraws(self) -> None:
        """On a terminal C{status --watch} wipes what it told before, every second."""
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                raise Interrupted

        terminal = Terminal()
        self.patch(sys, "stdout", terminal)
        self.patch(time, "sleep", pause)
        self.addCleanup(signal.signal, signal.SIGPIPE, signal.getsignal(signal.SIGPIPE))
        with self.assertRaises(Interrupted):
            cli.status(self.options("status", "--watch"), OwnerFile(None))  # type: ignore[arg-type]
        self.assertEqual(terminal.getvalue(), f"{cli.CLEAR}not running\n" * 2)
        self.assertEqual(pauses, [1.0, 1.0])


class FullDisk(io.StringIO):
    """Where nothing can be written."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class MainTests(CommandCase):
    def test_stdout_full(self) -> None:
        """What cannot be printed is one line and a status, not a traceback."""
        self.patch(sys, "stdout", FullDisk())
        self.assertEqual(cli.main(["--version"]), os.EX_OSERR)
        self.assertRegex(
            self.stderr.getvalue(), r"^acme-alpn-proxy: the system refuses: .*No space.*; look.*\n$"
        )

    def test_stderr_full(self) -> None:
        """With a full stderr the exit status is the same."""
        self.patch(sys, "__stderr__", FullDisk())
        self.assertEqual(cli.main(["restart"]), cli.WRONG_USAGE)

    def test_one_line(self) -> None:
        """Whatever is told is one line, even of what has more."""
        self.patch(ConsoleOptions, "environment", {"ACME_ALPN_PROXY_PIDFILE": "/no\nwhere/pid"})
        words = ["--logfile", "/no\nwhere/log", "start"]
        self.assertEqual(cli.main(words), os.EX_CANTCREAT)
        self.assertRegex(self.stderr.getvalue(), r"^[^\n]* /no where/log: No such file[^\n]*\n$")

    def test_unusable(self) -> None:
        """What an option asks for and is not there has a status of its own, and no usage to see."""
        self.assertEqual(cli.main(["--uid", "no-such", "start"]), os.EX_NOUSER)
        self.assertRegex(self.stderr.getvalue(), "^acme-alpn-proxy: --uid 'no-such': .*passwd\n$")

    def test_no_stderr(self) -> None:
        """With stderr closed nothing is said, and the exit status is the same."""
        self.patch(sys, "__stderr__", None)
        self.assertEqual(cli.main(["restart"]), cli.WRONG_USAGE)

    def test_sigint(self) -> None:
        """SIGINT ends a command at once; where it is ignored it stays so."""
        for before, after in (
            (signal.default_int_handler, signal.SIG_DFL),
            (signal.SIG_IGN, signal.SIG_IGN),
        ):
            signal.signal(signal.SIGINT, before)
            cli.main(["restart"])
            self.assertEqual(signal.getsignal(signal.SIGINT), after)

    def test_as_a_module(self) -> None:
        """C{python -m acme_alpn_proxy.console.cli} is the console script too."""
        done = subprocess.run(
            [sys.executable, "-m", "acme_alpn_proxy.console.cli", "--version"],
            capture_output=True,
            text=True,
            check=True,
        )
        self.assertRegex(done.stdout, r"^acme-alpn-proxy \d")
