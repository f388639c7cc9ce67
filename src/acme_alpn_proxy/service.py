"""The proxy as a service, with its ordered start and stop.

Start: PID file, listener, redirect. Stop: redirect away, PID file away, go on accepting for the
linger, close the listener with its queue empty, wait for the live connections, let go of what kept
them going.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Generator, Sequence
from typing import Any, Final

from twisted.application.service import MultiService, Service
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks, succeed
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from .host.processes import commands_for
from .errors import StartError
from .transports.hangup import NoHangupWatch, hangup_watch
from .interfaces import ICommands, INetwork, IPIDFile, IRedirect
from .transports.network import TwistedNetwork
from .host.pidfile import NoPIDFile
from .proxy.protocols import IDLE_LOOKS, ProxyServerFactory

BACKLOG: Final = 4_096
"""Connections that may wait to be accepted. The kernel takes net.core.somaxconn at most, which is
this number since Linux 5.4."""

WATCH_INTERVAL: Final = 3.0
"""Seconds between two looks whether the redirect is still there."""

DRAIN_NEWS_INTERVAL: Final = 1.0
"""Seconds between two looks how many connections a stop still waits for."""

MAX_PIPES: Final = 64
"""Of 1 MiB each."""

_RESERVE: Final = 48
"""Descriptors for all but connections and pipes: the log, commands and the reactor take a dozen."""

_BIND_RETRY: Final = 0.05
_REMOVE_RETRY: Final = 1.0
_REMOVE_RETRY_LIMIT: Final = 30.0


def listening_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket, non-blocking; raises C{OSError}.

    For C{"::"} it takes IPv4 too, whatever net.ipv6.bindv6only says, and where there is no IPv6 it
    is one for IPv4 alone.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as problem:
        if host == "::" and problem.errno == errno.EAFNOSUPPORT:
            return listening_socket("0.0.0.0", port)  # noqa: S104
        raise
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _raise_descriptor_limit() -> None:
    """A connection takes two descriptors, and the usual soft limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # where the hard limit is over fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _descriptor_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def connections_and_pipes(descriptors: int) -> tuple[int, int]:
    """How many visitors, and how many pipes to move their bytes by, so many open files allow."""
    pipes = min(MAX_PIPES, descriptors // 16)
    return max(1, (descriptors - _RESERVE) // 2 - pipes), pipes


class ListenerService(Service):
    """Listens while it runs.

    @ivar hosts: where to listen, set before the start; L{IRedirect.prepare} tells.
    @ivar sockets: the listening sockets, while there are any.
    @ivar ready: fires when it listens, or fails with L{StartError}.
    """

    ready: Deferred[None]

    def __init__(
        self,
        reactor: Any,
        factory: ProxyServerFactory,
        network: INetwork,
        port: int,
        patience: float,
        max_connections: int,
    ) -> None:
        """
        @param patience: seconds for which a port that is taken is tried again: an instance that
            ends keeps it for its linger.
        @param max_connections: how many visitors may be here at a time, the others wait to be
            accepted; 0: as many as the limit on open files allows.
        """
        self._reactor = reactor
        self._factory = factory
        self._network = network
        self._max_connections = max_connections
        self._port = port
        self._patience = patience
        self._ports: list[Any] = []
        self.hosts: Sequence[str] = ()
        self.sockets: list[socket.socket] = []

    def startService(self) -> None:
        super().startService()
        self.ready = self._open(commands_for(self._reactor))

    @inlineCallbacks
    def _open(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        _raise_descriptor_limit()
        waited = 0.0
        while not self._try_to_open():
            if waited >= self._patience:
                raise StartError(
                    f"port {self._port} is taken by another program; stop that one (see: ss -ltnp "
                    f"'sport = :{self._port}')",
                    os.EX_UNAVAILABLE,
                )
            yield commands.pause(_BIND_RETRY)
            waited += _BIND_RETRY
        allowed, self._factory.pipes.limit = connections_and_pipes(_descriptor_limit())
        self._factory.live.bound(self._max_connections or allowed, self._pause, self._resume)
        for listener in self.sockets:
            self._ports.append(self._network.listen(listener, self._factory))

    def _pause(self) -> None:
        for port in self._ports:
            port.pauseProducing()

    def _resume(self) -> None:
        for port in self._ports:
            port.resumeProducing()

    def _try_to_open(self) -> bool:
        """Whether it listens; C{False} while the port is taken."""
        missing = None
        for host in self.hosts:
            try:
                self.sockets.append(listening_socket(host, self._port))
            except OSError as problem:
                if problem.errno == errno.EADDRINUSE:
                    self._close_sockets()
                    return False
                missing = problem
        if missing is not None and not self.sockets:
            raise StartError(
                f"cannot listen on port {self._port}: {missing.strerror}; see whether lo is up"
                " (ip address show lo), and how many files may be open (ulimit -n)",
                os.EX_OSERR,
            )
        return True

    @inlineCallbacks
    def stopService(self) -> Generator[Deferred[Any], Any, None]:
        """Stop listening; whoever waits to be accepted then is accepted."""
        super().stopService()
        ports, self._ports = self._ports, []
        for port in ports:
            yield port.stopListening()
        for listener in self.sockets:
            self._accept_all(listener)
        self._close_sockets()

    def abandon(self) -> None:
        """Stop listening at once: nobody has been steered here."""
        super().stopService()
        ports, self._ports = self._ports, []
        for port in ports:
            port.stopListening()
        self._close_sockets()

    def _accept_all(self, listener: socket.socket) -> None:
        while True:
            try:
                visitor, _ = listener.accept()
            except OSError:
                return
            self._network.adopt(visitor, self._factory)

    def _close_sockets(self) -> None:
        sockets, self.sockets = self.sockets, []
        for listener in sockets:
            listener.close()


class RedirectService(Service):
    """Steers new connections to the listener while it runs.

    @ivar ready: fires when it steers, or fails with L{StartError}.
    """

    ready: Deferred[None]
    _log = Logger()

    def __init__(self, reactor: Any, redirect: IRedirect, listener: ListenerService) -> None:
        self._reactor = reactor
        self._redirect = redirect
        self._listener = listener
        self._give_up = False
        self._watch = LoopingCall(self._look_after)
        self._watch.clock = reactor
        self._unwatched: Deferred[Any] = succeed(None)

    def startService(self) -> None:
        super().startService()
        self.ready = self._redirect.apply(commands_for(self._reactor), self._listener.sockets)
        self.ready.addCallback(self._begin_watch)

    def _begin_watch(self, result: None) -> None:
        self._unwatched = self._watch.start(WATCH_INTERVAL, now=False)
        self._unwatched.addErrback(
            lambda failure: self._log.failure("Nobody watches the redirect any more", failure)
        )

    @inlineCallbacks
    def _look_after(self) -> Generator[Deferred[Any], Any, None]:
        try:
            yield self._redirect.look_after(commands_for(self._reactor))
        except StartError as problem:
            self._log.critical("Cannot steer any more: {problem}", problem=problem)

    @inlineCallbacks
    def stopService(self) -> Generator[Deferred[Any], Any, None]:
        """Steer no more. If that fails it is tried again: to close the listener would be worse."""
        super().stopService()
        if self._watch.running:
            self._watch.stop()
        yield self._unwatched
        pause = _REMOVE_RETRY
        while True:
            commands = commands_for(self._reactor)
            try:
                yield self._redirect.remove(commands)
                return
            except StartError as problem:
                self._log.critical("Cannot let go of :443: {problem}", problem=problem)
            if self._give_up:
                return
            yield commands.pause(pause)
            pause = min(2 * pause, _REMOVE_RETRY_LIMIT)

    def give_up(self) -> None:
        """Try to remove it once at most from now on."""
        self._give_up = True

    @inlineCallbacks
    def release(self) -> Generator[Deferred[Any], Any, None]:
        """The last connection has ended."""
        try:
            yield self._redirect.release(commands_for(self._reactor))
        except StartError as problem:
            self._log.error("Cannot clean up: {problem}", problem=problem)


class ProxyService(MultiService):
    """The whole proxy, for any Twisted application.

    It steers as soon as C{privilegedStartService} (or C{startService}, if that is the first call)
    returns; if that raises L{StartError}, nothing is left applied. If it is started when the
    reactor already runs, nothing blocks, and L{when_started} tells how it went. C{stopService}
    gives a Deferred that fires when the last connection has ended; calling it again, or
    L{end_wait}, ends the wait.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Any,
        factory: ProxyServerFactory,
        redirect: IRedirect,
        pidfile: IPIDFile | None = None,
        *,
        network: INetwork | None = None,
        port: int = 21443,
        max_connections: int = 0,
        idle_timeout: float = 0.0,
        linger: float = 3.0,
        drain_timeout: float = 180.0,
    ) -> None:
        """
        @param network: the kind of transports; Twisted's own by default.
        @param port: where to listen; the redirect must know the same.
        @param max_connections: see L{ListenerService}.
        @param idle_timeout: seconds without a byte until an established connection is reset; 0:
            for ever.
        @param linger: seconds to go on accepting after the redirect is gone: handshakes that began
            before are then still under way.
        @param drain_timeout: seconds to wait for live connections before they are reset.
        """
        super().__init__()
        self._reactor = reactor
        self._factory = factory
        self._pidfile = pidfile if pidfile is not None else NoPIDFile()
        self._linger = linger
        self._drain_timeout = drain_timeout
        self._starting: Deferred[BaseException | None] | None = None
        self._stopping: Deferred[None] | None = None
        self._lingering: Deferred[None] | None = None
        self._hurried = False
        self._redirect = redirect
        self._network = network if network is not None else TwistedNetwork(reactor)
        self._idle_timeout = idle_timeout
        self._looking = LoopingCall(factory.look_for_idle)
        self._looking.clock = reactor
        self.listener = ListenerService(
            reactor, factory, self._network, port, linger + 2, max_connections
        )
        self.listener.setServiceParent(self)
        self.steering = RedirectService(reactor, redirect, self.listener)
        self.steering.setServiceParent(self)

    def as_json(self) -> dict[str, Any]:
        """Its numbers, for C{json.dumps}."""
        statistics = self._factory.statistics
        decided = statistics.acme.live + statistics.fallback.live
        return statistics.as_json() | {
            "redirect": str(self._redirect),
            "undecided": len(self._factory.live) - decided,
        }

    def privilegedStartService(self) -> None:
        """Start, while the process still has its privileges; raises L{StartError}."""
        self._start()

    def startService(self) -> None:
        """Start, unless C{privilegedStartService} has done it; raises L{StartError}."""
        Service.startService(self)
        self._start()

    def when_started(self) -> Deferred[None]:
        """Fires when the proxy steers, or fails with L{StartError}."""
        told: Deferred[None] = Deferred()

        def tell(problem: BaseException | None) -> BaseException | None:
            if problem is None:
                told.callback(None)
            else:
                told.errback(problem)
            return problem

        if self._starting is None:
            told.errback(StartError("the service was not started; start it first"))
        else:
            self._starting.addCallback(tell)
        return told

    def stopService(self) -> Deferred[None]:
        """Stop in order; the Deferred fires when the last connection has ended."""
        Service.stopService(self)
        if self._starting is None:
            return succeed(None)
        if self._stopping is None:
            self._hurried = False
            stopping: Deferred[None] = Deferred()
            self._stopping = stopping
            self._stop_in_order(self._starting).chainDeferred(stopping)
        else:
            stopping = self._stopping
            self.end_wait()
        return _result_of(stopping)

    def end_wait(self) -> None:
        """Do not wait any longer: what is still live is reset."""
        self._hurried = True
        self.steering.give_up()
        if self._lingering is not None:
            self._lingering.cancel()
        self._factory.live.abort_all()

    def _start(self) -> None:
        if self._starting is not None:
            return
        problems: list[BaseException] = []

        def note(failure: Failure) -> BaseException:
            problem = failure.value
            assert problem is not None
            problems.append(problem)
            if later:
                self._log.critical("Cannot start: {problem}", problem=problem)
            return problem

        later = False
        self._starting = self._start_in_order().addErrback(note)
        if problems:
            self._starting = None
            raise problems[0]
        later = True

    @inlineCallbacks
    def _start_in_order(self) -> Generator[Deferred[Any], Any, None]:
        self._pidfile.claim()
        try:
            self.listener.hosts = yield self._redirect.prepare(commands_for(self._reactor))
        except Exception:
            self._pidfile.release()
            raise
        self._open()
        try:
            self.listener.startService()
            yield self.listener.ready
            self.steering.startService()
            yield self.steering.ready
        except Exception:
            Service.stopService(self.steering)
            self.listener.abandon()
            self._close()
            self._pidfile.release()
            raise
        self._factory.statistics.enter("running")
        self._log.info("Started: new connections to :443 are steered here")

    @inlineCallbacks
    def _stop_in_order(
        self, starting: Deferred[BaseException | None]
    ) -> Generator[Deferred[Any], Any, None]:
        problem = yield _result_of(starting)
        if problem is None:
            yield self.steering.stopService()
            self._pidfile.release()
            self._factory.statistics.enter("draining")
            self._log.info("Let go of :443; waiting for what is under way")
            yield self._linger_on()
            yield self.listener.stopService()
            if self._hurried:
                self._factory.live.abort_all()
            yield self._drain()
            yield self.steering.release()
            self._close()
            self._log.info("Stopped: all connections have ended")
        self._starting = self._stopping = None

    @inlineCallbacks
    def _drain(self) -> Generator[Deferred[Any], Any, None]:
        """Wait for the live connections. How many they are is told when it begins, to the log; and
        when it has changed, to who listens to all that is logged, as the service manager does."""
        live = self._factory.live
        told = len(live)
        if live:
            self._log.info("Draining {count} live connections", count=told)

        def tell() -> None:
            nonlocal told
            if told != len(live):
                told = len(live)
                self._log.debug("Draining {count} live connections", count=told)

        telling = LoopingCall(tell)
        telling.clock = self._reactor
        telling.start(DRAIN_NEWS_INTERVAL, now=False)
        yield live.drained(self._reactor, self._drain_timeout)
        telling.stop()

    def _open(self) -> None:
        """Have what connections use."""
        self._factory.hangups = hangup_watch(self._reactor)
        self._network.open()
        if self._idle_timeout:
            self._looking.start(self._idle_timeout / IDLE_LOOKS, now=False)

    def _close(self) -> None:
        if self._looking.running:
            self._looking.stop()
        self._factory.close()
        self._network.close()
        self._factory.hangups.close()
        self._factory.hangups = NoHangupWatch()

    @inlineCallbacks
    def _linger_on(self) -> Generator[Deferred[Any], Any, None]:
        if self._hurried:
            return
        self._lingering = deferLater(self._reactor, self._linger, lambda: None)
        try:
            yield self._lingering
        except CancelledError:
            pass
        self._lingering = None


def _result_of(shared: Deferred[Any]) -> Deferred[Any]:
    """A Deferred of one's own for the result of one that others wait for too."""
    told: Deferred[Any] = Deferred()

    def tell(result: Any) -> Any:
        told.callback(result)
        return result

    shared.addCallback(tell)
    return told
