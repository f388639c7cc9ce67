"""The ordered start and stop, on a reactor in memory and a redirect that only takes notes."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

from twisted.application.service import Application, IService, IServiceCollection, Service
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import LogEvent, formatEvent, globalLogPublisher
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from acme_alpn_proxy import service, tap
from acme_alpn_proxy.host.processes import BlockingCommands, SpawningCommands, commands_for
from acme_alpn_proxy.errors import AlreadyRunning, StartError
from acme_alpn_proxy.interfaces import ICommands, IPIDFile, IRedirect
from acme_alpn_proxy.program import Program
from acme_alpn_proxy.proxy.protocols import ProxyServerFactory
from acme_alpn_proxy.proxy.routing import Route, Routing
from acme_alpn_proxy.service import ProxyService, listening_socket


class Reactor(MemoryReactorClock):
    """In memory; what it adopts it remembers, and it never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.story: list[str] = []
        self.accepted = 0

    def callWhenRunning(self, call: Any, *args: Any, **kwargs: Any) -> None:
        if self.running:
            call(*args, **kwargs)
        else:
            self.whenRunningHooks.append((call, args, kwargs))

    def adoptStreamPort(self, descriptor: int, family: int, factory: Any) -> Any:
        self.story.append("listen")
        return Port(self.story)

    def adoptStreamConnection(self, descriptor: int, family: int, factory: Any) -> None:
        self.accepted += 1


class Port:
    """A listening port."""

    def __init__(self, story: list[str]) -> None:
        self._story = story

    def stopListening(self) -> Deferred[None]:
        self._story.append("close listener")
        return succeed(None)


@implementer(IRedirect)
class NotingRedirect:
    """Takes notes; fails when told to; fires when told to."""

    def __init__(self, story: list[str]) -> None:
        self._story = story
        self.hosts: tuple[str, ...] = ("127.0.0.1",)
        self.problems: dict[str, Exception] = {}
        self.pending: dict[str, Deferred[None]] = {}
        self.commands: list[object] = []

    def _step(self, name: str, commands: object) -> Deferred[None]:
        self._story.append(name)
        self.commands.append(commands)
        if name in self.problems:
            return fail(self.problems.pop(name))
        return self.pending.get(name) or succeed(None)

    def prepare(self, commands: ICommands) -> Deferred[Sequence[str]]:
        if "prepare" in self.problems:
            return fail(self.problems.pop("prepare"))
        return succeed(self.hosts)

    def look_after(self, commands: ICommands) -> Deferred[None]:
        return self._step("look", commands)

    def apply(self, commands: ICommands, listeners: Sequence[socket.socket]) -> Deferred[None]:
        assert all(listener.getsockname()[0] in self.hosts for listener in listeners)
        assert listeners
        return self._step("steer", commands)

    def remove(self, commands: ICommands) -> Deferred[None]:
        return self._step("let go", commands)

    def release(self, commands: ICommands) -> Deferred[None]:
        return self._step("release keeper", commands)


@implementer(IPIDFile)
class NotingPIDFile:
    def __init__(self, story: list[str]) -> None:
        self._story = story
        self.problem: Exception | None = None

    def claim(self) -> None:
        if self.problem is not None:
            raise self.problem
        self._story.append("claim PID file")

    def release(self) -> None:
        self._story.append("release PID file")


class Live:
    """A live connection."""

    def __init__(self, factory: ProxyServerFactory, story: list[str]) -> None:
        self._factory = factory
        self._story = story
        factory.live.enter(self)

    def abort(self) -> None:
        self._story.append("reset a connection")
        self._factory.live.leave(self)

    def end(self) -> None:
        self._factory.live.leave(self)


STARTED = ["claim PID file", "listen", "steer"]
LET_GO = ["let go", "release PID file"]
ENDED = ["release keeper"]


