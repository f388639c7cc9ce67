"""The proxy as the whole program of a process: it takes the signals.

An application with services of its own takes L{acme_alpn_proxy.service.ProxyService} instead.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Final

from twisted.application.service import MultiService
from twisted.internet.error import ReactorNotRunning
from twisted.logger import Logger

from .errors import StartError
from .service import ProxyService

_END: Final = (signal.SIGINT, signal.SIGTERM)
_IGNORE: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)


class Program(MultiService):
    """Runs one L{ProxyService}. The first SIGINT or SIGTERM stops it, a second ends the wait.

    The signals are taken before anything is applied, so that none of them ends the process midway,
    and again once the reactor runs: it takes SIGTERM itself when it starts, and SIGINT only where
    Python did, which it did not where it was inherited as ignored (C{start &} in a script).

    @ivar ending: whether a signal to end has come.
    @ivar refuse_by_exit: end the process with the one line of a L{StartError} instead of raising
        it. For C{twistd -n}, which would print a traceback. (In the background it must be raised:
        twistd's parent process waits for an exception to tell, and for ever if none comes.)
    """

    _log = Logger()

    def __init__(self, reactor: Any, proxy: ProxyService) -> None:
        super().__init__()
        self._reactor = reactor
        self._proxy = proxy
        self.ending = False
        self.refuse_by_exit = False
        proxy.setServiceParent(self)

    def privilegedStartService(self) -> None:
        self._take_signals()
        self._reactor.callWhenRunning(self._take_signals)
        try:
            super().privilegedStartService()
        except StartError as problem:
            if self.refuse_by_exit:
                raise SystemExit(f"acme-alpn-proxy: {problem}") from None
            raise

    def end(self) -> None:
        """Stop in order; called once more, do not wait any longer."""
        if self.ending:
            self._log.info("Not waiting any longer")
            self._proxy.end_wait()
        else:
            self.ending = True
            self._reactor.callWhenRunning(self._stop_reactor)

    def _stop_reactor(self) -> None:
        try:
            self._reactor.stop()
        except ReactorNotRunning:
            pass  # somebody else has stopped it

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
