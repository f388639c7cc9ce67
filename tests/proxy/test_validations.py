"""How many validations there are at a time, from which peers, and for how long."""

from __future__ import annotations

from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.proxy.validations import (
    MAX_VALIDATIONS,
    VALIDATION_DEADLINE,
    Validations,
)

from ..memory import log_of


class Connection:
    """A validation from an address."""

    target = "127.0.0.1:31443"

    def __init__(self, host: str) -> None:
        kind: Any = IPv6Address if ":" in host else IPv4Address
        self.visitor: Any = kind("TCP", host, 50_000)
        self.was_reset = False

    def abort(self) -> None:
        self.was_reset = True


class ValidationsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.cut_short = 0
        self.validations = Validations(self.clock, self.count)
        self.events = log_of(self)

    def count(self) -> None:
        self.cut_short += 1

    def arrive(self, *hosts: str) -> list[Connection]:
        connections = [Connection(host) for host in hosts]
        for connection in connections:
            self.validations.enter(connection)
        return connections

    def test_stranger_keeps_nobody_out(self) -> None:
        """If a stranger opens too many validations, only the stranger's are reset; those of the CA
        stay."""
        for ca, stranger in (
            ("192.0.2.1", "198.51.100.1"),
            ("::ffff:192.0.2.1", "::ffff:198.51.100.1"),
            ("2001:db8:1::1", "2001:db8:2::1"),
        ):
            self.setUp()
            strangers = self.arrive(*[stranger] * MAX_VALIDATIONS)
            of_ca = self.arrive(*[ca] * 12)
            strangers += self.arrive(*[stranger] * 1_000)
            self.assertFalse(any(each.was_reset for each in of_ca))
            left = [each for each in strangers if not each.was_reset]
            self.assertEqual(left, strangers[-(MAX_VALIDATIONS - 12) :])
            self.assertEqual(self.cut_short, len(strangers) - len(left))
            self.assertEqual(len(self.validations), MAX_VALIDATIONS)

    def test_one_network_is_one_stranger(self) -> None:
        """A network of IPv6 addresses gets no more places than a single address."""
        (ca,) = self.arrive("2001:db8:1::1")
        self.arrive(*(f"2001:db8:2::{number:x}" for number in range(1, 1_000)))
        self.assertFalse(ca.was_reset)

    def test_from_everywhere(self) -> None:
        """If each comes from another place, the oldest goes."""
        oldest, second, *_ = self.arrive(*(f"192.0.2.{last}" for last in range(MAX_VALIDATIONS)))
        self.arrive("198.51.100.1")
        self.assertEqual((oldest.was_reset, second.was_reset), (True, False))

    def test_deadline(self) -> None:
        """Each has a minute. One that has ended is not reset."""
        one, two = self.arrive("192.0.2.1", "192.0.2.2")
        self.validations.leave(one)
        self.validations.leave(one)
        self.clock.advance(VALIDATION_DEADLINE)
        self.assertEqual((one.was_reset, two.was_reset), (False, True))
        self.assertEqual((len(self.validations), self.cut_short, len(self.events)), (0, 1, 1))
        self.validations.close()

    def test_one_line(self) -> None:
        """A flood is one line in the log, until it is over."""
        for _ in range(2):
            some = self.arrive(*["192.0.2.1"] * (MAX_VALIDATIONS + 100))
            for each in some:
                self.validations.leave(each)
        self.assertEqual(len(self.events), 2)