class ServiceCase(SynchronousTestCase):
    """A proxy service whose every step is noted in C{story}."""

    def setUp(self) -> None:
        self.reactor = Reactor()
        self.story = self.reactor.story
        self.redirect = NotingRedirect(self.story)
        self.pidfile = NotingPIDFile(self.story)
        self.factory = ProxyServerFactory(
            Routing(Route("acme", ""), Route("fallback", "")), {}, self.reactor
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.proxy = self.make_proxy()

    def make_proxy(self) -> ProxyService:
        proxy = ProxyService(
            self.reactor, self.factory, self.redirect, self.pidfile, port=self.port
        )
        self.addCleanup(proxy.listener.abandon)
        return proxy

    def told(self, *steps: str) -> None:
        """These steps were taken since the last look, in this order."""
        self.assertEqual(self.story, list(steps))
        self.story.clear()


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
        """Before the reactor runs commands block, once it runs nothing does."""
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
        """What can be known to go wrong is refused before it listens."""
        self.redirect.problems["prepare"] = StartError("no kernel for this")
        with self.assertRaisesRegex(StartError, "no kernel"):
            self.proxy.privilegedStartService()
        self.told("claim PID file", "release PID file")

    def test_system_refuses(self) -> None:
        """What nobody has expected leaves nothing behind either."""
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
        self.pidfile.problem = AlreadyRunning("already running as PID 7")
        with self.assertRaises(AlreadyRunning):
            self.proxy.privilegedStartService()
        self.told()

    def test_port_taken(self) -> None:
        """A port that stays taken is tried until linger and 2 s have passed, then refused."""
        pauses: list[float] = []

        class Commands(BlockingCommands):
            def pause(self, seconds: float) -> Deferred[None]:
                pauses.append(seconds)
                return succeed(None)

        self.patch(service, "commands_for", lambda reactor: Commands())
        with (
            listening_socket("127.0.0.1", self.port),
            self.assertRaisesRegex(StartError, f"port {self.port} is taken.*ss -ltnp"),
        ):
            self.proxy.startService()
        self.assertTrue(4.9 < sum(pauses) < 5.1)
        self.told("claim PID file", "release PID file")

    def test_port_becomes_free(self) -> None:
        """A port that its last owner gives up meanwhile is taken, and only then is it steered."""
        owner = listening_socket("127.0.0.1", self.port)
        story = self.story

        class Commands(BlockingCommands):
            def pause(self, seconds: float) -> Deferred[None]:
                story.append("wait")
                owner.close()
                return succeed(None)

        self.patch(service, "commands_for", lambda reactor: Commands())
        self.proxy.startService()
        self.told("claim PID file", "wait", "listen", "steer")

    def test_address_not_here(self) -> None:
        """An address that this host has not is left out; if none is left it cannot start."""
        self.redirect.hosts = ("127.0.0.1", "2001:db8::1")
        proxy = self.make_proxy()
        proxy.startService()
        self.assertEqual(len(proxy.listener.sockets), 1)
        self.redirect.hosts = ("2001:db8::1",)
        with self.assertRaisesRegex(StartError, "cannot listen"):
            self.make_proxy().startService()

    def test_running_reactor(self) -> None:
        """Started while the reactor runs it does not raise, and tells later how it went."""
        self.reactor.running = True
        self.redirect.pending["steer"] = steering = Deferred()
        self.proxy.startService()
        started = self.proxy.when_started()
        self.assertNoResult(started)
        steering.callback(None)
        self.successResultOf(started)

    def test_stop_while_starting(self) -> None:
        """Stopped while it starts, it first gets to the end of that, then stops in order."""
        self.reactor.running = True
        self.redirect.pending["steer"] = steering = Deferred()
        self.proxy.startService()
        stopped = self.proxy.stopService()
        self.told(*STARTED)
        steering.callback(None)
        self.told(*LET_GO)
        self.reactor.advance(3)
        self.successResultOf(stopped)

    def test_fails_while_running(self) -> None:
        """Should it fail while the reactor runs, that is told too, and a stop has nothing to do."""
        self.reactor.running = True
        self.redirect.pending["steer"] = steering = Deferred()
        self.proxy.startService()
        started = self.proxy.when_started()
        stopped = self.proxy.stopService()
        steering.errback(StartError("no"))
        self.failureResultOf(started, StartError)
        self.successResultOf(stopped)
        self.told(*STARTED, "close listener", "release PID file")


class WatchTests(ServiceCase):
    """While it steers it sees to it that the redirect stays."""

    def setUp(self) -> None:
        super().setUp()
        self.proxy.startService()
        self.story.clear()

    def test_looks_every_few_seconds(self) -> None:
        """It looks every three seconds, so that what others wiped is back within five."""
        self.reactor.advance(2.9)
        self.told()
        self.reactor.pump([0.2, 3, 3])
        self.told("look", "look", "look")

    def test_failure(self) -> None:
        """If it cannot put it back that is logged, and tried again."""
        lines: list[str] = []

        def observer(event: LogEvent) -> None:
            lines.append(formatEvent(event))

        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.redirect.problems["look"] = StartError("not root any more")
        self.reactor.pump([3, 3])
        self.told("look", "look")
        self.assertEqual(lines, ["Cannot steer any more: not root any more"])

    def test_defect(self) -> None:
        """Should a look raise what it must not, the watch ends, and a stop is in order all the
        same."""
        self.redirect.problems["look"] = ValueError("unforeseen")
        self.reactor.pump([3, 3])
        self.proxy.stopService()
        self.told("look", *LET_GO)
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)

    def test_stop_waits_for_a_look(self) -> None:
        """A stop lets a look under way come to its end, and is followed by none."""
        self.redirect.pending["look"] = looking = Deferred()
        self.reactor.advance(3)
        self.proxy.stopService()
        self.told("look")
        looking.callback(None)
        self.told(*LET_GO)
        self.reactor.advance(10)
        self.assertNotIn("look", self.story)


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
        self.reactor.advance(2.9)
        self.told()
        self.reactor.advance(0.2)
        self.told("close listener")
        self.assertNoResult(stopped)
        live.end()
        self.told(*ENDED)
        self.successResultOf(stopped)

    def test_drain_timeout(self) -> None:
        """Connections that live on are reset after the drain timeout."""
        Live(self.factory, self.story)
        stopped = self.proxy.stopService()
        self.reactor.advance(3)
        self.story.clear()
        self.reactor.advance(179)
        self.told()
        self.reactor.advance(1)
        self.told("reset a connection", *ENDED)
        self.successResultOf(stopped)

    def test_drain_is_told(self) -> None:
        """While connections drain it is told how many they still are, once a change and second."""
        events: list[LogEvent] = []
        observer: Callable[[LogEvent], None] = events.append
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)

        def told() -> list[tuple[str, str | None]]:
            said = [(event["log_level"].name, formatEvent(event)) for event in events]
            events.clear()
            return said

        visitors = [Live(self.factory, self.story) for _ in range(5)]
        self.proxy.stopService()
        visitors.pop().end()
        told()
        self.reactor.advance(3)
        self.assertEqual(told(), [("info", "Draining 4 live connections")])
        visitors.pop().end()
        visitors.pop().end()
        self.assertEqual(told(), [])
        self.reactor.pump([1, 1, 1])
        self.assertEqual(told(), [("debug", "Draining 2 live connections")])
        while visitors:
            visitors.pop().end()
        self.assertEqual(told(), [("info", "Stopped: all connections have ended")])
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_end_wait_while_draining(self) -> None:
        """Told not to wait any longer, it resets what lives and ends."""
        Live(self.factory, self.story)
        stopped = self.proxy.stopService()
        self.reactor.advance(3)
        self.story.clear()
        again = self.proxy.stopService()
        self.told("reset a connection", *ENDED)
        self.successResultOf(stopped)
        self.successResultOf(again)

    def test_end_wait_while_lingering(self) -> None:
        """Told so during the linger, it ends that too."""
        stopped = self.proxy.stopService()
        self.story.clear()
        self.proxy.end_wait()
        self.told("close listener", *ENDED)
        self.successResultOf(stopped)

    def test_end_wait_while_letting_go(self) -> None:
        """Told so while the redirect is being removed, it skips the linger and resets the rest."""
        self.redirect.pending["let go"] = letting_go = Deferred()
        stopped = self.proxy.stopService()
        self.proxy.end_wait()
        Live(self.factory, self.story)
        letting_go.callback(None)
        self.told(*LET_GO, "close listener", "reset a connection", *ENDED)
        self.successResultOf(stopped)

    def test_redirect_stays(self) -> None:
        """A redirect that cannot be removed is tried again, and visitors are served meanwhile."""
        self.reactor.running = True
        self.redirect.problems["let go"] = StartError("locked")
        stopped = self.proxy.stopService()
        self.told("let go")
        self.reactor.advance(1)
        self.told(*LET_GO)
        self.reactor.advance(3)
        self.successResultOf(stopped)

    def test_redirect_stays_for_good(self) -> None:
        """While it cannot be removed the PID file stays; a second signal ends the attempts."""
        self.reactor.running = True
        self.redirect.remove = lambda commands: fail(StartError("locked"))  # type: ignore[method-assign]
        stopped = self.proxy.stopService()
        for _ in range(100):
            self.reactor.advance(1)
        self.assertNoResult(stopped)
        self.told()
        self.proxy.end_wait()
        self.reactor.advance(30)
        self.told("release PID file", "close listener", *ENDED)
        self.successResultOf(stopped)

    def test_keeper_stays(self) -> None:
        """A keeper that cannot be removed does not keep the process."""
        self.redirect.problems["release keeper"] = StartError("locked")
        stopped = self.proxy.stopService()
        self.reactor.advance(3)
        self.successResultOf(stopped)

    def test_queue(self) -> None:
        """Who waits to be accepted when the listener closes is accepted."""
        waiting = [socket.create_connection(("127.0.0.1", self.port)) for _ in range(3)]
        stopped = self.proxy.stopService()
        self.assertEqual(self.reactor.accepted, 0)
        self.reactor.advance(3)
        self.assertEqual(self.reactor.accepted, 3)
        self.successResultOf(stopped)
        for connection in waiting:
            connection.close()

    def test_again(self) -> None:
        """It can be started again after a stop."""
        stopped = self.proxy.stopService()
        self.reactor.advance(3)
        self.successResultOf(stopped)
        self.story.clear()
        self.proxy.startService()
        self.told(*STARTED)

    def test_never_started(self) -> None:
        """Stopping what was never started is no matter."""
        self.successResultOf(self.make_proxy().stopService())
        self.told()


