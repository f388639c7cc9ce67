"""The proxy as a whole program: this module handles the signals of the process.

An application with other services uses L{acme_alpn_proxy.service.ProxyService} instead.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.logger import Logger

from .errors import StartError, VisitorsLost
from .interfaces import Reactor
from .monitoring.statussocket import Holders
from .ondemand import OnDemandProxy
from .service import ProxyService

_END: Final = (signal.SIGINT, signal.SIGTERM)
_IGNORE: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)


class Program(MultiService):
    """Runs a L{ProxyService} or an L{OnDemandProxy}.

    The first SIGINT or SIGTERM stops it; the second ends the wait.

    Signal handlers are set before anything is applied, so that no signal can end the process
    midway. They are set again once the reactor runs, because the reactor sets its own: for SIGTERM
    always, for SIGINT only where Python had set one. Python sets none if the process inherited
    SIGINT as ignored (C{start &} in a script).

    @ivar ending: whether a signal to stop has arrived.
    @ivar holders: other commands that need the proxy.
    @ivar on_refusal: called with the L{StartError} of a failed start, before it is raised.
    @ivar problem: why the proxy has stopped by itself, if it has.
    @ivar on_loss: called with C{problem} at once.
    """

    _log = Logger()

    def __init__(self, reactor: Reactor, proxy: ProxyService | OnDemandProxy) -> None:
        super().__init__()
        self._reactor = reactor
        self._proxy = proxy
        self.ending = False
        self.holders = Holders(self.end, proxy)
        self.on_refusal: Callable[[StartError], None] = self.log_refusal
        self.problem: VisitorsLost | None = None
        self.on_loss: Callable[[VisitorsLost], None] = lambda problem: None
        proxy.on_loss = self._lost
        proxy.setServiceParent(self)

    def when_started(self) -> Deferred[None]:
        """Return a Deferred that fires when the proxy steers, or fails with L{StartError}."""
        return self._proxy.when_started()

    @property
    def capabilities(self) -> Sequence[int]:
        """Capabilities that it still needs when its services have started, as numbers of
        capabilities(7)."""
        return self._proxy.capabilities

    def privilegedStartService(self) -> None:
        self._take_signals()
        self._reactor.callWhenRunning(self._take_signals)
        try:
            super().privilegedStartService()
        except StartError as problem:
            self.on_refusal(problem)
            raise

    def log_refusal(self, problem: StartError) -> None:
        """Log why the start failed: in the background, the log is the only place to look."""
        self._log.critical("Cannot start: {problem}", problem=problem)

    def end(self) -> None:
        """Stop in order; a second call ends the wait for live connections."""
        if self.ending:
            self._log.info("Not waiting any longer: resetting the open connections")
            self._proxy.end_wait()
        else:
            self.ending = True
            self._reactor.callWhenRunning(self._stop_reactor)

    def _lost(self, problem: VisitorsLost) -> None:
        self.problem = problem
        self.on_loss(problem)
        if not self.ending:
            self.end()

    def _stop_reactor(self) -> None:
        try:
            self._reactor.stop()
        except ReactorNotRunning:
            pass  # it is already stopped

    def _take_signals(self) -> None:
        for number in _END:
            signal.signal(number, self._signalled)
        for number in _IGNORE:
            if signal.getsignal(number) == signal.SIG_DFL:  # twistd may have taken SIGUSR1
                signal.signal(number, signal.SIG_IGN)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._reactor.running:
            self._reactor.callFromThread(self.end)
        else:
            self.end()
