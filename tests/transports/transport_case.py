"""A port, its visitors and its poller on real loopback sockets, turned by hand."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol, ServerFactory
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from acme_alpn_proxy.transports.poller import Poller, RetryQueue
from acme_alpn_proxy.transports.port import Port
from acme_alpn_proxy.transports.sockets import TargetFactory

from ..memory import MemoryReactor, log_of


class Noting(Protocol):
    """Records all events."""

    transport: Any

    def __init__(self) -> None:
        self.data = b""
        self.story: list[str] = []
        self.reason: Failure | None = None
        self.on_data: Callable[[], None] = lambda: None

    def connectionMade(self) -> None:
        self.story.append("made")

    def dataReceived(self, data: bytes) -> None:
        self.data += data
        self.on_data()

    def connectionLost(self, reason: Failure = ...) -> None:  # type: ignore[assignment]
        self.story.append("lost")
        self.reason = reason


@implementer(IHalfCloseableProtocol)
class HalfNoting(Noting):
    """Records both halves of an end, too."""

    def readConnectionLost(self) -> None:
        self.story.append("end of file")

    def writeConnectionLost(self) -> None:
        self.story.append("FIN sent")


class Restless:
    """Gets the same event again and again."""

    turns = 0

    def ready(self, events: int) -> None:
        self.turns += 1

    def connectionLost(self, reason: Failure) -> None:
        pass


class Client(TargetFactory):
    """Records failures, and how many bytes were sent before each protocol was made."""

    def __init__(self) -> None:
        self.ahead: list[int] = []
        self.made: list[Any] = []
        self.failures: list[Failure] = []
        self.kind: Callable[[], Any] = HalfNoting

    def buildProtocol(self, address: Any) -> Any:
        self.ahead.append(self.sent_ahead)
        protocol = self.kind()
        self.made.append(protocol)
        return protocol

    def clientConnectionFailed(self, connector: Any, reason: Failure) -> None:
        self.failures.append(reason)


def defect() -> Any:
    """Raise an unexpected exception, as a defect would."""
    raise KeyError("no such key")


class TransportCase(SynchronousTestCase):
    """A listening port whose connections are protocols in C{accepted}."""

    def setUp(self) -> None:
        self.reactor = MemoryReactor()
        self.poller = Poller(self.reactor)
        self.poller.open()
        self.addCleanup(self.poller.close)
        self.retries = RetryQueue(self.reactor)
        self.addCleanup(self.retries.close)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.listener.close)
        self.accepted: list[Any] = []
        self.kind: Callable[[], Any] = HalfNoting
        self.factory: Factory = ServerFactory()
        self.patch(self.factory, "buildProtocol", self.build)
        self.port = Port(self.poller, self.retries, self.listener, self.factory)
        self.port.startListening()
        self.addCleanup(self.port.stopListening)
        self.lines = log_of(self)

    def build(self, address: Any) -> Any:
        protocol = self.kind()
        if protocol is not None:
            self.accepted.append(protocol)
        return protocol

    def is_quiet(self, seconds: float = 0.0) -> bool:
        """Whether the reactor would have nothing to do."""
        poll = select.poll()
        poll.register(self.poller.fileno(), select.POLLIN)
        return not poll.poll(seconds * 1000)

    def turn(self, done: Callable[[], Any], turns: int = 2_000) -> None:
        """Turn the poller until C{done()}, as the reactor would."""
        while not done():
            self.assertFalse(self.is_quiet(5), "nothing comes")
            self.poller.doRead()
            turns -= 1
            self.assertTrue(turns, "it spins")

    def turn_all(self) -> None:
        """Turn the poller until it is quiet; if it gets quiet, nothing spins."""
        for _ in range(2_000):
            if self.is_quiet(0.05):
                return
            self.poller.doRead()
        self.fail("it spins")

    def visit(self) -> socket.socket:
        visitor = socket.create_connection(self.listener.getsockname(), 5)
        self.addCleanup(visitor.close)
        return visitor

    def connect(self, kind: Callable[[], Any] = HalfNoting) -> tuple[socket.socket, Any]:
        """A visitor and the protocol of the connection."""
        self.kind = kind
        visitor, count = self.visit(), len(self.accepted)
        self.turn(lambda: len(self.accepted) > count)
        protocol = self.accepted[-1]
        self.addCleanup(lambda: protocol.transport.abortConnection())
        return visitor, protocol

    def fill_from_here(self, protocol: Any) -> int:
        """Write until something waits in the transport; how many bytes were written."""
        written = 0
        while not protocol.transport.waiting:
            protocol.transport.write(bytes(65_536))
            written += 65_536
        return written

    def read_all(self, visitor: socket.socket, count: int) -> None:
        """Read that many bytes while the poller turns."""
        visitor.settimeout(5)
        while count:
            count -= len(visitor.recv(count))
            if not self.is_quiet():
                self.poller.doRead()


def answerless(case: SynchronousTestCase) -> Any:
    """The address of a listener whose full queue drops SYNs, until the test has ended."""
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    case.addCleanup(full.close)
    for _ in range(3):
        waiting = socket.socket()
        case.addCleanup(waiting.close)
        waiting.setblocking(False)
        waiting.connect_ex(full.getsockname())
    return full.getsockname()
