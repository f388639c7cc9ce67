"""Races and deadlines of the commands, which a real process shows only rarely."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.__main__ import main
from acme_alpn_proxy.console import cli, daemon, startup
from acme_alpn_proxy.console.handover import Report
from acme_alpn_proxy.diagnosis import check
from acme_alpn_proxy.diagnosis.finding import Finding, Level
from acme_alpn_proxy.diagnosis.probe import Tell
from acme_alpn_proxy.errors import AlreadyRunning, StartError
from acme_alpn_proxy.monitoring.status import SILENT, InstanceStatus
from acme_alpn_proxy.options import ConsoleOptions, of_the_proxy

from ..monitoring.descriptions import answer_of, describe
from .child_processes import assert_was_waited_for, stubborn_process


class OwnerFile:
    """A PID file that reports its owners one after the other, and then always the last one."""

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

    def stop(self, pidfile: OwnerFile, *words: str) -> int:
        return cli.stop(self.options("stop", *words), pidfile)  # type: ignore[arg-type]


class StopTests(CommandCase):
    def test_ends_by_itself(self) -> None:
        """An instance that ends just before C{stop} signals it counts as stopped."""

        def gone(pid: int) -> int:
            raise ProcessLookupError

        self.patch(os, "pidfd_open", gone)
        self.assertEqual(self.stop(OwnerFile(7)), cli.DONE)

    def test_pid_of_another_program(self) -> None:
        """If another program now has its PID, that program gets no signal."""
        sent: list[int] = []
        self.patch(signal, "pidfd_send_signal", lambda process, number: sent.append(number))
        self.assertEqual(self.stop(OwnerFile(os.getpid(), None)), cli.DONE)
        self.assertEqual(sent, [])

    def test_does_not_let_go(self) -> None:
        """If an instance keeps :443 past the deadline, the error says so and where to look."""
        self.patch(cli, "STOP_DEADLINE", 0.1)
        pid = stubborn_process(self).pid
        with self.assertRaisesRegex(
            StartError, f"PID {pid} has not stopped steering .*; see its log"
        ):
            self.stop(OwnerFile(pid))

    def test_does_not_end(self) -> None:
        """C{stop --wait} does not wait for ever either."""
        self.patch(cli, "STOP_DEADLINE", 0.1)
        pid = stubborn_process(self).pid
        with self.assertRaisesRegex(
            StartError, f"PID {pid} still has open connections .*; wait longer, .*: kill {pid}$"
        ) as refusal:
            self.stop(OwnerFile(pid, pid, None), "--wait", "--drain-timeout", "0")
        self.assertEqual(refusal.exception.status, os.EX_TEMPFAIL)


class StartTests(CommandCase):
    def test_child(self) -> None:
        """The child of C{start} becomes the daemon, and holds only its own end of the socket."""
        made = socket.socketpair()
        self.patch(socket, "socketpair", lambda: made)
        self.patch(os, "fork", lambda: 0)
        reports: list[Report] = []
        self.patch(os, "register_at_fork", lambda **hooks: None)

        def be_the_daemon(options: object, pidfile: object, report: Report) -> int:
            reports.append(report)
            return 7

        self.patch(daemon, "be_the_daemon", be_the_daemon)
        options = self.options("--logfile", os.devnull, "start")
        with self.assertRaises(SystemExit) as end:
            cli.start(options, OwnerFile(None))  # type: ignore[arg-type]
        self.addCleanup(made[1].close)
        self.assertEqual(end.exception.code, 7)
        self.assertIs(reports[0].stream, made[1])
        self.assertFalse(reports[0].keep)
        self.assertEqual(made[0].fileno(), -1)

    def test_died(self) -> None:
        """If a daemon dies before its report, its leftovers are removed and C{start} says so."""
        cleaned: list[None] = []
        self.patch(cli, "clean_up", lambda options: cleaned.append(None))
        process = stubborn_process(self)
        self.patch(os, "fork", lambda: process.pid)
        options = self.options("--logfile", os.devnull, "start")
        with self.assertRaisesRegex(
            StartError, f"^the proxy process ended during its start; see {os.devnull}$"
        ) as refusal:
            cli.start(options, OwnerFile(None))  # type: ignore[arg-type]
        self.assertEqual((refusal.exception.status, cleaned), (1, [None]))
        assert_was_waited_for(self, process)


class RunTests(CommandCase):
    """C{run}; the PID file plays the start and stop of another instance."""

    def run_true(self, *owners: int | None, words: tuple[str, ...] = ("--", "true")) -> int:
        ours, theirs = socket.socketpair()
        self.addCleanup(theirs.close)
        self.theirs = theirs
        self.patch(cli, "_start_in_background", lambda options, pidfile: ours)
        self.patch(cli, "clean_up", lambda options: self.cleaned.append(None))
        self.cleaned: list[None] = []
        return cli.run(self.options("run", *words), OwnerFile(*owners))  # type: ignore[arg-type]

    def test_was_stopped(self) -> None:
        """If the proxy was stopped while C{run} waited, C{run} says so and removes what was
        left."""
        self.assertEqual(self.run_true(7, None), 0)
        self.assertRegex(self.stderr.getvalue(), "the proxy ended before the command, .*; see ")
        self.assertEqual(self.cleaned, [None])
        self.assertEqual(self.theirs.recv(1), b"")

    def test_another_instance(self) -> None:
        """If another instance was started in the meantime, it is not touched."""
        self.assertEqual(self.run_true(7, 8), 0)
        self.assertRegex(self.stderr.getvalue(), "the proxy ended before the command, .*; see ")
        self.assertEqual(self.cleaned, [])

    def test_does_not_let_go(self) -> None:
        """A proxy that keeps :443 is an error even if the command succeeded."""
        self.patch(cli, "STOP_DEADLINE", 0.1)
        pid = stubborn_process(self).pid
        self.assertEqual(self.run_true(pid), cli.FAILED)
        self.assertRegex(self.stderr.getvalue(), "has not stopped steering")
        self.assertEqual(self.run_true(pid, words=("--", "sh", "-c", "exit 7")), 7)


class SharedRunTests(CommandCase):
    """C{run --shared}; a PID file plays the instance."""

    def run_shared(self, *answers: Mapping[str, object]) -> str:
        """The target that the command sees in its environment."""

        def running(options: object, pidfile: object) -> None:
            raise AlreadyRunning(7, "/nowhere/pid")

        told: list[str] = []
        self.patch(cli, "_start_in_background", running)
        self.patch(cli, "instances", lambda path, owner: answers)
        self.patch(cli, "_run_command", lambda options, target: told.append(target))
        cli.run(self.options("run", "--shared", "--", "true"), OwnerFile(7))  # type: ignore[arg-type]
        return told[0]

    def test_target(self) -> None:
        """The command sees the ACME target of the running instance, not of a draining one."""
        answers = [
            {"pid": pid, "state": "running", "routes": {"acme": {"target": f"10.0.0.{pid}:5001"}}}
            for pid in (6, 7)
        ]
        self.assertEqual(self.run_shared(*answers), "10.0.0.7:5001")

    def test_silent(self) -> None:
        """If that instance does not answer, the command sees the target of the options."""
        self.assertEqual(self.run_shared({"pid": 7, "state": SILENT}), "127.0.0.1:31443")


class Interrupted(Exception):
    """The reader of the output has closed it."""


class WatchTests(CommandCase):
    def test_again(self) -> None:
        """C{status --watch} asks again each time."""
        drawn: list[str] = []

        def watch(draw: Callable[[], str]) -> None:
            drawn.extend(draw() for _ in range(2))
            raise Interrupted

        self.patch(cli, "watch", watch)
        self.addCleanup(signal.signal, signal.SIGPIPE, signal.getsignal(signal.SIGPIPE))
        with self.assertRaises(Interrupted):
            cli.status(self.options("status", "--watch"), OwnerFile(None))  # type: ignore[arg-type]
        self.assertEqual(drawn, ["no instance runs\n"] * 2)


class OtherOptionsTests(CommandCase):
    """C{start}, while an instance runs that was started with certain options."""

    def start(self, answer: InstanceStatus | None, *words: str) -> str:
        """How it ends: the words of the error."""
        self.kept: list[str] = []
        options = self.options("--logfile", os.devnull, *words, "start")
        self.patch(cli, "ask_instance", lambda path: answer)
        self.patch(cli, "ANSWER_DEADLINE", 0.05)
        self.patch(cli, "request", lambda path, pid, word: self.kept.append(word))
        with self.assertRaises(StartError) as ended:
            cli.start(options, OwnerFile(7))  # type: ignore[arg-type]
        self.refusal = ended.exception
        return str(ended.exception)

    def answer(self, *words: str) -> InstanceStatus:
        """The status of an instance that was started with these words."""
        options = of_the_proxy(self.options("--logfile", os.devnull, *words, "start"))
        return {**answer_of(describe()), "options": options}

    def test_same(self) -> None:
        """With the same options, it is no error that an instance already runs; it goes on."""
        said = self.start(self.answer("--linger", "1"), "--linger", "1.0", "-n")
        self.assertEqual(said, "already running as PID 7 (/nowhere/pid)")
        self.assertIsInstance(self.refusal, AlreadyRunning)
        self.assertEqual(self.kept, ["keep"])

    def test_other(self) -> None:
        """With other options, the start is refused, and the message lists the differences."""
        said = self.start(self.answer("--force"), "-alpn", "127.0.0.1:5001")
        self.assertEqual(
            said,
            "already running as PID 7 (/nowhere/pid) with other options (running / requested):"
            " --alpn 127.0.0.1:31443 / 127.0.0.1:5001, --force on / off; stop that instance first,"
            " or use its options",
        )
        self.assertEqual((self.refusal.status, self.kept), (os.EX_TEMPFAIL, []))

    def test_unknown(self) -> None:
        """An instance that does not report its options, such as one of an older release, counts as
        one with the same options."""
        older = self.answer()
        older["options"] = {}
        for answer in (None, older):
            self.start(answer, "--force")
            self.assertIsInstance(self.refusal, AlreadyRunning)


class CheckTests(CommandCase):
    """The output of C{check}."""

    def check(self, *findings: Finding, words: tuple[str, ...] = ()) -> tuple[int, str]:
        """The exit status and the output of C{check} for these findings."""

        def look(options: object, pidfile: object, tell: Tell, doing: object) -> list[Finding]:
            for finding in findings:
                tell(finding)
            return list(findings)

        self.patch(check, "check_this_host", look)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = cli.check(self.options("check", *words), OwnerFile(None))  # type: ignore[arg-type]
        return status, output.getvalue()

    def test_lines(self) -> None:
        """C{check} prints a line for each finding and a last line for all, and has an exit
        status."""
        finding = Finding("port", Level.WARNING, "it is so", "do this")
        self.assertEqual(
            self.check(finding),
            (
                cli.DONE,
                "warning port: it is so; do this\n"
                "It would work here, but there are warnings: 1 of 1 checks.\n",
            ),
        )
        self.assertEqual(self.check(Finding("port", Level.FAILED))[0], cli.FAILED)

    def test_json(self) -> None:
        """C{--json} prints one document and nothing else."""
        status, output = self.check(Finding("port", Level.FAILED), words=("--json",))
        self.assertEqual((status, json.loads(output)["verdict"]), (cli.FAILED, "failed"))


class FullDisk(io.StringIO):
    """A stream to which nothing can be written."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class MainTests(CommandCase):
    def test_stdout_full(self) -> None:
        """If the output cannot be written, that is one line and a status, not a traceback."""
        self.patch(sys, "stdout", FullDisk())
        self.assertEqual(cli.run_command_line(["--version"]), os.EX_OSERR)
        self.assertRegex(
            self.stderr.getvalue(),
            r"^acme-alpn-proxy: the kernel refused an operation: .*No space.*; check.*\n$",
        )

    def test_stderr_full(self) -> None:
        """With a full stderr the exit status is the same."""
        self.patch(sys, "__stderr__", FullDisk())
        self.assertEqual(cli.run_command_line(["restart"]), cli.WRONG_USAGE)

    def test_one_line(self) -> None:
        """A message is printed on one line, even if its text has several."""
        self.patch(ConsoleOptions, "environment", {"ACME_ALPN_PROXY_PIDFILE": "/no\nwhere/pid"})
        words = ["--logfile", "/no\nwhere/log", "start"]
        self.assertEqual(cli.run_command_line(words), os.EX_CANTCREAT)
        self.assertRegex(self.stderr.getvalue(), r"^[^\n]* /no where/log: No such file[^\n]*\n$")

    def test_unusable(self) -> None:
        """If an option needs something that is missing, the status says so, and no usage is
        printed."""
        self.assertEqual(cli.run_command_line(["--uid", "no-such", "start"]), os.EX_NOUSER)
        self.assertRegex(self.stderr.getvalue(), "^acme-alpn-proxy: --uid 'no-such': .*passwd\n$")

    def test_no_stderr(self) -> None:
        """With stderr closed nothing is said, and the exit status is the same."""
        self.patch(sys, "__stderr__", None)
        self.assertEqual(cli.run_command_line(["restart"]), cli.WRONG_USAGE)

    def test_sigint(self) -> None:
        """SIGINT ends a command at once; if it is ignored, it stays ignored."""
        self.patch(startup, "load_lightly", lambda: None)
        for before, after in (
            (signal.default_int_handler, signal.SIG_DFL),
            (signal.SIG_IGN, signal.SIG_IGN),
        ):
            signal.signal(signal.SIGINT, before)
            with self.assertRaises(SystemExit):
                main(["restart"])
            self.assertEqual(signal.getsignal(signal.SIGINT), after)
