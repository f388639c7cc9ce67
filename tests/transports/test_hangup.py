"""Resets on connections that are not read, with real sockets."""

from __future__ import annotations

import os
import select
import socket
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.transports.hangup import EpollHangupWatch, NoHangupWatch, hangup_watch
from acme_alpn_proxy.transports.interfaces import IHangupWatch

from ..loopback import connected, reset
from ..memory import MemoryReactor


class Transport:
    """What the watch needs from a transport: its descriptor, -1 once it is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        return self._connection.fileno()


class EpollHangupWatchTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.reactor = MemoryReactor()
        self.watch = EpollHangupWatch(self.reactor)
        self.addCleanup(self.watch.close)
        self.hung_up: list[str] = []

    def connect(self, name: str) -> tuple[Transport, socket.socket, socket.socket]:
        """A watched transport, its socket and its peer's."""
        ours, peers = connected()
        self.addCleanup(ours.close)
        self.addCleanup(peers.close)
        transport = Transport(ours)
        self.watch.add(transport, lambda: self.hung_up.append(name))
        return transport, ours, peers

    def look(self) -> None:
        """The reactor's call when the watch's descriptor is readable."""
        poll = select.poll()
        poll.register(self.watch.fileno(), select.POLLIN)
        poll.poll(200)
        self.watch.doRead()

    def test_interfaces(self) -> None:
        """It is a watch, and a descriptor that the reactor can read and does read."""
        verifyObject(IHangupWatch, self.watch)
        verifyObject(IReadDescriptor, self.watch)
        self.assertIn(self.watch, self.reactor.getReaders())
        self.assertEqual(self.watch.logPrefix(), "hangup watch")
        self.watch.connectionLost(Failure(CONNECTION_DONE))

    def test_reset(self) -> None:
        """A reset is reported once; bytes and an orderly end are not."""
        _, _, ending = self.connect("ended")
        _, _, resetting = self.connect("reset")
        ending.sendall(b"bytes")
        ending.close()
        reset(resetting)
        self.look()
        self.look()
        self.assertEqual(self.hung_up, ["reset"])

    def test_both_sides_ended(self) -> None:
        """An end on both sides is not a reset: earlier bytes may still wait to be read."""
        _, ours, peer = self.connect("ended")
        peer.sendall(b"bytes")
        peer.shutdown(socket.SHUT_WR)
        ours.shutdown(socket.SHUT_WR)
        self.look()
        self.assertEqual(self.hung_up, [])

    def test_discarded(self) -> None:
        """Nothing is reported for a transport that is not watched any more; a second discard is
        harmless."""
        transport, _, peer = self.connect("discarded")
        self.watch.add(transport, lambda: self.hung_up.append("added again"))
        self.watch.discard(transport)
        self.watch.discard(transport)
        reset(peer)
        self.look()
        self.assertEqual(self.hung_up, [])

    def test_number_used_again(self) -> None:
        """If a forked process still holds a closed connection, its reset does not count for the
        connection that now has its descriptor's number."""
        old, ours, peer = self.connect("old")
        number = ours.fileno()
        held = os.dup(number)  # as a process has it between fork and exec
        self.addCleanup(os.close, held)
        ours.close()
        self.watch.discard(old)
        _, new, new_peer = self.connect("new")
        if new.fileno() != number:
            os.dup2(new.fileno(), number)
            new = socket.socket(fileno=number)
            self.addCleanup(new.close)
            self.watch.add(Transport(new), lambda: self.hung_up.append("new"))
        reset(peer)
        self.look()
        self.assertEqual(self.hung_up, [])
        reset(new_peer)
        self.look()
        self.assertIn("new", self.hung_up)

    def test_cannot_be_watched(self) -> None:
        """A descriptor that epoll refuses is left unwatched, and the visitor goes on."""
        with open(os.devnull) as plain:
            self.watch.add(plain, lambda: None)
            self.watch.discard(plain)


class HangupWatchTests(SynchronousTestCase):
    def test_other_reactors(self) -> None:
        """On a reactor without descriptors nothing is watched."""

        other: Any = Clock()
        watch = hangup_watch(other)
        self.assertIsInstance(watch, NoHangupWatch)
        verifyObject(IHangupWatch, watch)
        watch.add(None, lambda: None)
        watch.discard(None)
        watch.close()
