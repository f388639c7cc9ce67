"""The set of live connections and its bound; the wait until it is empty, on a test's clock."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.proxy.live import LiveConnections


class Connection:
    """Counts its resets; a real one leaves the set later, when its transports say so."""

    def __init__(self) -> None:
        self.resets = 0

    def abort(self) -> None:
        self.resets += 1

    def dialled(self) -> None:
        """It has no target."""

    def look(self) -> None:
        """It is never idle."""


class LiveConnectionsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.live = LiveConnections()

    def enter(self) -> Connection:
        connection = Connection()
        self.live.enter(connection)
        return connection

    def test_nothing_is_live(self) -> None:
        """Without live connections there is no wait, and no deadline."""
        self.successResultOf(self.live.drained(self.clock, 180))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_last_one_ends(self) -> None:
        """The wait is over when the last connection has ended, and no connection is reset later."""
        one, other = self.enter(), self.enter()
        self.assertEqual(len(self.live), 2)
        drained = self.live.drained(self.clock, 180)
        self.live.leave(one)
        self.assertNoResult(drained)
        self.live.leave(other)
        self.successResultOf(drained)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_deadline(self) -> None:
        """At the deadline, the remaining connections are reset; the wait is over when they have
        ended."""
        connection = self.enter()
        drained = self.live.drained(self.clock, 180)
        self.clock.advance(179)
        self.assertEqual((connection.resets, self.live.aborted), (0, 0))
        self.clock.advance(1)
        self.assertEqual(connection.resets, 1)
        self.assertNoResult(drained)
        self.live.abort_all()
        self.live.leave(connection)
        self.assertEqual(self.live.aborted, 1, "counted once")
        self.successResultOf(drained)

    def test_several_wait(self) -> None:
        """All waiters are notified."""
        connection = self.enter()
        waits = [self.live.drained(self.clock, 180), self.live.drained(self.clock, 60)]
        self.live.leave(connection)
        for drained in waits:
            self.successResultOf(drained)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_leaving_twice(self) -> None:
        """A second leave is harmless, and notifies nobody twice."""
        connection = self.enter()
        drained = self.live.drained(self.clock, 180)
        self.live.leave(connection)
        self.live.leave(connection)
        self.successResultOf(drained)

    def test_abort_all(self) -> None:
        """All are reset, even where that makes them leave at once."""
        live = self.live

        class Hasty(Connection):
            def abort(self) -> None:
                super().abort()
                live.leave(self)

        connections = [Hasty(), Hasty(), Hasty()]
        for connection in connections:
            live.enter(connection)
        live.abort_all()
        self.assertEqual([connection.resets for connection in connections], [1, 1, 1])
        self.assertEqual(len(live), 0)

    def test_bound(self) -> None:
        """It reports when it is full and when there is room again, each time once."""
        story: list[str] = []
        self.live.leave(self.enter())
        self.live.bound(2, lambda: story.append("full"), lambda: story.append("room"))
        one, two, three = (self.enter() for _ in range(3))
        self.assertEqual(story, ["full"])
        self.live.leave(three)
        self.assertEqual(story, ["full"])
        self.live.leave(two)
        self.live.leave(two)
        self.assertEqual(story, ["full", "room"])
        self.assertEqual(list(self.live), [one])

    def test_left_before(self) -> None:
        """Leaving an empty set is harmless."""
        self.live.leave(Connection())
