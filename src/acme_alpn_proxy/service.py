"""The proxy as a service, with its ordered start and stop.

Start: take the PID file, open the listener, apply the redirect. Stop: remove the redirect and the
PID file, go on accepting for the linger, close the listener when its queue is empty, wait for the
live connections, remove what kept them working.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

from twisted.application.service import IService, MultiService, Service
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    DeferredList,
    inlineCallbacks,
    maybeDeferred,
    succeed,
)
from twisted.internet.task import LoopingCall, deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from .errors import StartError, VisitorsLost
from .host.pidfile import NoPIDFile
from .host.processes import commands_for
from .host.tcpsockets import Handshake, half_open
from .interfaces import INetwork, IPIDFile, IRedirect, ISteerable, Reactor
from .monitoring.status import ProxyStatus
from .proxy.listener import ListenerService, highest_limits
from .proxy.protocols import ProxyServerFactory
from .proxy.visitoraddress import HostAddress, IVisitorAddress
from .redirects.lostvisitors import LostVisitorsWatch
from .redirects.steering import RedirectService
from .transports.hangup import hangup_watch
from .transports.network import TwistedNetwork
from .wording import counted

FEW_VISITORS: Final = 500
"""If there is room for fewer visitors at a time, a warning is logged."""

LEAST_LINGER: Final = 0.5
"""Seconds to go on accepting after the redirect is gone, for packets that are on their way."""

LINGER_STEP: Final = 0.25
"""Seconds between two checks for handshakes that are still under way."""

DRAIN_NEWS_INTERVAL: Final = 1.0
"""Seconds between two reports of how many connections a stop still waits for."""

_STOPPING: Final = "Stopping: waiting for the open connections"
"""With C{--redirect none}, only the operator knows where new connections go."""

_STOPPED_STEERING: Final = (
    "Stopped steering: new connections to port 443 go to the web server. Waiting for the open"
    " connections"
)

_WAITING: Final = "Waiting for {connections} to end"


class Companions:
    """Services that run while a proxy does."""

    def __init__(self) -> None:
        self._services: list[IService] = []

    def add(self, service: IService) -> None:
        """Add C{service} to them."""
        self._services.append(service)

    def start(self) -> None:
        """Start all, while the process still has its privileges; raises L{StartError}."""
        for service in self._services:
            service.privilegedStartService()
            service.startService()

    def stop(self) -> Deferred[Any]:
        """Stop those that run; the Deferred fires when they have stopped."""
        running = [service for service in self._services if service.running]
        stops = [maybeDeferred(service.stopService) for service in running]
        return DeferredList(stops, consumeErrors=True)


@implementer(ISteerable)
class ProxyService(MultiService):
    """The whole proxy, for any Twisted application.

    It steers as soon as C{privilegedStartService} (or C{startService}, if that is called first)
    returns; if that raises L{StartError}, nothing is left applied. If the reactor already runs at
    the start, nothing blocks, and L{when_started} reports the result. C{stopService} returns a
    Deferred that fires when the last connection has ended; a second call, or L{end_wait}, ends the
    wait.

    It stops by itself when visitors would be lost if it went on.

    @ivar on_loss: called with the reason when it stops by itself.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        factory: ProxyServerFactory,
        redirect: IRedirect,
        pidfile: IPIDFile | None = None,
        *,
        network: INetwork | None = None,
        port: int = 21443,
        max_connections: int = 0,
        linger: float = 15.0,
        drain_timeout: float = 180.0,
        precheck: Callable[[], None] | None = None,
        visitor_address: IVisitorAddress | None = None,
    ) -> None:
        """
        @param network: the kind of transports; Twisted's own by default.
        @param port: where to listen; the redirect must use the same port.
        @param max_connections: how many visitors are accepted at a time; the others wait in the
            queue; 0: as many as the limit on open files allows.
        @param linger: seconds, at most, to go on accepting after the redirect is removed, while
            handshakes from before are still under way.
        @param drain_timeout: seconds to wait for live connections before they are reset.
        @param precheck: raises L{StartError} to refuse the start. It may block: when the reactor
            runs, it is called in a thread.
        @param visitor_address: what makes the web server see the visitors' addresses; by default
            it sees an address of this host.
        """
        super().__init__()
        self._reactor = reactor
        self._factory = factory
        self._pidfile = pidfile if pidfile is not None else NoPIDFile()
        self._linger = linger
        self._drain_timeout = drain_timeout
        self._starting: Deferred[BaseException | None] | None = None
        self._stopping: Deferred[None] | None = None
        self._let_go_done: Deferred[None] = Deferred()
        self._lingering: Deferred[None] | None = None
        self._hurried = False
        self._redirect = redirect
        self._network = network if network is not None else TwistedNetwork(reactor)
        self._max_connections = max_connections
        self._beside = Companions()
        self._precheck = precheck
        self._visitor_address: IVisitorAddress = visitor_address or HostAddress()
        self.listener = ListenerService(reactor, factory, self._network, port, linger + 2)
        self.steering = RedirectService(
            reactor,
            redirect,
            lambda: self.listener.sockets,
            LostVisitorsWatch(lambda: factory.live.entered, lambda: self.listener.is_full),
        )
        self.steering.on_loss = self._let_go
        self.on_loss: Callable[[VisitorsLost], None] = lambda problem: None
        for service in (self.listener, self.steering):
            service.setServiceParent(self)

    def run_beside(self, service: IService) -> None:
        """Start C{service} before the proxy steers. Stop C{service} when the proxy has stopped
        steering."""
        service.setServiceParent(self)
        self._beside.add(service)

    def status(self) -> ProxyStatus:
        """The numbers of this proxy."""
        undecided = len(self._factory.hellos)
        return self._factory.statistics.status(str(self._redirect), undecided)

    @property
    def capabilities(self) -> Sequence[int]:
        """See L{acme_alpn_proxy.program.Program.capabilities}."""
        return self._visitor_address.capabilities

    def privilegedStartService(self) -> None:
        """Start, while the process still has its privileges; raises L{StartError}."""
        self._start()

    def startService(self) -> None:
        """Start, unless C{privilegedStartService} has already; raises L{StartError}."""
        Service.startService(self)
        self._start()

    def when_started(self) -> Deferred[None]:
        """Return a Deferred that fires when the proxy steers, or fails with L{StartError}."""
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

    def need(self, what: object) -> Deferred[None]:
        """Nothing to do: this proxy steers from its start to its stop."""
        return succeed(None)

    def needed_no_more(self, what: object) -> None:
        """Nothing to do: this proxy steers until it is stopped."""

    def when_let_go(self) -> Deferred[None]:
        """Return a Deferred that fires when C{stopService} has ended the steering."""
        return _result_of(self._let_go_done)

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
        """Do not wait any longer: reset the live connections."""
        self._hurried = True
        self.steering.give_up()
        if self._lingering is not None:
            self._lingering.cancel()
        self._factory.live.abort_all()

    @inlineCallbacks
    def check(self) -> Generator[Deferred[Any], Any, None]:
        """Raise L{StartError} now if a start is known to fail; changes nothing."""
        if self._precheck is not None:
            yield self._blocking(self._precheck)
        self.listener.hosts = yield self._redirect.prepare(commands_for(self._reactor))

    @inlineCallbacks
    def rehearse(self) -> Generator[Deferred[Any], Any, None]:
        """Do what L{check} does, and every other step of a start that can fail before it steers;
        undo these steps again. Raises L{StartError}."""
        yield self.check()
        yield self._visitor_address.open(self._blocking)
        self._visitor_address.close()

    def _blocking(self, call: Callable[[], None]) -> Deferred[None]:
        """Make a call that blocks, in a thread if the reactor runs."""
        if self._reactor.running:
            return deferToThread(call)
        return maybeDeferred(call)

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
            yield self.check()
            yield self._visitor_address.open(self._blocking)
        except Exception:
            self._pidfile.release()
            raise
        self._let_go_done = Deferred()
        self._open()
        try:
            self._beside.start()
            self.listener.startService()
            yield self.listener.ready
            self.steering.startService()
            yield self.steering.ready
        except Exception:
            Service.stopService(self.steering)
            self.listener.abandon()
            self._beside.stop()
            self._close()
            self._pidfile.release()
            raise
        self._factory.statistics.enter("running")
        self._say("Started: the proxy receives new connections to port 443")

    @inlineCallbacks
    def _stop_in_order(
        self, starting: Deferred[BaseException | None]
    ) -> Generator[Deferred[Any], Any, None]:
        problem = yield _result_of(starting)
        if problem is None:
            yield self.steering.stopService()
            yield self._beside.stop()
            self._pidfile.release()
            self._let_go_done.callback(None)
            self._factory.statistics.enter("draining")
            self._say(_STOPPING if str(self._redirect) == "none" else _STOPPED_STEERING)
            yield self._linger_on()
            yield self.listener.stopService()
            if self._hurried:
                self._factory.live.abort_all()
            yield self._drain()
            yield self.steering.release()
            self._close()
            self._say_end()
        self._starting = self._stopping = None

    @inlineCallbacks
    def _drain(self) -> Generator[Deferred[Any], Any, None]:
        """Wait for the live connections. Log their number once; later changes are logged at debug
        level, which systemd's status line shows."""
        live = self._factory.live
        reported = len(live)
        if live:
            self._say(_WAITING, connections=_open(reported), count=reported)

        def report() -> None:
            nonlocal reported
            if reported != len(live):
                reported = len(live)
                self._log.debug(
                    _WAITING, connections=_open(reported), count=reported, is_status=True
                )

        reports = LoopingCall(report)
        reports.clock = self._reactor
        reports.start(DRAIN_NEWS_INTERVAL, now=False)
        yield live.drained(self._reactor, self._drain_timeout)
        reports.stop()

    def _say_end(self) -> None:
        """Log that no connection is left, and how many the proxy has reset to achieve that."""
        count = self._factory.live.aborted
        if count:
            reset = f"{counted(count, 'connection')} {'were' if count > 1 else 'was'} reset"
            self._say("Stopped: {reset}, all others have ended", reset=reset, count=count)
        else:
            self._say("Stopped: all connections have ended")

    def _let_go(self, problem: VisitorsLost) -> None:
        self.on_loss(problem)
        if self._stopping is None:
            self.stopService()

    def _say(self, text: str, **fields: object) -> None:
        """Log a line that is also shown as the service's status (sd_notify(3))."""
        self._log.info(text, is_status=True, **fields)

    def _open(self) -> None:
        """Get ready for connections."""
        limits = highest_limits(self._max_connections)
        if not self._max_connections and limits.visitors < FEW_VISITORS:
            self._log.warn(
                "The limit on open files allows only {count} visitors at a time, and others have to"
                " wait; raise the limit (ulimit -Hn, or LimitNOFILE= of the systemd unit)",
                count=limits.visitors,
            )
        self._network.open()
        self._factory.open(
            hangup_watch(self._reactor),
            limits,
            full=self.listener.pause,
            room=self.listener.resume,
        )

    def _close(self) -> None:
        self._factory.close()
        self._network.close()
        self._visitor_address.close()

    @inlineCallbacks
    def _linger_on(self) -> Generator[Deferred[Any], Any, None]:
        """Go on accepting until no handshake from before is under way: its last packet may have
        been lost and be sent again."""
        handshakes = _half_open(self.listener.port)
        waited = 0.0
        while not self._hurried and waited < self._linger:
            pause = min(LINGER_STEP, self._linger - waited)
            self._lingering = deferLater(self._reactor, pause, lambda: None)
            try:
                yield self._lingering
            except CancelledError:
                pass
            self._lingering = None
            waited += pause
            if handshakes is not None and waited >= LEAST_LINGER:
                handshakes &= _half_open(self.listener.port) or set()
                if not handshakes:
                    return


def _open(count: int) -> str:
    return counted(count, "open connection")


def _half_open(port: int) -> set[Handshake] | None:
    """The handshakes with this host's web address that are under way; C{None} if unknown.

    The way of steering decides which port the kernel sees: the listener's or 443.
    """
    try:
        return half_open(port, 443)
    except OSError:
        return None


def _result_of(shared: Deferred[Any]) -> Deferred[Any]:
    """Return a new Deferred that fires with C{shared}'s result and leaves C{shared} usable."""
    told: Deferred[Any] = Deferred()

    def tell(result: Any) -> Any:
        told.callback(result)
        return result

    shared.addCallback(tell)
    return told
