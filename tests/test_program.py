"""The proxy as the whole program: its signals."""

from __future__ import annotations

import signal
from typing import Any

from twisted.internet.error import ReactorNotRunning

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.program import Program

from .service_case import Live, ServiceCase


class ProgramTests(ServiceCase):
    """Signals."""

    def setUp(self) -> None:
        super().setUp()
        self.handlers: dict[int, Any] = {}
        self.before: dict[int, Any] = {}
        self.patch(signal, "signal", self.handlers.__setitem__)
        self.patch(signal, "getsignal", lambda number: self.before.get(number, signal.SIG_DFL))
        self.stops = 0
        self.patch(self.reactor, "stop", self.stop_reactor)
        self.program = Program(self.reactor, self.proxy)

    def stop_reactor(self) -> None:
        self.stops += 1

    def run_reactor(self) -> None:
        self.handlers.clear()
        self.reactor.running = True
        for call, args, kwargs in self.reactor.whenRunningHooks:
            call(*args, **kwargs)

    def test_taken_before_anything_is_applied(self) -> None:
        """The signals are taken before the first step, and again once the reactor runs."""
        taken: list[int] = []
        self.patch(self.pidfile, "claim", lambda: taken.extend(self.handlers))
        self.program.privilegedStartService()
        self.assertIn(signal.SIGTERM, taken)
        self.assertIn(signal.SIGINT, taken)
        self.run_reactor()
        self.assertIn(signal.SIGTERM, self.handlers)

    def test_stop_and_hurry(self) -> None:
        """The first signal stops the reactor, the second ends the wait."""
        self.program.privilegedStartService()
        self.run_reactor()
        self.handlers[signal.SIGINT](signal.SIGINT, None)
        self.assertEqual(self.stops, 1)
        Live(self.factory, self.story)
        stopped = self.program.stopService()
        self.handlers[signal.SIGTERM](signal.SIGTERM, None)
        self.assertEqual(self.stops, 1)
        self.assertIn("reset a connection", self.story)
        self.successResultOf(stopped)

    def test_signal_while_starting(self) -> None:
        """A signal before the reactor runs is not lost: it stops as soon as it runs."""
        self.program.privilegedStartService()
        self.handlers[signal.SIGTERM](signal.SIGTERM, None)
        self.assertTrue(self.program.ending)
        self.assertEqual(self.stops, 0)
        self.run_reactor()
        self.assertEqual(self.stops, 1)

    def test_reactor_stopped_by_somebody_else(self) -> None:
        """A signal while the reactor is already stopping is no error."""

        def stop() -> None:
            raise ReactorNotRunning

        self.patch(self.reactor, "stop", stop)
        self.program.privilegedStartService()
        self.run_reactor()
        self.handlers[signal.SIGTERM](signal.SIGTERM, None)
        self.assertTrue(self.program.ending)

    def test_others_are_ignored(self) -> None:
        """SIGHUP, SIGUSR1, SIGUSR2 and SIGPIPE do not end it; twistd's own handlers stay."""
        self.before[signal.SIGUSR1] = print
        self.program.privilegedStartService()
        for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGPIPE):
            self.assertEqual(self.handlers[number], signal.SIG_IGN)
        self.assertNotIn(signal.SIGUSR1, self.handlers)

    def test_refusal(self) -> None:
        """A refused start raises, after the remedy has been reported."""
        self.pidfile.problem = StartError("no")
        told: list[str] = []
        self.program.on_refusal = lambda problem: told.append(str(problem))
        with self.assertRaises(StartError):
            self.program.privilegedStartService()
        self.assertEqual(told, ["no"])

    def test_started(self) -> None:
        """It reports that the proxy steers, as the proxy itself does."""
        self.failureResultOf(self.program.when_started(), StartError)
        self.program.privilegedStartService()
        self.successResultOf(self.program.when_started())
