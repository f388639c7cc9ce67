"""The TLS of a validation, with Twisted and pyOpenSSL.

Like L{acme_alpn_proxy.responder.certificates}, this module takes longer to import than all others
together. So it is imported when the first identifier is pending.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

from OpenSSL import SSL
from twisted.internet.interfaces import IAddress, IHandshakeListener, IOpenSSLContextFactory
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from zope.interface import implementer

from ..proxy.statistics import ANSWERED
from .certificates import in_words, own_certificates
from .pending import Authorization

FAILED: Final = "the handshake failed: {why}"


def load_all() -> None:
    """Load what cryptography and OpenSSL load when they are used first."""
    TLSMemoryBIOFactory(
        _Contexts(own_certificates().context("localhost", bytes(32))), False, Factory()
    )


@implementer(IHandshakeListener)
class Answer(Protocol):
    """The server's side of a validation: only the handshake, no data (RFC 8737 section 3)."""

    factory: AnsweringFactory
    transport: Any
    _done = False

    def handshakeCompleted(self) -> None:
        self._done = True
        self.factory.answered()

    def dataReceived(self, data: bytes) -> None:
        self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if not self._done:
            self.factory.tell(FAILED.format(why=in_words(reason.value)))


class AnsweringFactory(Factory):
    """Makes the one L{Answer} of a validation."""

    noisy = False

    def __init__(
        self,
        context: SSL.Context,
        tell: Callable[[str], None],
        authorization: Authorization | None,
    ) -> None:
        """
        @param tell: called with the result of the validation, in words.
        """
        self._context = context
        self.tell = tell
        self._authorization = authorization

    def buildProtocol(self, addr: IAddress | None) -> Any:
        answer = Answer()
        answer.factory = self
        return answer

    def answered(self) -> None:
        """Report that the handshake is complete."""
        if self._authorization is not None:
            self._authorization.answered += 1
        self.tell(ANSWERED)

    def over_tls(self) -> Factory:
        """A factory that puts TLS between the transport and this one."""
        factory: Any = TLSMemoryBIOFactory(_Contexts(self._context), False, self)
        return cast(Factory, factory)


@implementer(IOpenSSLContextFactory)
class _Contexts:
    """Always returns the same context."""

    def __init__(self, context: SSL.Context) -> None:
        self._context = context

    def getContext(self) -> SSL.Context:
        return self._context
