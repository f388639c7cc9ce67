"""The proxy's own process: its errors, its end, its user."""

from __future__ import annotations

import errno
import os
import socket
from types import SimpleNamespace
from typing import Any, cast

from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.console import daemon
from acme_alpn_proxy.console.daemon import CallerWatch
from acme_alpn_proxy.errors import AlreadyRunning, StartError
from acme_alpn_proxy.host.pidfile import NoPIDFile
from acme_alpn_proxy.monitoring.statussocket import Holders
from acme_alpn_proxy.options import ConsoleOptions
from acme_alpn_proxy.program import Program

from ..memory import AlwaysSteers, MemoryReactor
from .report_case import ReportCase


class CallerWatchTests(SynchronousTestCase):
    """The end of C{run}."""

    def setUp(self) -> None:
        self.reactor = MemoryReactor()
        self.program = SimpleNamespace(ending=False, holders=Holders(self.end, AlwaysSteers()))
        self.ends = 0
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        self.watch = CallerWatch(self.reactor, cast(Program, self.program), theirs)
        self.watch.begin()

    def end(self) -> None:
        self.ends += 1

    def test_ends(self) -> None:
        """The end of C{run} stops the proxy, once."""
        self.assertTrue(verifyObject(IReadDescriptor, self.watch))
        self.assertEqual(self.reactor.getReaders(), [self.watch])
        self.assertGreater(self.watch.fileno(), 0)
        self.watch.doRead()
        self.assertEqual(self.ends, 1)
        self.assertEqual(self.reactor.getReaders(), [])

    def test_stops_already(self) -> None:
        """The end of C{run} does not hurry a proxy that already stops: it still serves its
        visitors."""
        self.program.ending = True
        self.watch.doRead()
        self.assertEqual(self.ends, 0)

    def test_reactor_ends(self) -> None:
        """It does not matter if the reactor ends first."""
        self.watch.connectionLost(Failure(CONNECTION_DONE))
        self.assertEqual((self.watch.logPrefix(), self.ends), ("caller watch", 0))


class DaemonTests(ReportCase):
    """How the daemon handles errors."""

    def daemon(self, problem: Exception | None = None) -> int:
        def serve(*args: object) -> None:
            if problem is not None:
                raise problem

        self.patch(daemon, "serve", serve)
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
        """If an instance runs already, the report says so."""
        self.assertEqual(self.daemon(AlreadyRunning(7, "/run/pid")), 1)
        told = self.told()
        self.assertEqual(told["error"][0], "already running as PID 7 (/run/pid)")
        self.assertEqual(told["running"], [7, "/run/pid"])

    def test_internal_error(self) -> None:
        """An internal error is one line, too, which names the log; the traceback is in the log."""
        with self.assertRaises(ZeroDivisionError):
            self.daemon(ZeroDivisionError("oh"))
        error, status = self.told()["error"]
        self.assertIn("internal error: ZeroDivisionError('oh'); see /var/log/", error)
        self.assertEqual(status, os.EX_SOFTWARE)

    def test_system_refuses(self) -> None:
        """If the kernel refuses something, the error says where to look; the traceback is in the
        log."""
        problem = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.assertEqual(self.daemon(problem), 1)
        error, status = self.told()["error"]
        self.assertRegex(
            error, r"^the kernel refused an operation: .*Too many open files; check .*ulimit -a"
        )
        self.assertEqual(status, os.EX_OSERR)
        self.assertEqual(len(self.flushLoggedErrors(OSError)), 1)


class OtherUserTests(SynchronousTestCase):
    """If the process may not become C{--uid} or C{--gid}, the start is refused before anything is
    applied."""

    def test_may(self) -> None:
        """A process with the capabilities may change the user; so may a process of that user."""
        self.patch(daemon, "has_capabilities", lambda *numbers: True)
        daemon._refuse_other_user(65_534, 65_534)
        self.patch(daemon, "has_capabilities", lambda *numbers: False)
        daemon._refuse_other_user(None, None)
        daemon._refuse_other_user(os.geteuid(), os.getegid())

    def test_may_not(self) -> None:
        """All others are refused."""
        self.patch(daemon, "has_capabilities", lambda *numbers: False)
        for wanted in ((65_534, None), (None, 65_534)):
            with self.assertRaisesRegex(
                StartError, "^no permission to change .*; run this as root"
            ) as no:
                daemon._refuse_other_user(*wanted)
            self.assertEqual(no.exception.status, os.EX_NOPERM)


PROGRAM: Any = SimpleNamespace(capabilities=(13,))


class BecomesOtherUserTests(SynchronousTestCase):
    """The service that drops the privileges."""

    def setUp(self) -> None:
        self.became: list[object] = []

    def start(self, uid: int | None, gid: int | None) -> list[object]:
        """The functions that it calls for these options, by name."""
        self.patch(daemon, "drop_privileges", lambda *ids: self.became.append(("drop", *ids)))
        self.patch(os, "setresgid", lambda *ids: self.became.append(("setresgid", *ids)))
        daemon._OtherUser(PROGRAM, uid, gid).privilegedStartService()
        return self.became

    def test_user(self) -> None:
        """With C{--uid} all privileges are given up."""
        self.assertEqual(self.start(1, 2), [("drop", 1, 2, (13,))])

    def test_root(self) -> None:
        """Root stays root, with options that say so and without any."""
        self.assertEqual(self.start(0, None) + self.start(None, None), [])

    def test_group(self) -> None:
        """C{--gid} alone changes the group."""
        self.assertEqual(self.start(None, 2), [("setresgid", 2, 2, 2)])

    def test_filter(self) -> None:
        """If a filter of system calls forbids it, the error is the same as in the other refusal."""

        def refuse(*ids: int | None) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        self.patch(daemon, "drop_privileges", refuse)
        with self.assertRaisesRegex(
            StartError, "^no permission to change to another user or group; run this"
        ):
            daemon._OtherUser(PROGRAM, 1, None).privilegedStartService()


class StartedTests(SynchronousTestCase):
    """The last service of the daemon to start."""

    def setUp(self) -> None:
        self.ends = 0

    def start(self, *, ending: bool, heard: bool) -> int:
        """How often C{started} was called, with the program in this state."""
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
        """The daemon continues if C{start} has received the report."""
        self.assertEqual(self.start(ending=False, heard=True), 1)
        self.assertEqual(self.ends, 0)

    def test_start_was_killed(self) -> None:
        """The daemon stops if C{start} has ended, since nobody would know about the proxy."""
        self.assertEqual(self.start(ending=False, heard=False), 1)
        self.assertEqual(self.ends, 1)

    def test_signalled_meanwhile(self) -> None:
        """The daemon does not report a start if a signal that ends it has come."""
        self.assertEqual(self.start(ending=True, heard=True), 0)
        self.assertEqual(self.ends, 0)
