"""The service that steers: within the proxy, which starts and stops it."""

from __future__ import annotations

from twisted.internet.defer import fail
from twisted.logger import formatEvent

from acme_alpn_proxy.errors import StartError

from ..memory import log_of
from ..service_case import ENDED, LET_GO, ServiceCase


class WatchTests(ServiceCase):
    """While it steers, the service checks that the redirect is still there."""

    def setUp(self) -> None:
        super().setUp()
        self.proxy.startService()
        self.story.clear()

    def test_looks_every_few_seconds(self) -> None:
        """It checks every three seconds, so that a redirect that was wiped is back within five."""
        self.reactor.advance(2.9)
        self.told()
        self.reactor.pump([0.2, 3, 3])
        self.told("look", "look", "look")

    def test_failure(self) -> None:
        """If it cannot put it back that is logged, and tried again."""
        events = log_of(self)
        self.redirect.problems["look"] = StartError("not root any more")
        self.reactor.pump([3, 3])
        self.told("look", "look")
        (event,) = events
        self.assertEqual(
            formatEvent(event),
            "Cannot check or restore the redirect, so validations may fail; trying again: not root"
            " any more",
        )
        self.assertTrue(event["is_status"])

    def test_defect(self) -> None:
        """If a check raises an unexpected exception, the checks end, and a stop still works."""
        self.redirect.problems["look"] = ValueError("unforeseen")
        self.reactor.pump([3, 3])
        self.proxy.stopService()
        self.told("look", *LET_GO)
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)

    def test_stop_waits_for_a_look(self) -> None:
        """A stop waits for a check that is under way; after it, there are no more checks."""
        looking = self.redirect.hold("look")
        self.reactor.advance(3)
        self.proxy.stopService()
        self.told("look")
        looking.callback(None)
        self.told(*LET_GO)
        self.reactor.advance(10)
        self.assertNotIn("look", self.story)


class StopDuringStartTests(ServiceCase):
    def test_no_watch(self) -> None:
        """A stop that comes before the redirect is there leaves nothing watched or open."""
        applied = self.redirect.hold("steer")
        self.proxy.startService()
        self.proxy.stopService()
        applied.callback(None)
        self.story.clear()
        self.reactor.advance(10)
        self.assertNotIn("look", self.story)
        self.assertTrue(all(each.closed for each in self.syn_sockets))


class RemovalTests(ServiceCase):
    """A redirect that cannot be removed."""

    def setUp(self) -> None:
        super().setUp()
        self.proxy.startService()
        self.story.clear()

    def test_redirect_stays(self) -> None:
        """If a redirect cannot be removed, it is tried again, and visitors are served in the
        meantime."""
        self.reactor.running = True
        self.redirect.problems["let go"] = StartError("locked")
        stopped = self.proxy.stopService()
        self.told("let go")
        self.reactor.advance(1)
        self.told(*LET_GO)
        self.linger()
        self.successResultOf(stopped)

    def test_redirect_stays_for_good(self) -> None:
        """While it cannot be removed the PID file stays; a second signal ends the attempts."""
        self.reactor.running = True
        self.patch(self.redirect, "remove", lambda commands: fail(StartError("locked")))
        stopped = self.proxy.stopService()
        for _ in range(100):
            self.reactor.advance(1)
        self.assertNoResult(stopped)
        self.told()
        self.proxy.end_wait()
        self.reactor.advance(30)
        self.told("release PID file", "close listener", *ENDED)
        self.successResultOf(stopped)

    def test_keeper_stays(self) -> None:
        """If the keeper cannot be removed, the process ends all the same."""
        self.redirect.problems["release keeper"] = StartError("locked")
        stopped = self.proxy.stopService()
        self.linger()
        self.successResultOf(stopped)
