"""The ordered start and stop, with a reactor in memory and a redirect that only records its
calls."""

from __future__ import annotations

import errno

from twisted.application.service import Service
from twisted.logger import formatEvent

from acme_alpn_proxy import service
from acme_alpn_proxy.errors import AlreadyRunning, StartError
from acme_alpn_proxy.host.processes import BlockingCommands, SpawningCommands, commands_for
from acme_alpn_proxy.host.tcpsockets import Handshake
from acme_alpn_proxy.proxy.listener import listening_socket

from .memory import log_of
from .service_case import ENDED, LET_GO, STARTED, Live, ServiceCase


class StartTests(ServiceCase):
    def test_order(self) -> None:
        """It listens before it steers, and steers when the call returns, while privileged."""
        self.proxy.privilegedStartService()
        self.told(*STARTED)
        self.proxy.startService()
        self.told()
        self.successResultOf(self.proxy.when_started())

    def test_start_alone(self) -> None:
        """C{startService} alone starts it too."""
        self.proxy.startService()
        self.told(*STARTED)
        self.assertTrue(self.proxy.running)

    def test_blocking_before_the_reactor_runs(self) -> None:
        """Commands block before the reactor runs, and do not block once it runs."""
        self.assertIsInstance(commands_for(self.reactor), BlockingCommands)
        self.reactor.running = True
        self.assertIsInstance(commands_for(self.reactor), SpawningCommands)

    def test_redirect_fails(self) -> None:
        """If it cannot steer the call raises why, and listener and PID file are gone."""
        self.redirect.problems["steer"] = StartError("no iptables")
        with self.assertRaisesRegex(StartError, "no iptables"):
            self.proxy.privilegedStartService()
        self.told(*STARTED, "close listener", "release PID file")
        with listening_socket("127.0.0.1", self.port):
            pass
        self.failureResultOf(self.proxy.when_started(), StartError)
        self.successResultOf(self.proxy.stopService())
        self.told()

    def test_refused_before_anything_is_touched(self) -> None:
        """If a start is known to fail, it is refused before the proxy listens."""
        self.redirect.problems["prepare"] = StartError("no kernel for this")
        with self.assertRaisesRegex(StartError, "no kernel"):
            self.proxy.privilegedStartService()
        self.told("claim PID file", "release PID file")

    def test_system_refuses(self) -> None:
        """After an unexpected exception, nothing is left either."""
        self.redirect.problems["prepare"] = OSError(errno.EMFILE, "Too many open files")
        with self.assertRaises(OSError):
            self.proxy.privilegedStartService()
        self.told("claim PID file", "release PID file")

    def test_can_be_started_after_a_failure(self) -> None:
        """After a failed start another attempt may succeed."""
        self.redirect.problems["steer"] = StartError("locked")
        with self.assertRaises(StartError):
            self.proxy.startService()
        self.story.clear()
        self.proxy.startService()
        self.told(*STARTED)

    def test_already_running(self) -> None:
        """If another instance has the PID file, nothing is touched, its file least of all."""
        self.pidfile.problem = AlreadyRunning(7, "/run/pid")
        with self.assertRaises(AlreadyRunning):
            self.proxy.privilegedStartService()
        self.told()

    def test_running_reactor(self) -> None:
        """If it is started while the reactor runs, it does not raise, and reports the result
        later."""
        self.reactor.running = True
        steering = self.redirect.hold("steer")
        self.proxy.startService()
        started = self.proxy.when_started()
        self.assertNoResult(started)
        steering.callback(None)
        self.successResultOf(started)

    def test_stop_while_starting(self) -> None:
        """A service that is stopped while it starts first completes the start, then stops."""
        self.reactor.running = True
        steering = self.redirect.hold("steer")
        self.proxy.startService()
        stopped = self.proxy.stopService()
        self.told(*STARTED)
        steering.callback(None)
        self.told(*LET_GO)
        self.linger()
        self.successResultOf(stopped)

    def test_fails_while_running(self) -> None:
        """If it fails while the reactor runs, that is reported, too, and a stop has nothing to
        do."""
        self.reactor.running = True
        steering = self.redirect.hold("steer")
        self.proxy.startService()
        started = self.proxy.when_started()
        stopped = self.proxy.stopService()
        steering.errback(StartError("no"))
        self.failureResultOf(started, StartError)
        self.successResultOf(stopped)
        self.told(*STARTED, "close listener", "release PID file")