class ListeningSocketTests(SynchronousTestCase):
    def test_both_families(self) -> None:
        """The wildcard takes IPv4 and IPv6, and does not block."""
        with listening_socket("::", 0) as listener:
            port = listener.getsockname()[1]
            self.assertFalse(listener.getblocking())
            for host in ("127.0.0.1", "::1"):
                socket.create_connection((host, port)).close()

    def test_no_ipv6(self) -> None:
        """Where the kernel has no IPv6 it listens on IPv4 alone."""
        real = socket.socket

        def make(family: int = socket.AF_INET, *rest: Any) -> socket.socket:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no IPv6")
            return real(family, *rest)

        self.patch(service.socket, "socket", make)
        with listening_socket("::", 0) as listener:
            self.assertEqual(listener.family, socket.AF_INET)
        with self.assertRaises(OSError):
            listening_socket("::1", 0)

    def test_backlog(self) -> None:
        """Over a thousand connections may wait to be accepted."""
        self.assertGreaterEqual(service.BACKLOG, 1_024)


class ProgramTests(ServiceCase):
    """Signals."""

    def setUp(self) -> None:
        super().setUp()
        self.handlers: dict[int, Any] = {}
        self.before: dict[int, Any] = {}
        self.patch(signal, "signal", self.handlers.__setitem__)
        self.patch(signal, "getsignal", lambda number: self.before.get(number, signal.SIG_DFL))
        self.stops = 0
        self.reactor.stop = self.stop_reactor
        self.reactor.callFromThread = lambda call: call()
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
        """A signal while the reactor already stops is no error."""
        from twisted.internet.error import ReactorNotRunning

        def stop() -> None:
            raise ReactorNotRunning

        self.reactor.stop = stop
        self.program.privilegedStartService()
        self.run_reactor()
        self.handlers[signal.SIGTERM](signal.SIGTERM, None)
        self.assertTrue(self.program.ending)

    def test_others_are_ignored(self) -> None:
        """SIGHUP, SIGUSR1, SIGUSR2, SIGPIPE do not end it; what twistd took is left to it."""
        self.before[signal.SIGUSR1] = print
        self.program.privilegedStartService()
        for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGPIPE):
            self.assertEqual(self.handlers[number], signal.SIG_IGN)
        self.assertNotIn(signal.SIGUSR1, self.handlers)

    def test_refusal(self) -> None:
        """A refused start raises, and what to do about it is told before."""
        self.pidfile.problem = StartError("no")
        told: list[str] = []
        self.program.on_refusal = lambda problem: told.append(str(problem))
        with self.assertRaises(StartError):
            self.program.privilegedStartService()
        self.assertEqual(told, ["no"])


