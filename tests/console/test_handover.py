"""Both ends of the socket between C{start} and the daemon."""

from __future__ import annotations

import json
import os
import socket
import threading

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.console import handover
from acme_alpn_proxy.console.handover import DaemonDied, await_report
from acme_alpn_proxy.errors import AlreadyRunning, StartError

from .child_processes import assert_was_waited_for, stubborn_process
from .report_case import ReportCase


class ReportTests(ReportCase):
    def test_started(self) -> None:
        """C{start} receives the success and the warnings, and answers."""
        self.ours.sendall(b"1")
        self.report.lines.append("careful")
        self.assertTrue(self.report.started())
        self.assertEqual(self.told(), {"error": None, "running": None, "lines": ["careful"]})

    def test_waits(self) -> None:
        """During the start, C{start} is informed at once what the daemon waits for."""
        self.report({"log_format": "Waiting for {it}", "it": "the port", "is_waiting": True})
        self.assertEqual(self.told(), {"waiting": "Waiting for the port"})
        self.ours.close()
        self.report({"log_format": "Waiting", "is_waiting": True})
        self.assertEqual(self.report.lines, [])

    def test_nobody_listens(self) -> None:
        """If C{start} has ended, there is no answer, and a refusal reaches nobody."""
        self.ours.close()
        self.assertFalse(self.report.started())
        self.report.failed(StartError("no"))

    def test_process_left_behind(self) -> None:
        """A process that twistd leaves after a fork closes the socket."""
        self.after_fork_in_parent()
        self.assertEqual(self.ours.recv(1), b"")

    def test_forks_of_the_daemon(self) -> None:
        """After twistd's two forks it is the daemon, which keeps the socket when it forks for
        commands."""
        self.after_fork_in_child()
        self.after_fork_in_child()
        self.after_fork_in_parent()
        self.report.failed(StartError("no", os.EX_CONFIG))
        self.assertEqual(self.told(), {"error": ["no", os.EX_CONFIG], "running": None, "lines": []})
        self.ours.setblocking(False)
        with self.assertRaises(BlockingIOError):
            self.ours.recv(1)

    def test_keep(self) -> None:
        """The socket to C{run} stays open after C{run} has answered."""
        self.report.keep = True
        self.ours.sendall(b"1")
        self.assertTrue(self.report.started())
        self.told()
        self.ours.setblocking(False)
        with self.assertRaises(BlockingIOError):
            self.ours.recv(1)

    def test_keep_for_nobody(self) -> None:
        """If C{run} was killed in the meantime, the socket is closed."""
        self.report.keep = True
        self.ours.close()
        self.assertFalse(self.report.started())
        self.assertEqual(self.theirs.fileno(), -1)


class AwaitTests(SynchronousTestCase):
    """C{start}, which waits for the report."""

    def setUp(self) -> None:
        self.patch(handover, "RUNNER_DEADLINE", 0.1)
        self.process = stubborn_process(self)
        self.ours, self.theirs = socket.socketpair()
        self.addCleanup(self.ours.close)
        self.addCleanup(self.theirs.close)
        self.lines: list[str] = []
        self.waits: list[str] = []

    def wait(self, patience: float = 30.0) -> None:
        await_report(self.ours, self.process.pid, patience, self.lines.append, self.waits.append)

    def tell(self, **told: object) -> None:
        """Report as the daemon does."""
        line = json.dumps({"error": None, "running": None, "lines": [], **told})
        self.theirs.sendall(line.encode() + b"\n")

    def test_daemon_tells_nothing(self) -> None:
        """A daemon that does not report in time is killed."""
        with self.assertRaises(DaemonDied):
            self.wait(0.1)
        assert_was_waited_for(self, self.process)

    def test_daemon_died(self) -> None:
        """Twistd's first process is killed if the daemon has died before its report."""
        self.theirs.close()
        with self.assertRaises(DaemonDied):
            self.wait()
        assert_was_waited_for(self, self.process)

    def test_daemon_died_after_it_told(self) -> None:
        """A daemon that is killed before C{start} has answered counts as not started."""
        self.tell()
        self.theirs.close()
        with self.assertRaises(DaemonDied):
            self.wait()
        assert_was_waited_for(self, self.process)

    def test_nothing_is_kept(self) -> None:
        """Closing the socket ends the connection, even while the error is still referenced."""
        with self.assertRaises(DaemonDied) as died:
            self.wait(0.1)
        self.ours.close()
        self.theirs.settimeout(5)
        self.assertEqual(self.theirs.recv(1), b"")
        self.assertIsInstance(died.exception, DaemonDied)
        assert_was_waited_for(self, self.process)

    def test_process_in_between_hangs(self) -> None:
        """If twistd's parent process waits for ever, C{start} ends it after its success."""
        self.tell()
        self.wait()
        self.assertEqual(self.theirs.recv(1), b"1")
        assert_was_waited_for(self, self.process)

    def test_waits(self) -> None:
        """What the daemon waits for is reported at once, and does not count as the result."""
        self.theirs.sendall(json.dumps({"waiting": "for the port"}).encode() + b"\n")
        self.tell()
        self.wait()
        self.assertEqual((self.waits, self.lines), (["for the port"], []))
        assert_was_waited_for(self, self.process)

    def test_refusal_waits_for_the_end(self) -> None:
        """A daemon that could not start ends before its error is reported, with its status. If
        twistd's parent process would wait for ever, it is killed, too."""
        self.tell(error=("no", os.EX_CONFIG), lines=["warning: careful"])
        threading.Timer(0.1, self.theirs.close).start()
        with self.assertRaisesRegex(StartError, "no") as refusal:
            self.wait()
        self.assertEqual(refusal.exception.status, os.EX_CONFIG)
        self.assertEqual(self.theirs.fileno(), -1)
        self.assertEqual(self.lines, ["warning: careful"])
        assert_was_waited_for(self, self.process)

    def test_already_running(self) -> None:
        """If an instance already runs, the report has its PID and its PID file."""
        self.tell(error=("already running", 1), running=(7, "/run/pid"))
        self.theirs.close()
        with self.assertRaisesRegex(AlreadyRunning, r"^already running as PID 7 \(/run/pid\)$"):
            self.wait()
        assert_was_waited_for(self, self.process)
