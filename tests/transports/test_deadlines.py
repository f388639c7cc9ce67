"""Deadlines that share one timer."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.transports.deadlines import DeadlineQueue


class DeadlineQueueTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.expired: list[str] = []
        self.queue: DeadlineQueue[str] = DeadlineQueue(self.clock, 5, self.expired.append)

    def test_each_has_its_time(self) -> None:
        """Each item is reported at the end of its own time, with one timer for all."""
        self.queue.add("first")
        self.clock.advance(2)
        self.queue.add("second")
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.assertEqual((len(self.queue), self.queue.oldest()), (2, "first"))
        self.clock.advance(2.9)
        self.assertEqual(self.expired, [])
        self.clock.advance(0.1)
        self.assertEqual(self.expired, ["first"])
        self.clock.advance(2)
        self.assertEqual(self.expired, ["first", "second"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_discarded(self) -> None:
        """A discarded item is not reported, and a second discard is harmless."""
        self.queue.add("made it")
        self.queue.discard("made it")
        self.queue.discard("made it")
        self.clock.advance(2)
        self.queue.add("late")
        self.clock.advance(3)
        self.assertEqual(self.expired, [])
        self.clock.advance(2)
        self.assertEqual(self.expired, ["late"])

    def test_added_meanwhile(self) -> None:
        """An item that is added while others expire has its full time."""
        queue: DeadlineQueue[int] = DeadlineQueue(self.clock, 5, lambda item: queue.add(item + 1))
        queue.add(1)
        self.clock.advance(5)
        self.assertEqual(queue.oldest(), 2)
        self.clock.advance(4.9)
        self.assertEqual(queue.oldest(), 2)
        self.clock.advance(0.1)
        self.assertEqual(queue.oldest(), 3)

    def test_close(self) -> None:
        """Closed, it forgets all and leaves no timer; a second time it does nothing."""
        self.queue.add("forgotten")
        self.queue.close()
        self.queue.close()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(len(self.queue), 0)
