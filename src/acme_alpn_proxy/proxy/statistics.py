"""What has happened so far, counted; no I/O.

Each connection holds the L{ConnectionRecord} that it got when its route was decided.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from ..monitoring.status import ProxyStatus, RouteStatus, State, ValidationStatus
from .clienthello import NotClientHello, Verdict
from .routing import Route, Routing

NO_ACME_ALPN: Final = "no_acme_alpn"

UNDER_WAY: Final = "under way"
ANSWERED: Final = "answered"
NOT_ANSWERED: Final = "not answered"

VALIDATION_ENDED: Final = "Validation of {server_name} by {peer}: {result}"
"""A line of the log, which C{explain} reads."""

NO_NAME: Final = "no name"

REMEMBERED: Final = 16
"""Validations that C{status} shows: more than a CA makes for a name."""


@dataclass(slots=True)
class Validation:
    """A connection of a CA that validates.

    @ivar peer: C{host:port}.
    @ivar at: when it was routed, in seconds since the epoch.
    @ivar result: C{under way}, C{answered} (the ACME client sent bytes: what it said is between
        it and the CA), C{not answered}, or C{unreachable: WHY}; or what the responder says.
    """

    peer: str
    server_name: str | None
    at: float
    result: str = UNDER_WAY

    def status(self) -> ValidationStatus:
        """The same, for C{status}."""
        return {
            "peer": self.peer,
            "server_name": self.server_name,
            "at": self.at,
            "result": self.result,
        }


@dataclass(slots=True)
class RouteCount:
    """One route's numbers.

    @ivar target: the address as the operator wrote it.
    @ivar live: connections that have taken it and have not ended.
    @ivar total: connections that have taken it.
    @ivar failures: how many of them did not reach the target.
    @ivar bytes_from_visitors: passed on to the target by those that have ended.
    @ivar bytes_to_visitors: passed on from the target by those that have ended.
    """

    target: str
    live: int = 0
    total: int = 0
    failures: int = 0
    bytes_from_visitors: int = 0
    bytes_to_visitors: int = 0

    def status(self) -> RouteStatus:
        """These numbers, for C{status}."""
        return {
            "target": self.target,
            "live": self.live,
            "total": self.total,
            "failures": self.failures,
            "bytes_from_visitors": self.bytes_from_visitors,
            "bytes_to_visitors": self.bytes_to_visitors,
        }


@dataclass(frozen=True, slots=True)
class ConnectionRecord:
    """What a connection is counted in: its route's numbers, and if it is a validation, that."""

    route: RouteCount
    validation: Validation | None = None


@dataclass
class Statistics:
    """The numbers of one proxy.

    @ivar clock: seconds since the epoch.
    @ivar state: C{starting}, C{running}, C{draining}.
    @ivar since: when that state began.
    @ivar doubts: the values of L{NotClientHello.kind} that there may be.
    @ivar reasons: how many connections took the fallback, and why: C{no_acme_alpn}, or one of the
        doubts.
    @ivar named: the numbers of validations that have a target of their own, by name.
    @ivar validations: the last L{REMEMBERED}, the newest at the end.
    """

    routing: Routing
    doubts: Iterable[str]
    clock: Callable[[], float] = time.time
    state: State = "starting"
    since: float = field(init=False)
    reasons: dict[str, int] = field(init=False)
    named: dict[str, RouteCount] = field(init=False)
    validations: deque[Validation] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def __post_init__(self) -> None:
        self.since = self.clock()
        self.reasons = dict.fromkeys((NO_ACME_ALPN, *self.doubts), 0)
        self.acme = RouteCount(self.routing.acme.target)
        self.fallback = RouteCount(self.routing.fallback.target)
        self.named = {name: RouteCount(route.target) for name, route in self.routing.named.items()}
        self._of_acme = {route: self.named[name] for name, route in self.routing.named.items()}
        self._of_acme[self.routing.acme] = self.acme
        self.cut_short = 0
        self.seen = 0
        self._to_fallback = ConnectionRecord(self.fallback)

    @property
    def last_validation(self) -> Validation | None:
        """The one that was routed last."""
        return self.validations[-1] if self.validations else None

    def enter(self, state: State) -> None:
        """The proxy's state changes to C{state}."""
        self.state, self.since = state, self.clock()

    def validation(self, route: Route, peer: str, server_name: str | None) -> ConnectionRecord:
        """A connection goes to an ACME client."""
        validation = Validation(peer, server_name, self.clock())
        self.validations.append(validation)
        count = self._of_acme[route]
        count.live += 1
        count.total += 1
        return ConnectionRecord(count, validation)

    def told(self, record: ConnectionRecord, answer: str) -> None:
        """What came of a validation, in words."""
        assert record.validation is not None
        record.validation.result = answer

    def validation_cut_short(self) -> None:
        """One was reset because it took too long, or because there were too many."""
        self.cut_short += 1

    def visitor(self, verdict: Verdict) -> ConnectionRecord:
        """A connection goes to the web server."""
        reason = verdict.kind if isinstance(verdict, NotClientHello) else NO_ACME_ALPN
        self.reasons[reason] += 1
        self.fallback.live += 1
        self.fallback.total += 1
        return self._to_fallback

    def visitor_seen(self) -> None:
        """The web server has been connected from the visitor's address."""
        self.seen += 1

    def unreachable(self, record: ConnectionRecord, why: str) -> None:
        """Its target could not be connected."""
        record.route.failures += 1
        if record.validation is not None:
            record.validation.result = f"unreachable: {why}"

    def ended(self, record: ConnectionRecord, from_visitor: int, to_visitor: int) -> None:
        """A connection has ended, after so many bytes each way."""
        route, validation = record.route, record.validation
        route.live -= 1
        route.bytes_from_visitors += from_visitor
        route.bytes_to_visitors += to_visitor
        if validation is not None and validation.result == UNDER_WAY:
            validation.result = ANSWERED if to_visitor else NOT_ANSWERED

    def status(self, redirect: str, undecided: int) -> ProxyStatus:
        """All of it, for C{status}.

        @param redirect: how connections are steered.
        @param undecided: connections whose route is not decided yet.
        """
        last = self.last_validation
        reached = self.fallback.total - self.fallback.failures
        return {
            "state": self.state,
            "since": self.since,
            "redirect": redirect,
            "undecided": undecided,
            "routes": {
                "acme": {**self.acme.status(), "cut_short": self.cut_short},
                "acme_for": {name: count.status() for name, count in self.named.items()},
                "fallback": {
                    **self.fallback.status(),
                    "reasons": dict(self.reasons),
                    "from_visitor_address": self.seen,
                    "from_host_address": max(0, reached - self.seen),
                },
            },
            "last_validation": None if last is None else last.status(),
            "validations": [validation.status() for validation in self.validations],
        }
