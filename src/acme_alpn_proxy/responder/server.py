"""The responder: a target of validations that answers them itself.

A validation reaches it through a pair of sockets within this process, like the connection to any
other target. So it has no listening socket, and no other user of this host can connect to it.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from twisted.internet.interfaces import IAddress, IConnector
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from ..interfaces import ITarget, Reactor
from ..proxy.clienthello import ClientHello, ClientHelloParser
from ..proxy.identifiers import identifier_asked_for
from ..transports.sockets import Arrival, TargetFactory
from .pending import Authorization, Pending

if TYPE_CHECKING:
    from OpenSSL.SSL import Context

UNRECOGNIZED_NAME: Final = bytes((21, 3, 3, 0, 2, 2, 112))
"""A record with an alert (RFC 8446 section 6): fatal, unrecognized_name (RFC 6066 section 3)."""

REFUSED: Final = "refused: no ACME client has registered this name"


class _Refusal(Protocol):
    """Answers a hello with an alert."""

    def dataReceived(self, data: bytes) -> None:
        transport: Any = self.transport
        transport.write(UNRECOGNIZED_NAME)
        transport.loseConnection()


class _OrRefuse(TargetFactory):
    """Replaces the visitor's factory while another target is tried first."""

    def __init__(self, responder: Responder, factory: TargetFactory) -> None:
        self._responder = responder
        self._factory = factory

    def buildProtocol(self, addr: IAddress | None) -> Any:
        self._factory.sent_ahead = self.sent_ahead
        return self._factory.buildProtocol(cast(IAddress, addr))

    def clientConnectionFailed(self, connector: object, reason: Failure) -> None:
        self._factory.lead_with(b"")
        self._responder.refuse(self._factory)

    def arrival(self) -> Arrival:
        return self._factory.arrival()

    def lead_with(self, header: bytes) -> None:
        self._factory.lead_with(header)


@implementer(ITarget)
class Responder:
    """Answers the validations of pending identifiers, and of those with certificates in a folder.

    All others go to the next target; if nothing answers there, they are refused.
    """

    _log = Logger()

    def __init__(
        self, reactor: Reactor, pending: Pending, beyond: ITarget, folder: Path | None = None
    ) -> None:
        """
        @param beyond: the next target.
        @param folder: has an ACME client's challenge certificates, in dehydrated's layout.
        """
        self._reactor = reactor
        self._pending = pending
        self._beyond = beyond
        self._folder = folder

    def connect(self, factory: TargetFactory, first: bytes = b"") -> Any:
        hello = ClientHelloParser().feed(first)
        name = hello.server_name if isinstance(hello, ClientHello) else None
        authorization = self._pending.get(identifier_asked_for(name))
        context = (
            self._context_from_folder(name)
            if authorization is None
            else self._context_of(authorization)
        )
        if context is None:
            return self._beyond.connect(_OrRefuse(self, factory), first)
        from .tls import AnsweringFactory

        self._connect(factory, AnsweringFactory(context, factory.tell, authorization).over_tls())
        return None

    def refuse(self, factory: TargetFactory) -> None:
        """Connect C{factory} to a peer that answers with an alert."""
        factory.tell(REFUSED)
        self._connect(factory, Factory.forProtocol(_Refusal))

    def _connect(self, factory: TargetFactory, server: Factory) -> None:
        server.noisy = False
        try:
            ours, theirs = socket.socketpair()
        except OSError:
            factory.clientConnectionFailed(cast(IConnector, None), Failure())
            return
        for end, its_factory in ((theirs, server), (ours, factory)):
            with end:
                end.setblocking(False)
                self._reactor.adoptStreamConnection(end.fileno(), socket.AF_UNIX, its_factory)

    def _context_of(self, authorization: Authorization) -> Context:
        if authorization.context is None:
            from .certificates import own_certificates

            authorization.context = own_certificates().context(
                authorization.identifier, authorization.digest
            )
        return cast("Context", authorization.context)

    def _context_from_folder(self, name: str | None) -> Context | None:
        if self._folder is None or name is None:
            return None
        from .certificates import UnusableFile, context_from_folder

        try:
            return context_from_folder(self._folder, name.removesuffix(".").lower())
        except UnusableFile as problem:
            self._log.error("Cannot answer for {name}: {problem}", name=name, problem=problem)
            return None
