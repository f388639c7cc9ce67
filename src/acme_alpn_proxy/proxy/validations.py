"""The validations that are under way: how many at a time, and for how long.

Every connection whose hello offers C{acme-tls/1} counts as a validation, and the ACME client may
never answer. A stranger must not be able to take all places and so keep a CA out. So the newest
connection always gets a place; when there are too many, one from the address with the most
connections is reset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Final, Protocol

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ..transports.deadlines import DeadlineQueue

MAX_VALIDATIONS: Final = 128
"""Validations at a time. A CA makes about a dozen for each name, and an order may have many names;
a stranger may make any number."""

VALIDATION_DEADLINE: Final = 60.0
"""Seconds that a validation may take. A CA allows ten."""

_NETWORK: Final = 8
"""Bytes of an IPv6 address that the network assigns; the host chooses the others itself."""


class Validation(Protocol):
    """A connection that goes to the ACME client."""

    @property
    def visitor(self) -> Any:
        """The address that it comes from, as Twisted has it."""

    @property
    def target(self) -> str:
        """The ACME client's address, for the log."""

    def abort(self) -> None:
        """Reset both sides now."""


class Validations:
    """The validations under way. Those that take too long, or are too many, are reset."""

    _log = Logger()

    def __init__(self, clock: IReactorTime, cut_short: Callable[[], None]) -> None:
        """
        @param cut_short: called for each validation that is reset here.
        """
        self._cut_short = cut_short
        self._origins: dict[Validation, bytes] = {}
        self._due: DeadlineQueue[Validation] = DeadlineQueue(
            clock, VALIDATION_DEADLINE, self._expire
        )
        self._reported = False

    def __len__(self) -> int:
        return len(self._origins)

    def enter(self, connection: Validation) -> None:
        """Count C{connection} as under way. If there are now too many, reset another one."""
        if len(self._origins) >= MAX_VALIDATIONS:
            expendable = self._most_expendable()
            self._report_crowd(expendable)
            self._reset(expendable)
        self._origins[connection] = _origin(connection.visitor.host)
        self._due.add(connection)

    def leave(self, connection: Validation) -> None:
        """C{connection} has ended; no error if it was not a validation."""
        if self._origins.pop(connection, None) is not None:
            self._due.discard(connection)
            self._reported &= bool(self._origins)

    def close(self) -> None:
        """All validations have ended."""
        self._due.close()

    def _most_expendable(self) -> Validation:
        """The oldest one from the address that has the most."""
        count = Counter(self._origins.values())
        most = max(count.values())
        return next(each for each, origin in self._origins.items() if count[origin] == most)

    def _expire(self, connection: Validation) -> None:
        self._log.warn(
            "The proxy has reset a validation that took longer than {seconds:g} s; check that the"
            " ACME client answers at {target}",
            seconds=VALIDATION_DEADLINE,
            target=connection.target,
        )
        self._reset(connection)

    def _report_crowd(self, expendable: Validation) -> None:
        """Log one line; the next one follows only after all validations have ended. Otherwise a
        stranger could fill the log."""
        if not self._reported:
            self._reported = True
            self._log.warn(
                "{count} validations are open, and for each new one the proxy resets an old one;"
                " check that the ACME client answers at {target}",
                count=MAX_VALIDATIONS,
                target=expendable.target,
            )

    def _reset(self, connection: Validation) -> None:
        self.leave(connection)
        self._cut_short()
        connection.abort()


def _origin(host: str) -> bytes:
    """What counts as one address: an IPv4 address, or the network of an IPv6 address."""
    return ip_address(host.removeprefix("::ffff:") if "." in host else host).packed[:_NETWORK]
