"""The service that steers while it runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, inlineCallbacks, succeed
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from ..addresses import HTTPS
from ..errors import StartError, VisitorsLost
from ..host.processes import commands_for
from ..interfaces import IRedirect, Reactor
from .lostvisitors import LostVisitorsWatch
from .syncookies import let_take_cookies, let_web_server_take_cookies

LOOK_INTERVAL: Final = 3.0
"""Seconds between two checks that the redirect still exists."""

WATCH_INTERVAL: Final = 0.5
"""Seconds between two checks for lost visitors."""

_REMOVE_RETRY: Final = 1.0

_REMOVE_RETRY_LIMIT: Final = 30.0


class RedirectService(Service):
    """Steers new connections to the listening sockets while it runs.

    @ivar ready: fires when it steers, or fails with L{StartError}.
    @ivar on_loss: called with the reason if going on would lose visitors; L{None}: go on even then.
    """

    ready: Deferred[None]
    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        redirect: IRedirect,
        listeners: Callable[[], Sequence[socket.socket]],
        visitors: LostVisitorsWatch,
    ) -> None:
        """
        @param listeners: returns the listening sockets; called when the service starts.
        """
        self._reactor = reactor
        self._redirect = redirect
        self._listeners = listeners
        self._visitors = visitors
        self._give_up = False
        self._looking = LoopingCall(self._look_after)
        self._watching = LoopingCall(self._look_for_loss)
        self._looking.clock = self._watching.clock = reactor
        self._unwatched: Deferred[Any] = succeed(None)
        self.on_loss: Callable[[VisitorsLost], None] | None = lambda problem: None

    def startService(self) -> None:
        super().startService()
        listeners = self._listeners()
        let_take_cookies(listener.getsockname()[:2] for listener in listeners)
        self.ready = self._redirect.apply(commands_for(self._reactor), listeners)
        self.ready.addCallback(self._begin_watch)

    def _begin_watch(self, result: None) -> None:
        if self.on_loss is not None:
            self._watch_visitors()
        self._unwatched = self._looking.start(LOOK_INTERVAL, now=False)
        self._unwatched.addErrback(
            lambda failure: self._log.failure(
                "Internal error: the proxy no longer checks that its redirect exists; restart the"
                " proxy",
                failure,
            )
        )

    def _watch_visitors(self) -> None:
        try:
            self._visitors.open()
        except OSError as problem:
            self._log.info(
                "Not watching whether visitors are lost: {why} (it needs CAP_NET_RAW)",
                why=problem.strerror,
            )
            return
        self._watching.start(WATCH_INTERVAL, now=False).addErrback(
            lambda failure: self._log.failure(
                "Internal error: the proxy no longer notices when visitors are lost; restart the"
                " proxy",
                failure,
            )
        )

    @inlineCallbacks
    def _look_after(self) -> Generator[Deferred[Any], Any, None]:
        try:
            yield self._redirect.look_after(commands_for(self._reactor))
        except VisitorsLost as problem:
            self._lose(problem)
        except StartError as problem:
            self._log.critical(
                "Cannot check or restore the redirect, so validations may fail; trying again:"
                " {problem}",
                problem=problem,
                is_status=True,
            )

    def _look_for_loss(self) -> None:
        if self._visitors.look():
            self._lose(
                VisitorsLost(
                    "visitors are lost: they try again and again to connect to port 443, and no"
                    " connection reaches the proxy; find the cause with: acme-alpn-proxy check"
                    " --probe",
                    os.EX_CONFIG,
                )
            )

    def _lose(self, problem: VisitorsLost) -> None:
        if self.running and self.on_loss is not None:
            self._log.critical(
                "Stopping, so that new connections reach the web server again: {problem}",
                problem=problem,
                is_status=True,
            )
            self.on_loss(problem)

    @inlineCallbacks
    def stopService(self) -> Generator[Deferred[Any], Any, None]:
        """Stop steering. If that fails, try again: closing the listener now would be worse."""
        super().stopService()
        for watch in (self._looking, self._watching):
            if watch.running:
                watch.stop()
        self._visitors.close()
        yield self._unwatched
        let_web_server_take_cookies(HTTPS)
        pause = _REMOVE_RETRY
        while True:
            commands = commands_for(self._reactor)
            try:
                yield self._redirect.remove(commands)
                return
            except StartError as problem:
                then = "gives up" if self._give_up else "still serves visitors and tries again"
                self._log.critical(
                    "Cannot stop steering; the proxy {then}: {problem}",
                    then=then,
                    problem=problem,
                    is_status=True,
                )
            if self._give_up:
                return
            yield commands.pause(pause)
            pause = min(2 * pause, _REMOVE_RETRY_LIMIT)

    def give_up(self) -> None:
        """From now on, try to remove the redirect only once more."""
        self._give_up = True

    @inlineCallbacks
    def release(self) -> Generator[Deferred[Any], Any, None]:
        """Remove what is left of the redirect: the last connection has ended."""
        try:
            yield self._redirect.release(commands_for(self._reactor))
        except StartError as problem:
            self._log.error("Cannot clean up: {problem}", problem=problem)
