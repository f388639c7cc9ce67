"""The daemon's report to C{start}."""

from __future__ import annotations

import errno
import json
import os
import socket
from types import SimpleNamespace
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.testing import MemoryReactor
from twisted.logger import LogLevel, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.console import daemon
from acme_alpn_proxy.errors import AlreadyRunning, StartError
from acme_alpn_proxy.options import ConsoleOptions
from acme_alpn_proxy.host.pidfile import NoPIDFile


class ReportCase(SynchronousTestCase):
    """A report, and what C{start} gets of it."""

    def setUp(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.addCleanup(self.ours.close)
        self.addCleanup(self.theirs.close)
        # A hook of a process's forks is there for good: those of the tests' own come to nothing.
        self.patch(os, "register_at_fork", self.remember)
        self.report = daemon.Report(self.theirs)

    def remember(self, *, after_in_parent: Any, after_in_child: Any) -> None:
        self.after_fork_in_parent = after_in_parent
        self.after_fork_in_child = after_in_child

    def told(self) -> Any:
        return json.loads(self.ours.makefile("rb").readline())


class ReportTests(ReportCase):
    def test_started(self) -> None:
        """C{start} hears that it went well, and what was warned of; it answers."""
        self.ours.sendall(b"1")
        self.report.lines.append("careful")
        self.assertTrue(self.report.started())
        self.assertEqual(self.told(), {"error": None, "running": False, "lines": ["careful"]})

    def test_nobody_listens(self) -> None:
        """A C{start} that is no more does not answer, and a refusal has nobody to go to."""
        self.ours.close()
        self.assertFalse(self.report.started())
        self.report.failed(StartError("no"))

    def test_process_left_behind(self) -> None:
        """A process that twistd leaves behind when it forks lets go of the socket."""
        self.after_fork_in_parent()
        self.assertEqual(self.ours.recv(1), b"")

    def test_forks_of_the_daemon(self) -> None:
        """Behind twistd's two forks it is the daemon, which forks for commands and keeps it."""
        self.after_fork_in_child()
        self.after_fork_in_child()
        self.after_fork_in_parent()
        self.report.failed(StartError("no", os.EX_CONFIG))
        self.assertEqual(
            self.told(), {"error": ["no", os.EX_CONFIG], "running": False, "lines": []}
        )
        self.ours.setblocking(False)
        with self.assertRaises(BlockingIOError):
            self.ours.recv(1)

    def test_leash(self) -> None:
        """To C{run} the socket stays open, once it has heard."""
        self.report.keep = True
        self.ours.sendall(b"1")
        self.assertTrue(self.report.started())
        self.told()
        self.ours.setblocking(False)
        with self.assertRaises(BlockingIOError):
            self.ours.recv(1)

    def test_leash_to_nobody(self) -> None:
        """If C{run} was killed meanwhile it is closed."""
        self.report.keep = True
        self.ours.close()
        self.assertFalse(self.report.started())
        self.assertEqual(self.theirs.fileno(), -1)


class LeashTests(SynchronousTestCase):
    """The end of C{run}."""

    def setUp(self) -> None:
        self.reactor = MemoryReactor()
        self.program = SimpleNamespace(ending=False, end=self.end)
        self.ends = 0
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        self.leash = daemon._Leash(self.reactor, self.program, theirs)  # type: ignore[arg-type]
        self.leash.hold()

    def end(self) -> None:
        self.ends += 1

    def test_ends(self) -> None:
        """It stops the proxy, once."""
        self.assertTrue(verifyObject(IReadDescriptor, self.leash))
        self.assertEqual(self.reactor.getReaders(), [self.leash])
        self.assertGreater(self.leash.fileno(), 0)
        self.leash.doRead()
        self.assertEqual(self.ends, 1)
        self.assertEqual(self.reactor.getReaders(), [])

    def test_stops_already(self) -> None:
        """It does not hurry a proxy that stops: its visitors are served on."""
        self.program.ending = True
        self.leash.doRead()
        self.assertEqual(self.ends, 0)

    def test_reactor_ends(self) -> None:
        """That the reactor ends first is no matter."""
        self.leash.connectionLost(Failure(CONNECTION_DONE))
        self.assertEqual((self.leash.logPrefix(), self.ends), ("leash", 0))


class DaemonTests(ReportCase):
    """What becomes of errors in the daemon."""

    def daemon(self, problem: Exception | None = None) -> int:
        def run(*args: object) -> None:
            if problem is not None:
                raise problem

        self.patch(daemon, "run", run)
        self.patch(daemon, "_drop_descriptors", lambda keep: None)
        self.addCleanup(globalLogPublisher.removeObserver, self.report)
        options = ConsoleOptions()
        options.environment = {}
        options.parseOptions(["start"])
        return daemon.be_the_daemon(options, NoPIDFile(), self.report)  # type: ignore[arg-type]

    def test_ends(self) -> None:
        """A daemon that was stopped in order exits 0."""
        self.assertEqual(self.daemon(), 0)

    def test_already_running(self) -> None:
        """That an instance runs already is told as such."""
        self.assertEqual(self.daemon(AlreadyRunning("as PID 7")), 1)
        told = self.told()
        self.assertEqual((told["error"][0], told["running"]), ("as PID 7", True))

    def test_internal_error(self) -> None:
        """A defect of ours is one line too, and names the log; the traceback goes there."""
        with self.assertRaises(ZeroDivisionError):
            self.daemon(ZeroDivisionError("oh"))
        error, status = self.told()["error"]
        self.assertIn("internal error: ZeroDivisionError('oh'); see /var/log/", error)
        self.assertEqual(status, os.EX_SOFTWARE)

    def test_system_refuses(self) -> None:
        """What the kernel refuses is told with where to look; the traceback goes to the log."""
        problem = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.assertEqual(self.daemon(problem), 1)
        error, status = self.told()["error"]
        self.assertRegex(error, r"^the system refuses: .*Too many open files; look .*ulimit -a")
        self.assertEqual(status, os.EX_OSERR)
        self.assertEqual(len(self.flushLoggedErrors(OSError)), 1)


class OtherUserTests(SynchronousTestCase):
    """Whether C{--uid} and C{--gid} can be had is known before anything is applied."""

    def test_may(self) -> None:
        """Who has the capabilities may, and so may who is that user already."""
        self.patch(daemon, "has_capabilities", lambda *numbers: True)
        daemon._refuse_other_user(65_534, 65_534)
        self.patch(daemon, "has_capabilities", lambda *numbers: False)
        daemon._refuse_other_user(None, None)
        daemon._refuse_other_user(os.geteuid(), os.getegid())

    def test_may_not(self) -> None:
        """All others are refused."""
        self.patch(daemon, "has_capabilities", lambda *numbers: False)
        for wanted in ((65_534, None), (None, 65_534)):
            with self.assertRaisesRegex(StartError, "^may not become .*; run this as root") as no:
                daemon._refuse_other_user(*wanted)
            self.assertEqual(no.exception.status, os.EX_NOPERM)


class StartedTests(SynchronousTestCase):
    """The last service of the daemon to start."""

    def setUp(self) -> None:
        self.ends = 0

    def start(self, *, ending: bool, heard: bool) -> int:
        """How often it was told, with the program in that state."""
        program = SimpleNamespace(ending=ending, end=self.end)
        told: list[None] = []

        def started() -> bool:
            told.append(None)
            return heard

        daemon._Started(program, started).startService()  # type: ignore[arg-type]
        return len(told)

    def end(self) -> None:
        self.ends += 1

    def test_heard(self) -> None:
        """It goes on when C{start} has heard."""
        self.assertEqual(self.start(ending=False, heard=True), 1)
        self.assertEqual(self.ends, 0)

    def test_start_was_killed(self) -> None:
        """It stops when C{start} is no more: nobody knows of it."""
        self.assertEqual(self.start(ending=False, heard=False), 1)
        self.assertEqual(self.ends, 1)

    def test_signalled_meanwhile(self) -> None:
        """It does not say that it steers when a signal has come that ends it."""
        self.assertEqual(self.start(ending=True, heard=True), 0)
        self.assertEqual(self.ends, 0)


class ServiceManagerTests(SynchronousTestCase):
    """What systemd is told."""

    def setUp(self) -> None:
        self.told: list[dict[str, object]] = []
        self.patch(daemon, "notify", lambda environment, **fields: self.told.append(fields))
        self.program = SimpleNamespace(ending=False)
        self.manager = daemon.ServiceManager(self.program, 1.5)  # type: ignore[arg-type]

    def test_start_and_stop(self) -> None:
        """It is told when the proxy steers, by which process, and how long a stop may take."""
        self.manager.startService()
        self.manager.stopService()
        self.assertEqual(
            self.told,
            [
                {"READY": 1, "MAINPID": os.getpid()},
                {"STOPPING": 1, "EXTEND_TIMEOUT_USEC": 1_500_000},
            ],
        )

    def test_signalled_meanwhile(self) -> None:
        """It is not told that the proxy is ready when a signal has come that ends it."""
        self.program.ending = True
        self.manager.startService()
        self.assertEqual(self.told, [])

    def log(self, namespace: str | None) -> None:
        event = {"log_level": LogLevel.info, "log_format": "Draining {count}", "count": 2}
        self.manager({**event, "log_namespace": namespace})

    def test_status(self) -> None:
        """What the service logs of itself is its status; what others log is not."""
        self.log(None)
        self.log("acme_alpn_proxy.proxy.protocols.ProxyServer")
        self.log("acme_alpn_proxy.service.ProxyService")
        self.assertEqual(self.told, [{"STATUS": "Draining 2"}])
