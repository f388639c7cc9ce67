"""The poller without a running reactor, and the queue for retries after a shortage of
descriptors."""

from __future__ import annotations

import select
import socket

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.transports.interfaces import IPoller
from acme_alpn_proxy.transports.poller import RetryQueue

from .transport_case import Restless, TransportCase


class PollerTests(TransportCase):
    def test_interfaces(self) -> None:
        """It is a poller, and a descriptor that the reactor reads."""
        verifyObject(IPoller, self.poller)
        verifyObject(IReadDescriptor, self.poller)
        self.assertEqual(self.poller.logPrefix(), "poller")
        self.poller.connectionLost(Failure(ConnectionDone()))

    def test_others_get_their_turn(self) -> None:
        """A connection that always has events does not keep the reactor from its other work."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            self.addCleanup(end.close)
        theirs.send(b"nobody reads this")
        restless = Restless()
        self.poller.add(ours.fileno(), restless, select.EPOLLIN)
        self.poller.doRead()
        self.assertLess(restless.turns, 100)
        self.poller.remove(ours.fileno())

    def test_what_follows_is_met_at_once(self) -> None:
        """An event that follows at once from another is handled in the same turn of the reactor."""
        one, two = self.connect(), self.connect()
        one[1].on_data = lambda: two[0].sendall(b"x")
        two[1].on_data = lambda: one[0].sendall(b"x") if len(two[1].data) < 3 else None
        one[0].sendall(b"x")
        self.poller.doRead()
        self.assertEqual((one[1].data, two[1].data), (b"xxx", b"xxx"))


class RetryQueueTests(SynchronousTestCase):
    def test_closed(self) -> None:
        """Closed, it keeps no timer."""
        clock = Clock()
        retries = RetryQueue(clock)
        retries.add(lambda: None)
        retries.close()
        self.assertEqual(clock.getDelayedCalls(), [])
