"""A proxy that steers only while something needs it: a pending identifier, or a command."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from twisted.application.service import IService, Service
from twisted.internet.defer import Deferred, DeferredList, inlineCallbacks, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from .errors import StartError, VisitorsLost
from .host.pidfile import NoPIDFile
from .host.privileges import TO_STEER
from .interfaces import IPIDFile, ISteerable
from .monitoring.status import ProxyStatus, State
from .service import Companions, ProxyService


@implementer(ISteerable)
class OnDemandProxy(Service):
    """Starts a L{ProxyService} for the first need and stops it after the last need has gone.

    Each start makes a new L{ProxyService}, so a new need does not have to wait until the last
    connections of the previous one have ended.
    """

    _log = Logger()

    def __init__(
        self,
        rehearsed: ProxyService,
        make: Callable[[], ProxyService],
        pidfile: IPIDFile | None = None,
    ) -> None:
        """
        @param rehearsed: a service that is never started; only its C{rehearse} is called, to find
            out at the start what would fail later.
        @param make: makes each L{ProxyService}; all count in the same statistics.
        """
        self._make = make
        self._pidfile = pidfile if pidfile is not None else NoPIDFile()
        self._beside = Companions()
        self._proxy = rehearsed
        self._draining: dict[ProxyService, Deferred[None]] = {}
        self._needs: set[object] = set()
        self._waiting: list[Deferred[None]] = []
        self._is_starting = False
        self._let_go: Deferred[None] = succeed(None)
        self._state: State = "starting"
        self._since = time.time()
        self.on_loss: Callable[[VisitorsLost], None] = lambda problem: None

    @property
    def capabilities(self) -> Sequence[int]:
        """See L{acme_alpn_proxy.program.Program.capabilities}."""
        return TO_STEER

    def run_beside(self, service: IService) -> None:
        """Start C{service} with this one, and stop it when no more requests can come."""
        self._beside.add(service)

    def status(self) -> ProxyStatus:
        """The numbers of all orders together."""
        status = self._proxy.status()
        status["state"], status["since"] = self._state, self._since
        return status

    def privilegedStartService(self) -> None:
        """Raise L{StartError} now if steering is known to fail later."""
        problems: list[BaseException] = []

        def note(failure: Failure) -> None:
            assert failure.value is not None
            problems.append(failure.value)

        self._pidfile.claim()
        try:
            self._proxy.rehearse().addErrback(note)
            if problems:
                raise problems[0]
            self._beside.start()
        except Exception:
            self._beside.stop()
            self._pidfile.release()
            raise
        self._enter(
            "idle", "Started: the proxy receives new connections to port 443 when it is needed"
        )

    def when_started(self) -> Deferred[None]:
        """Return a Deferred that fires when needs are accepted: as soon as it has started."""
        return succeed(None)

    def need(self, what: object) -> Deferred[None]:
        """Steer for as long as C{what} needs it.

        @return: a Deferred that fires when new connections are steered. If it fails, with
            L{StartError}, the need is forgotten.
        """
        self._needs.add(what)
        if self._state == "running":
            return succeed(None)
        steers: Deferred[None] = Deferred()
        self._waiting.append(steers)
        if not self._is_starting:
            self._steer()
        return steers

    def needed_no_more(self, what: object) -> None:
        """Steer no longer because of C{what}; no error if C{what} does not need it."""
        self._needs.discard(what)
        self._rest_unless_needed()

    @inlineCallbacks
    def stopService(self) -> Generator[Deferred[Any], Any, None]:
        """Stop steering; the Deferred fires when the last connection of every proxy has ended."""
        super().stopService()
        self._needs.clear()
        if self._is_starting:
            steers: Deferred[None] = Deferred()
            self._waiting.append(steers)
            try:
                yield steers
            except StartError:
                pass
        self._rest_unless_needed()
        yield self._let_go
        yield self._beside.stop()
        self._pidfile.release()
        self._enter("draining")
        yield DeferredList(list(self._draining.values()))

    def end_wait(self) -> None:
        """End the wait: reset the live connections."""
        self._proxy.end_wait()
        for proxy in self._draining:
            proxy.end_wait()

    @inlineCallbacks
    def _steer(self) -> Generator[Deferred[Any], Any, None]:
        self._is_starting = True
        yield self._let_go
        self._proxy = proxy = self._make()
        proxy.on_loss = self._lost
        problem = None
        try:
            proxy.startService()
            yield proxy.when_started()
        except StartError as refusal:
            problem = refusal
            self._needs.clear()
        else:
            self._enter("running")
        self._is_starting = False
        waiting, self._waiting = self._waiting, []
        for steers in waiting:
            if problem is None:
                steers.callback(None)
            else:
                steers.errback(problem)
        self._rest_unless_needed()  # the need may have ended meanwhile

    def _rest_unless_needed(self) -> None:
        if not self._needs and self._state == "running":
            self._rest()

    def _rest(self) -> None:
        """Remove the redirect and stop the proxy."""
        proxy = self._proxy

        def drained(result: None) -> None:
            del self._draining[proxy]

        self._draining[proxy] = proxy.stopService()
        self._draining[proxy].addCallback(drained)
        self._let_go = proxy.when_let_go()
        self._enter("idle")

    def _lost(self, problem: VisitorsLost) -> None:
        """The proxy stops by itself. Whatever still needs it has to ask again."""
        self._rest()
        self.on_loss(problem)

    def _enter(self, state: State, text: str = "") -> None:
        self._state, self._since = state, time.time()
        if text:
            self._log.info(text, is_status=True)
