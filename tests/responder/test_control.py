"""The control socket, line by line."""

from __future__ import annotations

import base64
import hashlib
import json

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.interfaces import ISteerable
from acme_alpn_proxy.monitoring.status import ValidationStatus
from acme_alpn_proxy.responder.control import (
    LONGEST_LINE,
    PATIENCE,
    Control,
    ControlFactory,
    ControlProtocol,
)
from acme_alpn_proxy.responder.pending import Pending

DIGEST = hashlib.sha256(b"key authorization")
B64 = base64.urlsafe_b64encode(DIGEST.digest()).decode().rstrip("=")
ASKED: list[ValidationStatus] = [
    {"peer": "192.0.2.7:1", "server_name": "other.example", "at": 1.0, "result": "refused"}
]


@implementer(ISteerable)
class SlowProxy:
    """A proxy that steers when the test says so."""

    def __init__(self) -> None:
        self.steers: Deferred[None] = Deferred()
        self.needs: set[object] = set()

    def need(self, what: object) -> Deferred[None]:
        self.needs.add(what)
        return self.steers

    def needed_no_more(self, what: object) -> None:
        self.needs.discard(what)


class ControlCase(SynchronousTestCase):
    """A client that is connected."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.pending = Pending(self.clock)
        self.proxy = SlowProxy()
        self.left = 0
        self.control = Control(
            self.pending, self.proxy, lambda: ASKED, self.leave, lambda: succeed(None)
        )
        self.factory = ControlFactory(self.control)
        self.transport = StringTransport()
        self.client = ControlProtocol("a client (PID 7)")
        self.client.factory = self.factory
        self.client.callLater = self.clock.callLater  # type: ignore[method-assign,assignment]
        self.client.makeConnection(self.transport)

    def leave(self) -> None:
        self.left += 1

    def send(self, *lines: str) -> list[str]:
        """The answers to these lines."""
        self.client.dataReceived("".join(f"{line}\n" for line in lines).encode())
        answers: list[str] = self.transport.value().decode().splitlines()
        self.transport.clear()
        return answers

    def steer(self) -> None:
        self.proxy.steers.callback(None)


class RequestTests(ControlCase):
    """The requests."""

    def test_waits_for_steering(self) -> None:
        """C{auth} is answered when connections are steered; later requests are answered after
        it."""
        self.assertTrue(verifyObject(ISteerable, self.proxy))
        self.assertEqual(self.send(f"auth a.example {B64}", "unauth b.example"), [])
        self.assertEqual(self.proxy.needs, {self.control})
        self.steer()
        self.assertEqual(self.send(), ["OK", "OK"])
        authorization = self.pending.get("a.example")
        assert authorization is not None
        self.assertEqual(authorization.digest, DIGEST.digest())
        self.assertEqual(authorization.asked_by, "a client (PID 7)")

    def test_cannot_steer(self) -> None:
        """If it cannot steer, the answer has the reason, and nothing is pending."""
        self.proxy.steers.errback(StartError("the firewall is in the way; open it"))
        self.assertEqual(
            self.send(f"auth a.example {B64}"), ["ERR the firewall is in the way; open it"]
        )
        self.assertEqual(len(self.pending), 0)

    def test_lets_go(self) -> None:
        """When the last identifier is ended or expires, the proxy need not steer any longer."""
        self.steer()
        self.send(f"auth a.example {B64}", f"auth b.example {DIGEST.hexdigest()} 30")
        self.send("unauth A.EXAMPLE")
        self.assertEqual(self.proxy.needs, {self.control})
        self.clock.advance(30)
        self.assertEqual(self.proxy.needs, set())
        self.assertEqual(self.left, 0)

    def test_outlives_its_connection(self) -> None:
        """A pending identifier stays pending after its client has gone, since a client of ualpn
        goes at once."""
        self.send(f"auth a.example {B64}")
        self.client.readConnectionLost()
        self.assertFalse(self.transport.disconnecting)
        self.steer()
        self.assertEqual(self.send(), ["OK"])
        self.assertTrue(self.transport.disconnecting)
        self.assertEqual(len(self.pending), 1)

    def test_report(self) -> None:
        """A client can find out who asked for what, and how often its name was answered."""
        self.steer()
        self.send(f"auth a.example {B64}")
        authorization = self.pending.get("a.example")
        assert authorization is not None
        authorization.answered = 3
        (answer,) = self.send("report a.example")
        word, _, text = answer.partition(" ")
        self.assertEqual(word, "OK")
        asked = {"peer": "192.0.2.7:1", "name": "other.example", "answer": "refused"}
        self.assertEqual(
            json.loads(text), {"identifier": "a.example", "answered": 3, "asked": [asked]}
        )
        (answer,) = self.send("report b.example")
        self.assertIn('"answered": 0', answer)

    def test_leave(self) -> None:
        """C{leave} ends the program: at once if nothing is pending, otherwise as soon as nothing
        is."""
        self.assertEqual(self.send("leave"), ["OK"])
        self.assertEqual(self.left, 1)
        self.steer()
        self.send(f"auth a.example {B64}", "leave")
        self.assertEqual(self.left, 1)
        self.send("unauth a.example")
        self.assertEqual(self.left, 2)
        self.send(f"auth a.example {B64}", "unauth a.example")
        self.assertEqual(self.left, 2)

    def test_nonsense(self) -> None:
        """The answer to a wrong request shows the right form, and nothing changes."""
        for line in (
            "",
            "auth",
            "auth a.example",
            f"auth a.example {B64} 10 10",
            "unauth",
            "report",
            "leave now",
            "help",
        ):
            (answer,) = self.send(line)
            self.assertTrue(answer.startswith("ERR a line is: auth "), answer)
        for line, why in (
            (f"auth *.example {B64}", "wildcard"),
            (f"auth bücher.example {B64}", "xn--"),
            ("auth a.example AAAA", "SHA-256"),
            (f"auth a.example {B64} never", "lifetime"),
            ("unauth *.example", "wildcard"),
            ("report a_b..c", "neither"),
        ):
            (answer,) = self.send(line)
            self.assertTrue(answer.startswith("ERR "))
            self.assertIn(why, answer)
        self.assertEqual(len(self.pending), 0)
        self.assertEqual(self.proxy.needs, set())


class ConnectionTests(ControlCase):
    """Other behaviour of clients."""

    def test_half_a_line(self) -> None:
        """Half a line has no effect; a client that does not finish it is disconnected after a
        time."""
        self.client.dataReceived(f"auth a.example {B64}".encode())
        self.clock.advance(PATIENCE - 1)
        self.assertFalse(self.transport.disconnecting)
        self.clock.advance(1)
        self.assertTrue(self.transport.disconnecting)
        self.assertEqual(len(self.pending), 0)

    def test_megabyte(self) -> None:
        """A line that does not end is not kept."""
        for _ in range(1_024):
            if not self.transport.disconnecting:
                self.client.dataReceived(b"a" * 1_024)
        self.assertEqual(
            self.transport.value(), f"ERR a line has {LONGEST_LINE} bytes at most\n".encode()
        )
        self.assertTrue(self.transport.disconnecting)

    def test_counted(self) -> None:
        """The clients are counted, for their bound."""
        self.assertEqual(self.factory.clients, 1)
        self.client.connectionLost()
        self.assertEqual(self.factory.clients, 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_carriage_return(self) -> None:
        """A line may end as on another system."""
        self.assertEqual(self.send("unauth a.example\r"), ["OK"])
