"""Counters of what has happened so far; no I/O.

When its route is decided, each connection gets the L{ConnectionRecord} that counts it.
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
"""A line of the log; C{explain} parses it."""

NO_NAME: Final = "no name"

REMEMBERED: Final = 16
"""How many validations C{status} shows: more than a CA makes for one name."""


@dataclass(slots=True)
class Validation:
    """A connection that a CA makes for a validation.

    @ivar peer: C{host:port}.
    @ivar at: when it was routed, in seconds since the epoch.
    @ivar result: C{under way}, C{answered} (the ACME client sent bytes; only it and the CA know
        what they mean), C{not answered}, C{unreachable: WHY}, or the text of our own responder.
    """

    peer: str
    server_name: str | None
    at: float
    result: str = UNDER_WAY

    def status(self) -> ValidationStatus:
        """The values, in the form that C{status} gets."""
        return {
            "peer": self.peer,
            "server_name": self.server_name,
            "at": self.at,
            "result": self.result,
        }


@dataclass(slots=True)
class RouteCount:
    """The numbers of one route.

    @ivar target: the address as the operator wrote it.
    @ivar live: connections that took it and have not ended.
    @ivar total: connections that took it.
    @ivar failures: how many of them could not reach the target.
    @ivar bytes_from_visitors: bytes passed on to the target, counted when a connection ends.
    @ivar bytes_to_visitors: bytes passed on from the target, counted when a connection ends.
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
    """Where a connection is counted: its route's numbers and, for a validation, its entry."""

    route: RouteCount
    validation: Validation | None = None


@dataclass
class Statistics:
    """The numbers of one proxy.

    @ivar clock: seconds since the epoch.
    @ivar state: C{starting}, C{running}, C{draining}.
    @ivar since: when that state began.
    @ivar doubts: all possible values of L{NotClientHello.kind}.
    @ivar reasons: how many connections took the fallback, by reason: C{no_acme_alpn} or one of
        C{doubts}.
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
        """The validation that was routed last."""
        return self.validations[-1] if self.validations else None

    def enter(self, state: State) -> None:
        """Change the proxy's state to C{state}."""
        self.state, self.since = state, self.clock()

    def validation(self, route: Route, peer: str, server_name: str | None) -> ConnectionRecord:
        """Count a connection that goes to an ACME client."""
        validation = Validation(peer, server_name, self.clock())
        self.validations.append(validation)
        count = self._of_acme[route]
        count.live += 1
        count.total += 1
        return ConnectionRecord(count, validation)

    def told(self, record: ConnectionRecord, answer: str) -> None:
        """Note the result of a validation, in words."""
        assert record.validation is not None
        record.validation.result = answer

    def validation_cut_short(self) -> None:
        """Count a validation that was reset because it took too long, or there were too many."""
        self.cut_short += 1

    def visitor(self, verdict: Verdict) -> ConnectionRecord:
        """Count a connection that goes to the web server."""
        reason = verdict.kind if isinstance(verdict, NotClientHello) else NO_ACME_ALPN
        self.reasons[reason] += 1
        self.fallback.live += 1
        self.fallback.total += 1
        return self._to_fallback

    def visitor_seen(self) -> None:
        """The web server has been connected from the visitor's address."""
        self.seen += 1

    def unreachable(self, record: ConnectionRecord, why: str) -> None:
        """Count a connection whose target could not be reached."""
        record.route.failures += 1
        if record.validation is not None:
            record.validation.result = f"unreachable: {why}"

    def ended(self, record: ConnectionRecord, from_visitor: int, to_visitor: int) -> None:
        """Count the end of a connection, and its bytes in each direction."""
        route, validation = record.route, record.validation
        route.live -= 1
        route.bytes_from_visitors += from_visitor
        route.bytes_to_visitors += to_visitor
        if validation is not None and validation.result == UNDER_WAY:
            validation.result = ANSWERED if to_visitor else NOT_ANSWERED

    def status(self, redirect: str, undecided: int) -> ProxyStatus:
        """All numbers, for C{status}.

        @param redirect: how connections are steered.
        @param undecided: how many connections have no route yet.
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
