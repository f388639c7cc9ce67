"""What has happened so far, counted; no I/O.

Each connection holds the L{Passage} that it was given when its route was decided.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from .clienthello import NotClientHello, Verdict
from .routing import Routing

NO_ACME_ALPN: Final = "no_acme_alpn"

UNDER_WAY: Final = "under way"
ANSWERED: Final = "answered"
NOT_ANSWERED: Final = "not answered"


@dataclass(slots=True)
class Validation:
    """A connection of a CA that validates.

    @ivar peer: C{host:port}.
    @ivar at: when it was routed, in seconds since the epoch.
    @ivar result: C{under way}, C{answered} (the ACME client sent bytes: what it said is between
        it and the CA), C{not answered}, or C{unreachable: WHY}.
    """

    peer: str
    server_name: str | None
    at: float
    result: str = UNDER_WAY


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

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Passage:
    """A connection's way: by which route, and if it is a validation, which one."""

    route: RouteCount
    validation: Validation | None = None


@dataclass
class Statistics:
    """The numbers of one proxy.

    @ivar clock: seconds since the epoch.
    @ivar state: C{starting}, C{running}, C{draining}.
    @ivar since: when that state began.
    @ivar reasons: how many connections took the fallback and why: C{no_acme_alpn}, or
        L{NotClientHello.kind}.
    @ivar last_validation: the one that was routed last.
    """

    routing: Routing
    clock: Callable[[], float] = time.time
    state: str = "starting"
    since: float = field(init=False)
    reasons: dict[str, int] = field(init=False)
    last_validation: Validation | None = None

    def __post_init__(self) -> None:
        self.since = self.clock()
        self.reasons = dict.fromkeys((NO_ACME_ALPN, *NotClientHello.KINDS), 0)
        self.acme = RouteCount(self.routing.acme.target)
        self.fallback = RouteCount(self.routing.fallback.target)
        self._to_fallback = Passage(self.fallback)

    def enter(self, state: str) -> None:
        """The proxy's state is another one now."""
        self.state, self.since = state, self.clock()

    def validation(self, peer: str, server_name: str | None) -> Passage:
        """A connection goes to the ACME client."""
        self.last_validation = Validation(peer, server_name, self.clock())
        self.acme.live += 1
        self.acme.total += 1
        return Passage(self.acme, self.last_validation)

    def visitor(self, verdict: Verdict) -> Passage:
        """A connection goes to the web server."""
        reason = verdict.kind if isinstance(verdict, NotClientHello) else NO_ACME_ALPN
        self.reasons[reason] += 1
        self.fallback.live += 1
        self.fallback.total += 1
        return self._to_fallback

    def unreachable(self, passage: Passage, why: str) -> None:
        """Its target could not be connected."""
        passage.route.failures += 1
        if passage.validation is not None:
            passage.validation.result = f"unreachable: {why}"

    def ended(self, passage: Passage, from_visitor: int, to_visitor: int) -> None:
        """A connection has ended, after so many bytes each way."""
        route, validation = passage.route, passage.validation
        route.live -= 1
        route.bytes_from_visitors += from_visitor
        route.bytes_to_visitors += to_visitor
        if validation is not None and validation.result == UNDER_WAY:
            validation.result = ANSWERED if to_visitor else NOT_ANSWERED

    def as_json(self) -> dict[str, Any]:
        """What L{json.dumps} takes; see docs/operations.md."""
        last = self.last_validation
        return {
            "state": self.state,
            "since": self.since,
            "routes": {
                "acme": self.acme.as_json(),
                "fallback": self.fallback.as_json() | {"reasons": dict(self.reasons)},
            },
            "last_validation": last
            and {name: getattr(last, name) for name in Validation.__slots__},
        }
