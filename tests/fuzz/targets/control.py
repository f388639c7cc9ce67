"""The requests of ACME clients on the control socket."""

from __future__ import annotations

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from zope.interface import implementer

from acme_alpn_proxy.interfaces import ISteerable
from acme_alpn_proxy.responder.control import Control, ControlFactory, ControlProtocol
from acme_alpn_proxy.responder.pending import Pending

from ..conversation import TURN, pieces

_DIGEST = b"n4bQgYhMfWWaL-qgxVrQFaO_TxsrC4Is0V1sFbDwCgg"

SEEDS = [
    b"auth site.example " + _DIGEST + b"\n" + TURN + b"report site.example\r\n",
    b"auth 192.0.2.1 " + _DIGEST + b" 60\nleave\nunauth 192.0.2.1\n",
    b"auth 2001:db8::1 " + _DIGEST + b" 1e3\nunauth 2001:db8::1\n",
    b"auth *.site.example x\nnothing\n\n\xff\n" + b"x" * 1_100 + b"\n",
]


@implementer(ISteerable)
class _Steers:
    def need(self, what: object) -> Deferred[None]:
        return succeed(None)

    def needed_no_more(self, what: object) -> None:
        """It goes on."""


def check(data: bytes) -> None:
    """Whatever is sent: nothing is raised, each line gets an answer of one line, and a well-behaved
    client is served afterwards."""
    control = Control(Pending(Clock()), _Steers(), list, lambda: None, lambda: succeed(None))
    _talk(control, pieces(data))
    good = [b"auth good.example " + _DIGEST + b"\n", b"unauth good.example\n"]
    assert _talk(control, good) == b"OK\nOK\n"


def _talk(control: Control, sent: list[bytes]) -> bytes:
    """The answer to a new client."""
    factory, transport = ControlFactory(control), StringTransport()
    client = ControlProtocol("a client (PID 7)")
    client.factory = factory
    client.callLater = Clock().callLater  # type: ignore[method-assign,assignment]
    client.makeConnection(transport)
    for piece in sent:
        if not transport.disconnecting:
            client.dataReceived(piece)
    client.connectionLost()
    answers: bytes = transport.value()
    assert factory.clients == 0
    for line in answers.splitlines():
        assert line.startswith((b"OK", b"ERR "))
    return answers
