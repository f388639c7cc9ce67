"""The target at the address that the visitor connected to."""

from __future__ import annotations

import socket
from typing import Any

from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.addresses import ORIGINAL
from acme_alpn_proxy.interfaces import ITarget
from acme_alpn_proxy.transports.network import LeanNetwork, TwistedNetwork
from acme_alpn_proxy.transports.original import OriginalTarget
from acme_alpn_proxy.transports.sockets import Arrival, TargetFactory

from ..memory import MemoryReactor
from .transport_case import Client


class Here(TargetFactory):
    """A factory for a visitor who has connected to an address of this host."""

    def __init__(self, host: str, port: int) -> None:
        self.here = host, port

    def arrival(self) -> Arrival:
        return Arrival(("192.0.2.7", 50_000), ("198.51.100.1", 8443), self.here)


class Visited(Here, Client):
    """The same, with notes of its protocols."""

    def __init__(self, host: str, port: int) -> None:
        Here.__init__(self, host, port)
        Client.__init__(self)


class OriginalTargetTests(SynchronousTestCase):
    def test_address(self) -> None:
        """The target is at this host's address, also if a load balancer has named another; the
        proxy's own port means the web server's."""
        asked = []

        class Dialled:
            def __init__(self, host: str, port: int) -> None:
                asked.append((host, port))

            def connect(self, factory: Any, first: bytes = b"") -> bytes:
                return first

        made: Any = Dialled
        target = OriginalTarget(made, 21443, 443)
        verifyObject(ITarget, target)
        self.assertEqual(target.connect(Here("192.0.2.1", 443), b"hello"), b"hello")
        target.connect(Here("2001:db8::1", 8443))
        target.connect(Here("192.0.2.1", 21443))
        self.assertEqual(asked, [("192.0.2.1", 443), ("2001:db8::1", 8443), ("192.0.2.1", 443)])

    def test_by_twisted(self) -> None:
        """Twisted's own transports also connect from the address that they connect to."""
        reactor = MemoryReactor()
        target = TwistedNetwork(reactor).target(ORIGINAL, 10.0)
        for host in ("192.0.2.1", "2001:db8::1"):
            target.connect(Here(host, 443))
            dialled, port, _, _, source = reactor.tcpClients[-1]
            self.assertEqual((dialled, port, source), (host, 443, (host, 0)))


class LeanTests(SynchronousTestCase):
    def test_source(self) -> None:
        """The lean transports connect from the address that they connect to."""
        network = LeanNetwork(MemoryReactor())
        network.open()
        self.addCleanup(network.close)
        target = network.target(ORIGINAL, 10.0)
        for host in ("127.0.0.5", "::1"):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.create_server((host, 0), family=family) as listener:
                client = Visited(host, listener.getsockname()[1])
                self.assertIsNone(target.connect(client, b"hello"))
                accepted, peer = listener.accept()
                with accepted:
                    self.assertEqual(peer[0], host)
                    self.assertEqual(accepted.recv(9), b"hello")
                client.made[0].transport.abortConnection()