class StopTests(ServiceCase):
    def setUp(self) -> None:
        super().setUp()
        self.proxy.startService()
        self.story.clear()

    def test_order(self) -> None:
        """Redirect, PID file, linger, listener, live connections, keeper; then it has stopped."""
        live = Live(self.factory, self.story)
        stopped = self.proxy.stopService()
        self.told(*LET_GO)
        self.linger(0.25)
        self.told()
        self.linger(0.25)
        self.told("close listener")
        self.assertNoResult(stopped)
        live.end()
        self.told(*ENDED)
        self.successResultOf(stopped)

    def test_handshakes_under_way(self) -> None:
        """A stop accepts visitors while a handshake that began before it is not complete, for 15 s
        at most; it does not wait for handshakes that begin later."""
        early = (("192.0.2.1", 443), ("192.0.2.9", 1))
        later = (("192.0.2.1", 443), ("192.0.2.9", 2))
        self.half_open = {early}
        self.proxy.stopService()
        self.half_open = {early, later}
        self.linger(4)
        self.told(*LET_GO)
        self.half_open = {later}
        self.linger(0.25)
        self.told("close listener", *ENDED)
        self.proxy.startService()
        self.half_open = {early}
        self.proxy.stopService()
        self.story.clear()
        self.linger(14.75)
        self.told()
        self.linger(0.25)
        self.told("close listener", *ENDED)

    def test_handshakes_unknown(self) -> None:
        """If the kernel does not report handshakes, it goes on accepting for the whole linger."""

        def unknown(*ports: int) -> set[Handshake]:
            raise OSError(errno.ENOENT, "no inet_diag")

        self.patch(service, "half_open", unknown)
        self.proxy.stopService()
        self.story.clear()
        self.linger(14.75)
        self.told()
        self.linger(0.25)
        self.told("close listener", *ENDED)

    def test_drain_timeout(self) -> None:
        """Connections that live on are reset after the drain timeout."""
        Live(self.factory, self.story)
        stopped = self.proxy.stopService()
        self.linger()
        self.story.clear()
        self.reactor.advance(179)
        self.told()
        self.reactor.advance(1)
        self.told("reset a connection", *ENDED)
        self.successResultOf(stopped)

    def test_drain_is_told(self) -> None:
        """While connections drain, their number is reported when it changes, at most once a
        second."""
        events = log_of(self)

        def told() -> list[tuple[str, str]]:
            self.assertEqual([e for e in events if not e.get("is_status")], [], "systemd's line")
            said = [(event["log_level"].name, formatEvent(event)) for event in events]
            events.clear()
            return said

        visitors = [Live(self.factory, self.story) for _ in range(5)]
        self.proxy.stopService()
        visitors.pop().end()
        told()
        self.linger()
        self.assertEqual(told(), [("info", "Waiting for 4 open connections to end")])
        visitors.pop().end()
        visitors.pop().end()
        self.assertEqual(told(), [])
        self.reactor.pump([1, 1, 1])
        self.assertEqual(told(), [("debug", "Waiting for 2 open connections to end")])
        while visitors:
            visitors.pop().end()
        self.assertEqual(told(), [("info", "Stopped: all connections have ended")])
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_end_wait_while_draining(self) -> None:
        """After C{end_wait}, it resets the live connections and ends; the log says how many."""
        events = log_of(self)
        Live(self.factory, self.story)
        stopped = self.proxy.stopService()
        self.linger()
        self.story.clear()
        again = self.proxy.stopService()
        self.told("reset a connection", *ENDED)
        self.successResultOf(stopped)
        self.successResultOf(again)
        expected = "Stopped: 1 connection was reset, all others have ended"
        self.assertEqual(formatEvent(events[-1]), expected)

    def test_end_wait_while_lingering(self) -> None:
        """C{end_wait} during the linger ends the linger, too."""
        stopped = self.proxy.stopService()
        self.story.clear()
        self.proxy.end_wait()
        self.told("close listener", *ENDED)
        self.successResultOf(stopped)

    def test_end_wait_while_letting_go(self) -> None:
        """C{end_wait} during the removal of the redirect skips the linger and resets the
        connections that are left."""
        letting_go = self.redirect.hold("let go")
        stopped = self.proxy.stopService()
        self.proxy.end_wait()
        Live(self.factory, self.story)
        letting_go.callback(None)
        self.told(*LET_GO, "close listener", "reset a connection", *ENDED)
        self.successResultOf(stopped)

    def test_again(self) -> None:
        """It can be started again after a stop."""
        stopped = self.proxy.stopService()
        self.linger()
        self.successResultOf(stopped)
        self.story.clear()
        self.proxy.startService()
        self.told(*STARTED)

    def test_never_started(self) -> None:
        """A stop without a start is harmless."""
        self.successResultOf(self.make_proxy().stopService())
        self.told()


class Beside(Service):
    """A service beside the proxy."""

    def __init__(self, story: list[str], problem: Exception | None = None) -> None:
        self._story = story
        self._problem = problem

    def privilegedStartService(self) -> None:
        if self._problem is not None:
            raise self._problem

    def startService(self) -> None:
        super().startService()
        self._story.append("start beside")

    def stopService(self) -> None:
        super().stopService()
        self._story.append("stop beside")


class BesideTests(ServiceCase):
    """A service that runs beside the proxy, as its metrics do."""

    def test_order(self) -> None:
        """It starts before any visitor is steered, and stops when none is steered any more."""
        proxy = self.make_proxy(Beside(self.story))
        proxy.privilegedStartService()
        proxy.startService()
        self.told("claim PID file", "start beside", "listen", "steer")
        proxy.stopService()
        self.told("let go", "stop beside", "release PID file")

    def test_cannot_start(self) -> None:
        """If it cannot start, no visitor is steered, and nothing is left."""
        proxy = self.make_proxy(Beside(self.story, StartError("port taken")))
        with self.assertRaisesRegex(StartError, "port taken"):
            proxy.privilegedStartService()
        self.told("claim PID file", "release PID file")

    def test_redirect_fails(self) -> None:
        """It is stopped if the proxy cannot steer."""
        self.redirect.problems["steer"] = StartError("locked")
        proxy = self.make_proxy(Beside(self.story))
        with self.assertRaisesRegex(StartError, "locked"):
            proxy.privilegedStartService()
        self.told(
            *("claim PID file", "start beside", "listen", "steer"),
            *("close listener", "stop beside", "release PID file"),
        )
