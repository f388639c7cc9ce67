"""Which transports are chosen, and the parts of both networks that real connections do not show."""

from __future__ import annotations

import errno
import socket
import sys
from typing import Any

from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred
from twisted.internet.error import TimeoutError as ConnectTimeout
from twisted.internet.interfaces import IProtocolFactory, IStreamClientEndpoint
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from acme_alpn_proxy.addresses import parse_address
from acme_alpn_proxy.interfaces import INetwork, ITarget
from acme_alpn_proxy.transports.deadlines import Unanswered
from acme_alpn_proxy.transports.dialer import Dialer
from acme_alpn_proxy.transports.network import (
    EndpointTarget,
    LeanNetwork,
    TwistedNetwork,
    network_for,
)

from ..memory import MemoryReactor
from ..service_case import ServiceCase
from .transport_case import Client


class ChoiceTests(SynchronousTestCase):
    def test_linux(self) -> None:
        """On Linux, with a reactor that takes descriptors, the lean transports are used."""
        network = network_for(MemoryReactor())
        verifyObject(INetwork, network)
        self.assertIsInstance(network, LeanNetwork)

    def test_elsewhere(self) -> None:
        """With any other reactor, or on any other system, Twisted's."""
        other: Any = Clock()
        network = network_for(other)
        verifyObject(INetwork, network)
        self.assertIs(type(network), TwistedNetwork)
        self.patch(sys, "platform", "freebsd14")
        self.assertIs(type(network_for(MemoryReactor())), TwistedNetwork)

    def test_targets(self) -> None:
        """The proxy itself connects to numeric addresses; Twisted connects to names and endpoint
        strings."""
        reactor: Any = installed
        network = LeanNetwork(reactor)
        for text, kind in (
            ("127.0.0.1:443", Dialer),
            ("[::1]:443", Dialer),
            ("site.example:443", EndpointTarget),
            ("unix:/run/web.sock", EndpointTarget),
            ("tcp:host=127.0.0.1:port=443", EndpointTarget),
        ):
            target = network.target(parse_address(text), 10)
            verifyObject(ITarget, target)
            self.assertIsInstance(target, kind, text)


@implementer(IStreamClientEndpoint)
class Endpoint:
    """Connects when the test says so."""

    def __init__(self) -> None:
        self.cancelled = False
        self.attempt: Deferred[Any] = Deferred(self.cancel)

    def cancel(self, attempt: Deferred[Any]) -> None:
        self.cancelled = True

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[Any]:
        return self.attempt


class EndpointTargetTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.endpoint = Endpoint()
        self.client = Client()
        self.connecting = EndpointTarget(self.endpoint, 10, self.clock).connect(self.client)

    def test_no_answer(self) -> None:
        """An endpoint that does not answer in time is cancelled."""
        self.clock.advance(10)
        self.assertTrue(self.endpoint.cancelled)
        self.client.failures[0].trap(Unanswered)
        self.assertEqual(self.client.failures[0].getErrorMessage(), "no answer within 10 s")

    def test_its_own_timeout(self) -> None:
        """If the endpoint's own timeout comes at the same time, the error has the same text."""
        self.endpoint.attempt.errback(Failure(ConnectTimeout()))
        self.assertEqual(self.client.failures[0].getErrorMessage(), "no answer within 10 s")

    def test_stopped(self) -> None:
        """An attempt that is cancelled is not a failure."""
        self.connecting.stopConnecting()
        self.assertTrue(self.endpoint.cancelled)
        self.assertEqual(self.client.failures, [])

    def test_refused(self) -> None:
        """Any other failure is passed on unchanged."""
        self.endpoint.attempt.errback(ConnectionRefusedError(errno.ECONNREFUSED, "refused"))
        self.client.failures[0].trap(ConnectionRefusedError)
        self.assertEqual(self.clock.getDelayedCalls(), [])


class LeanServiceTests(ServiceCase):
    """The service over the lean transports."""

    def test_queue(self) -> None:
        """Connections that wait when the listener closes are accepted, and live on."""
        self.proxy._network = self.proxy.listener._network = LeanNetwork(self.reactor)
        self.proxy.startService()
        waiting = [socket.create_connection(("127.0.0.1", self.port)) for _ in range(3)]
        stopped = self.proxy.stopService()
        self.linger()
        self.assertEqual(len(self.factory.live), 3)
        self.assertNoResult(stopped)
        self.proxy.end_wait()
        self.successResultOf(stopped)
        self.assertEqual(self.reactor.getReaders(), [])
        self.assertEqual(self.reactor.getDelayedCalls(), [])
        for connection in waiting:
            connection.close()
