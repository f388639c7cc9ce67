"""When visitors are being lost, and when it only looks like that."""

from __future__ import annotations

import socket
import struct

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.redirects import lostvisitors
from acme_alpn_proxy.redirects.lostvisitors import LostVisitorsWatch, Repetitions, Syn

from ..service_case import FakeSynSockets


def syn(number: int = 1) -> Syn:
    """A visitor's SYN."""
    return Syn(socket.AF_INET, b"\xc0\0\2\1", b"\xc0\0\2\2", 40_000 + number, number)


class RepetitionsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.repetitions = Repetitions()

    def add(self, *times: float, number: int = 1) -> None:
        for when in times:
            self.repetitions.add(syn(number), when)

    def test_one_visitor(self) -> None:
        """A visitor whose SYN comes a third time is lost."""
        self.add(0, 1)
        self.assertFalse(self.repetitions.show_loss(2))
        self.add(3)
        self.assertTrue(self.repetitions.show_loss(3))

    def test_two_visitors(self) -> None:
        """Two that repeat theirs once are lost, when they have waited for long enough."""
        self.add(0, 1, number=1)
        self.add(0.2, 1.2, number=2)
        self.assertFalse(self.repetitions.show_loss(1.2))
        self.assertTrue(self.repetitions.show_loss(1.5))

    def test_many_once(self) -> None:
        """Any number of SYNs that are not repeated are a scanner's, or a flood."""
        for number in range(10_000):
            self.add(number / 1_000, number=number)
        self.assertFalse(self.repetitions.show_loss(10))

    def test_flood_of_the_same(self) -> None:
        """SYNs that are repeated far more often than a visitor would are a flood."""
        for step in range(500):
            self.add(step / 100, number=step % 3)
        self.assertFalse(self.repetitions.show_loss(5))

    def test_several_interfaces(self) -> None:
        """A SYN that is seen on a bridge and on its port at the same time is one."""
        self.add(0, 0, 0.001, 1, 1.001)
        self.assertFalse(self.repetitions.show_loss(2.5))
        self.add(3, 3.001)
        self.assertTrue(self.repetitions.show_loss(3.5))

    def test_accepted(self) -> None:
        """SYNs from before an accepted connection do not count."""
        self.add(0, 1)
        self.repetitions.forget()
        self.add(3)
        self.assertFalse(self.repetitions.show_loss(4))

    def test_old(self) -> None:
        """SYNs from long ago show no loss."""
        self.add(0, 1)
        self.assertFalse(self.repetitions.show_loss(12))
        self.add(12, 13)
        self.assertFalse(self.repetitions.show_loss(14))


class WatchTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.sockets = FakeSynSockets()
        self.patch(lostvisitors, "SynSockets", lambda: self.sockets)
        self.accepted, self.full, self.now = 0, False, 0.0
        self.watch = LostVisitorsWatch(
            lambda: self.accepted, lambda: self.full, clock=lambda: self.now
        )
        self.watch.open()

    def lose(self) -> bool:
        """Let a visitor connect in vain; return whether the watch notices it at some time."""
        noticed = False
        for when in (0, 1, 3, 4):
            self.now += 1
            self.sockets.came.append((syn(), self.now + when))
            noticed |= self.watch.look()
        return noticed

    def test_lost(self) -> None:
        """If nothing is accepted in the meantime, the watch notices the loss."""
        self.assertTrue(self.sockets.listening)
        self.assertTrue(self.lose())

    def test_some_arrive(self) -> None:
        """While other visitors arrive, no loss is reported: the problem is between the one visitor
        and this host."""
        noticed = False
        for _ in range(4):
            self.accepted += 1
            self.sockets.came.append((syn(), self.now))
            self.now += 1
            noticed |= self.watch.look()
        self.assertFalse(noticed)

    def test_full_house(self) -> None:
        """While visitors wait to be accepted, no loss is reported."""
        self.full = True
        self.assertFalse(self.lose())

    def test_busy(self) -> None:
        """On a busy host, SYNs are not received at all until it is quiet again."""
        self.accepted += 1_000
        self.watch.look()
        self.assertFalse(self.sockets.listening)
        self.watch.look()
        self.assertTrue(self.sockets.listening)

    def test_closed(self) -> None:
        """A closed watch sees nothing."""
        self.watch.close()
        self.assertTrue(self.sockets.closed)
        self.assertFalse(self.lose())


class PacketTests(SynchronousTestCase):
    def test_families(self) -> None:
        """A SYN is known by addresses, port and sequence number, of both families."""
        tcp = struct.pack("!HHIIBBHHH", 40_000, 443, 7, 0, 0x50, 2, 0, 0, 0)
        four = bytes([0x46]) + bytes(11) + b"abcdefgh" + bytes(4) + tcp
        self.assertEqual(lostvisitors._syn(four), Syn(socket.AF_INET, b"abcd", b"efgh", 40_000, 7))
        six = bytes([0x60]) + bytes(7) + b"a" * 16 + b"b" * 16 + tcp
        self.assertEqual(
            lostvisitors._syn(six), Syn(socket.AF_INET6, b"a" * 16, b"b" * 16, 40_000, 7)
        )
        for cut in (b"", four[:22], six[:45]):
            self.assertIsNone(lostvisitors._syn(cut))
