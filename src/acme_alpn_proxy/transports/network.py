"""The transports for visitors and targets: lean ones where they work, otherwise Twisted's."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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

from ..addresses import HTTPS, Address
from ..interfaces import INetwork, ITarget, Reactor
from ..options import PORT
from .deadlines import DeadlineQueue, Unanswered
from .original import DialledTarget, OriginalTarget
from .sockets import TargetFactory

if TYPE_CHECKING:
    from .dialer import Dialer
    from .source import VisitorSource


class _Connecting:
    """One attempt to connect an endpoint, with the C{IConnector} method that cancels it."""

    def __init__(self, attempt: Deferred[Any]) -> None:
        self._attempt = attempt

    def stopConnecting(self) -> None:
        self._attempt.cancel()


@implementer(ITarget)
class EndpointTarget:
    """A target that any of Twisted's endpoints connects to."""

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
        """Nothing to open."""

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
        if address.is_original:
            return OriginalTarget(self._dialled_target(timeout), PORT, HTTPS)
        return EndpointTarget(address.endpoint(self._reactor, timeout), timeout, self._reactor)

    def _dialled_target(self, timeout: float) -> DialledTarget:
        from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint

        def at(host: str, port: int) -> ITarget:
            kind = TCP6ClientEndpoint if ":" in host else TCP4ClientEndpoint
            endpoint = kind(self._reactor, host, port, timeout, bindAddress=(host, 0))
            return EndpointTarget(endpoint, timeout, self._reactor)

        return at

    def from_visitors(self, plain: ITarget, seen: Callable[[], None]) -> VisitorSource | None:
        """A target on loopback that can see the visitors' addresses; where it does not, C{plain}
        makes the connection. L{None}: these transports cannot do that.

        @param seen: is called for each connection that came from the visitor's address.
        """
        return None

    def close(self) -> None:
        """Nothing to close."""


@implementer(INetwork)
class LeanNetwork(TwistedNetwork):
    """The lean transports; Twisted's for targets by name or endpoint."""

    def __init__(self, reactor: Reactor) -> None:
        super().__init__(reactor)
        from . import dialer, poller, port, source  # these need epoll(7) of Linux

        self._dialer, self._port, self._source = dialer, port, source
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
        return self._dialer_to(*where, timeout)

    def _dialled_target(self, timeout: float) -> DialledTarget:
        deadlines = self._new_deadlines(timeout)

        def at(host: str, port: int) -> ITarget:
            where: Any = Address("", host, port).socket_address()
            target: ITarget = self._dialer.BoundDialer(
                self._poller, self._retries, deadlines, *where
            )
            return target

        return at

    def _new_deadlines(self, timeout: float) -> DeadlineQueue[Any]:
        deadlines = DeadlineQueue(self._reactor, timeout, self._dialer.Connector.expire)
        self._deadlines.append(deadlines)
        return deadlines

    def from_visitors(self, plain: ITarget, seen: Callable[[], None]) -> VisitorSource | None:
        patience = self._source.ANSWERS_WITHIN
        return self._source.VisitorSource(
            plain, lambda family, address: self._dialer_to(family, address, patience), seen
        )

    def _dialer_to(self, family: int, address: Any, timeout: float) -> Dialer:
        deadlines = self._new_deadlines(timeout)
        return self._dialer.Dialer(self._poller, self._retries, deadlines, family, address)

    def close(self) -> None:
        for deadlines in self._deadlines:
            deadlines.close()
        self._retries.close()
        self._poller.close()


def network_for(reactor: Reactor) -> TwistedNetwork:
    """The leanest network that works with this reactor on this system."""
    if sys.platform == "linux" and IReactorFDSet.providedBy(reactor):
        return LeanNetwork(reactor)
    return TwistedNetwork(reactor)