class TapTests(SynchronousTestCase):
    """From options to the service."""

    def options(self, *words: str) -> tap.Options:
        options = tap.Options()
        options.environment = {}
        options.parseOptions(list(words))
        return options

    def test_own_application(self) -> None:
        """In an application of one's own the service stands beside others, without signals."""
        application = Application("site")
        Service().setServiceParent(application)
        made = tap.makeService(self.options("--redirect", "none"))
        made.setServiceParent(application)
        self.assertIsInstance(made, ProxyService)
        self.assertEqual(len(list(IServiceCollection(application))), 2)
        self.assertTrue(IService.providedBy(made))

    def test_twistd(self) -> None:
        """Run by twistd it is the whole program, and knows -n."""
        for nodaemon in (True, False):
            options = self.options("--alpn", "[::1]:1", "--linger", "1.5")
            options.parent = {"nodaemon": nodaemon}  # type: ignore[attr-defined]
            program = tap.makeService(options)
            assert isinstance(program, Program)
            if nodaemon:
                with self.assertRaises(SystemExit) as end:
                    program.on_refusal(StartError("no", os.EX_CONFIG))
                self.assertEqual(end.exception.code, os.EX_CONFIG)
            else:
                program.on_refusal(StartError("no"))

    def test_redirects(self) -> None:
        """Every name that --redirect takes makes a redirect."""
        from acme_alpn_proxy.options import REDIRECTS

        for name in REDIRECTS:
            self.assertTrue(
                IRedirect.providedBy(tap.make_redirect(self.options("--redirect", name)))
            )
        with self.assertRaises(UsageError):
            self.options("--redirect", "magic")

    def test_no_redirect(self) -> None:
        """The null redirect fires at once, whatever it is asked."""
        redirect = tap.make_redirect(self.options("--redirect", "none"))
        steps: tuple[Callable[[], Deferred[None]], ...] = (
            lambda: redirect.apply(BlockingCommands(), []),
            lambda: redirect.remove(BlockingCommands()),
            lambda: redirect.release(BlockingCommands()),
        )
        for step in steps:
            self.successResultOf(step())
