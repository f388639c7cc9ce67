"""The kind of transports for visitors and targets: lean ones where they work, else Twisted's."""

from __future__ import annotations

import socket
import sys
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.error import TimeoutError as ConnectTimeout
from twisted.internet.interfaces import (
    IListeningPort,
    IReactorFDSet,
    IReactorTime,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure
from zope.interface import implementer

from ..addresses import Address
from ..interfaces import INetwork, ITarget, Reactor
from .deadlines import DeadlineQueue, Unanswered
from .sockets import TargetFactory


class _Connecting:
    """One attempt to connect an endpoint, with the part of C{IConnector} that ends it."""

    def __init__(self, attempt: Deferred[Any]) -> None:
        self._attempt = attempt

    def stopConnecting(self) -> None:
        self._attempt.cancel()


@implementer(ITarget)
class EndpointTarget:
    """A target by way of any endpoint of Twisted's."""

    def __init__(
        self, endpoint: IStreamClientEndpoint, timeout: float, clock: IReactorTime
    ) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._clock = clock

    def connect(self, factory: TargetFactory, first: bytes = b"") -> Any:
        attempt = self._endpoint.connect(factory)
        connecting = _Connecting(attempt)
        attempt.addTimeout(self._timeout, self._clock, self._unanswered)
        attempt.addErrback(self._tell, factory, connecting)
        return connecting

    def _unanswered(self, result: object, seconds: float) -> Failure:
        return Failure(Unanswered(f"no answer within {seconds:g} s"))

    def _tell(self, failure: Failure, factory: TargetFactory, connecting: Any) -> None:
        if failure.check(ConnectTimeout):  # the endpoint's own
            failure = self._unanswered(None, self._timeout)
        if failure.check(CancelledError, ConnectingCancelledError) is None:
            factory.clientConnectionFailed(connecting, failure)


@implementer(INetwork)
class TwistedNetwork:
    """Twisted's own transports, on any reactor."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor

    def open(self) -> None:
        """There is nothing to be opened."""

    def listen(self, listener: socket.socket, factory: Factory) -> IListeningPort:
        port: IListeningPort = self._reactor.adoptStreamPort(
            listener.fileno(), listener.family, factory
        )
        return port

    def adopt(self, visitor: socket.socket, factory: Factory) -> None:
        with visitor:
            visitor.setblocking(False)
            self._reactor.adoptStreamConnection(visitor.fileno(), visitor.family, factory)

    def target(self, address: Address, timeout: float) -> ITarget:
        return EndpointTarget(address.endpoint(self._reactor, timeout), timeout, self._reactor)

    def close(self) -> None:
        """There is nothing to be closed."""


@implementer(INetwork)
class LeanNetwork(TwistedNetwork):
    """The lean transports; Twisted's for targets by name or endpoint."""

    def __init__(self, reactor: Reactor) -> None:
        super().__init__(reactor)
        from . import dialer, poller, port  # which need epoll(7), of Linux alone

        self._dialer, self._port = dialer, port
        self._poller = poller.Poller(reactor)
        self._retries = poller.RetryQueue(reactor)
        self._deadlines: list[DeadlineQueue[Any]] = []

    def open(self) -> None:
        self._poller.open()

    def listen(self, listener: socket.socket, factory: Factory) -> IListeningPort:
        port = self._port.Port(self._poller, self._retries, listener, factory)
        port.startListening()
        return port

    def adopt(self, visitor: socket.socket, factory: Factory) -> None:
        self._port.adopt(self._poller, visitor, factory)

    def target(self, address: Address, timeout: float) -> ITarget:
        where = address.socket_address()
        if where is None:
            return super().target(address, timeout)
        deadlines = DeadlineQueue(self._reactor, timeout, self._dialer.Connector.expire)
        self._deadlines.append(deadlines)
        return self._dialer.Dialer(self._poller, self._retries, deadlines, *where)

    def close(self) -> None:
        for deadlines in self._deadlines:
            deadlines.close()
        self._retries.close()
        self._poller.close()


def network_for(reactor: Reactor) -> INetwork:
    """The leanest that works with this reactor on this system."""
    if sys.platform == "linux" and IReactorFDSet.providedBy(reactor):
        return LeanNetwork(reactor)
    return TwistedNetwork(reactor)
