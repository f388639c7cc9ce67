"""The service that steers while it runs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, inlineCallbacks, succeed
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from ..errors import StartError
from ..host.processes import commands_for
from ..interfaces import IRedirect, Reactor

WATCH_INTERVAL: Final = 3.0
"""Seconds between two looks whether the redirect is still there."""

_REMOVE_RETRY: Final = 1.0

_REMOVE_RETRY_LIMIT: Final = 30.0


class RedirectService(Service):
    """Steers new connections to the listening sockets while it runs.

    @ivar ready: fires when it steers, or fails with L{StartError}.
    """

    ready: Deferred[None]
    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        redirect: IRedirect,
        listeners: Callable[[], Sequence[socket.socket]],
    ) -> None:
        """
        @param listeners: gives the listening sockets; called when the service starts.
        """
        self._reactor = reactor
        self._redirect = redirect
        self._listeners = listeners
        self._give_up = False
        self._watch = LoopingCall(self._look_after)
        self._watch.clock = reactor
        self._unwatched: Deferred[Any] = succeed(None)

    def startService(self) -> None:
        super().startService()
        self.ready = self._redirect.apply(commands_for(self._reactor), self._listeners())
        self.ready.addCallback(self._begin_watch)

    def _begin_watch(self, result: None) -> None:
        self._unwatched = self._watch.start(WATCH_INTERVAL, now=False)
        self._unwatched.addErrback(
            lambda failure: self._log.failure("The redirect is not watched any more", failure)
        )

    @inlineCallbacks
    def _look_after(self) -> Generator[Deferred[Any], Any, None]:
        try:
            yield self._redirect.look_after(commands_for(self._reactor))
        except StartError as problem:
            self._log.critical("Cannot steer any more: {problem}", problem=problem, is_status=True)

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
                self._log.critical(
                    "Cannot let go of :443: {problem}", problem=problem, is_status=True
                )
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
