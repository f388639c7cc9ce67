"""A TLS handshake without anything after it: it shows whether a target answers."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Generator
from typing import Any, Final

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import connectProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from ..addresses import Address
from ..interfaces import Reactor
from .hellos import TLS_ANSWERS, server_name, tls_client

HANDSHAKE_DEADLINE: Final = 10.0
"""Seconds for a target to answer TLS."""


class OnlyAlert(Exception):
    """The other end speaks TLS, but refuses the handshake with an alert."""


class Handshake(Protocol):
    """A TLS client that makes only the handshake.

    @ivar done: fires with the application protocol of the handshake, or fails with L{OnlyAlert},
        L{ssl.SSLError} or L{ConnectionResetError}.
    """

    def __init__(self, name: str | None, *alpn: str, header: bytes = b"") -> None:
        """
        @param header: bytes to send before the hello, in the same write.
        """
        self.done: Deferred[str | None] = Deferred(lambda done: self._abort())
        self._tls, self._incoming, self._outgoing = tls_client(name, *alpn)
        self._outgoing.write(header)
        self._first = b""

    def connectionMade(self) -> None:
        self._go_on()

    def dataReceived(self, data: bytes) -> None:
        self._first = self._first or data
        self._incoming.write(data)
        self._go_on()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._end(ConnectionResetError(errno.ECONNRESET, "it closed the connection"))

    def _go_on(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self.transport.write(self._outgoing.read())  # type: ignore[union-attr]
        except ssl.SSLError as problem:
            speaks_tls = self._first.startswith(TLS_ANSWERS)
            self._end(OnlyAlert(problem.reason) if speaks_tls else problem)
        else:
            self._end(self._tls.selected_alpn_protocol())

    def _end(self, result: Any) -> None:
        if not self.done.called:
            self.done.callback(Failure(result) if isinstance(result, Exception) else result)
            self._abort()

    def _abort(self) -> None:
        self.transport.abortConnection()  # type: ignore[union-attr]


@inlineCallbacks
def handshake(
    reactor: Reactor, target: Address, patience: float, *alpn: str, header: bytes = b""
) -> Generator[Deferred[Any], Any, str | None]:
    """Connect and make a handshake, with this host's name as the server name.

    @param header: bytes to send before the handshake.
    @return: a Deferred of the application protocol; it fails like connecting or L{Handshake}.
    """
    endpoint = target.endpoint(reactor, patience)
    protocol = Handshake(server_name(), *alpn, header=header)
    client: Handshake = yield connectProtocol(endpoint, protocol)
    agreed: str | None = yield client.done.addTimeout(HANDSHAKE_DEADLINE, reactor, _too_slow)
    return agreed


def _too_slow(result: object, seconds: float) -> Failure:
    return Failure(TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s"))
