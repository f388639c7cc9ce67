"""Connecting to a target on loopback from the visitor's own address.

The target sees the visitor as if it had come directly. A
L{acme_alpn_proxy.host.returnpath.ReturnPath} brings the target's answers back. If they do not come
back, the connection is made from this host's address.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final

from twisted.internet.interfaces import IAddress
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..interfaces import ITarget
from .deadlines import Unanswered
from .dialer import Connector, Dialer
from .sockets import TargetFactory

ANSWERS_WITHIN: Final = 0.3
"""Seconds for the target to answer a visitor's address: over loopback, the handshake is complete
before connect(2) returns."""

MOST_UNANSWERED: Final = 1_024
"""How many addresses of visitors without an answer are remembered."""


@implementer(ITarget)
class VisitorSource:
    """A target that sees the visitor's address if possible, and otherwise this host's."""

    _log = Logger()

    def __init__(
        self,
        plain: ITarget,
        dialer_to: Callable[[int, Any], Dialer],
        seen: Callable[[], None] = lambda: None,
    ) -> None:
        """
        @param plain: connects from this host's address.
        @param dialer_to: returns the dialer to an address from an address of the same family, both
            in the socket module's form, with the deadline L{ANSWERS_WITHIN}.
        @param seen: called for each connection that came from the visitor's address.
        """
        self.plain = plain
        self.seen = seen
        self._dialer_to = dialer_to
        self._dialers: dict[bool, Dialer] = {}
        self._unanswered: dict[str, None] = {}

    def use(self, addresses: Iterable[tuple[str, int]]) -> None:
        """From now on, connect to these from the visitor's address; one address for each family."""
        for host, port in addresses:
            is_v6 = ":" in host
            family = socket.AF_INET6 if is_v6 else socket.AF_INET
            self._dialers[is_v6] = self._dialer_to(family, (host, port, 0, 0)[: 4 if is_v6 else 2])

    def use_none(self) -> None:
        """From now on, connect from this host's address."""
        self._dialers.clear()

    def connect(self, factory: TargetFactory, first: bytes = b"") -> Any:
        visitor = factory.visitor
        dialer = self._dialers.get(":" in visitor)
        if dialer is None or visitor in self._unanswered:
            return self.plain.connect(factory, first)
        sock, problem, sent = dialer.dial(first, visitor)
        if problem:
            attempt = _Attempt(self, factory, first, visitor)
            attempt.begin(dialer, sock, problem)
            return attempt
        self.seen()
        factory.sent_ahead = sent
        dialer.establish(sock, factory.buildProtocol(dialer.destination))
        return None

    def remember(self, visitor: str) -> None:
        """Remember that the target does not answer this address."""
        if not self._unanswered:
            self._log.info(
                "The web server's answer to {visitor} does not reach the proxy: for this visitor,"
                " and others with the same problem, the web server sees an address of this host",
                visitor=visitor,
            )
        if len(self._unanswered) == MOST_UNANSWERED:
            del self._unanswered[next(iter(self._unanswered))]
        self._unanswered[visitor] = None

    def not_permitted(self) -> None:
        """Note that this process has lost the privilege."""
        self._log.warn(
            "The proxy can no longer connect from visitors' addresses (this needs CAP_NET_RAW):"
            " from now on, the web server sees an address of this host"
        )
        self.use_none()


class _Attempt(TargetFactory):
    """An attempt from the visitor's address that has to wait; if it fails, one from this host's
    address follows. It has the C{IConnector} method that cancels it."""

    def __init__(
        self, source: VisitorSource, factory: TargetFactory, first: bytes, visitor: str
    ) -> None:
        self._source = source
        self._factory = factory
        self._first = first
        self._visitor = visitor
        self._stopped = False
        self._connector: Any = None

    def begin(self, dialer: Dialer, sock: Any, problem: int | None) -> None:
        """Go on with the result of L{Dialer.dial}."""
        self._connector = connector = Connector(dialer, self, self._visitor)
        connector.take(sock, problem)

    def buildProtocol(self, addr: IAddress | None) -> Any:
        self._source.seen()
        return self._factory.buildProtocol(addr)

    def clientConnectionFailed(self, connector: Any, reason: Failure) -> None:
        if self._stopped:
            self._factory.clientConnectionFailed(connector, reason)
            return
        if getattr(reason.value, "osError", None) == errno.EPERM:
            self._source.not_permitted()
        self._connector = self._source.plain.connect(self._factory, self._first)
        # Any other failure: the target accepts no connection now, from whatever address.
        if self._connector is None and reason.check(Unanswered):
            self._source.remember(self._visitor)

    def stopConnecting(self) -> None:
        self._stopped = True
        self._connector.stopConnecting()
