"""The identifiers that the responder answers for: each is pending for a limited time."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict

from twisted.internet.interfaces import IReactorTime

from ..monitoring.status import PENDING_SHOWN, PendingStatus

DIGEST_SIZE: Final = 32
"""Bytes of a SHA-256 digest."""

LIFETIME: Final = 3600.0
"""Seconds for which an identifier is pending, unless its client gives another time or ends it."""

LONGEST_LIFETIME: Final = 86_400.0

MOST_PENDING: Final = 20_000
"""Identifiers at a time, which take about 20 MB. With the usual CAs, an order has at most 100
names."""


class PendingPart(TypedDict):
    """The part of a status that shows what is pending."""

    pending: list[PendingStatus]
    pending_count: int


class BadRequest(ValueError):
    """A client's request makes no sense, or asks for too much; the message says why."""


@dataclass(slots=True)
class Authorization:
    """A pending identifier.

    @ivar identifier: in the normal form of L{acme_alpn_proxy.proxy.identifiers}.
    @ivar digest: SHA-256 of the key authorization (RFC 8737 section 3), 32 bytes.
    @ivar asked_by: the program that has asked for it, for people.
    @ivar expires: when it ends, in seconds of the reactor's clock.
    @ivar answered: how many handshakes for it have been completed.
    """

    identifier: str
    digest: bytes
    asked_by: str
    expires: float
    answered: int = 0
    context: Any = None
    _expiry: Any = field(default=None, repr=False)


class Pending:
    """The pending identifiers.

    @ivar on_empty: called when the last one has gone.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._by_identifier: dict[str, Authorization] = {}
        self.on_empty: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._by_identifier)

    def get(self, identifier: str | None) -> Authorization | None:
        """The authorization of C{identifier}; L{None} if it is not pending."""
        return None if identifier is None else self._by_identifier.get(identifier)

    def add(
        self, identifier: str, digest: bytes, asked_by: str, lifetime: float = LIFETIME
    ) -> Authorization:
        """Make C{identifier} pending from now on; replaces an earlier one; raises L{BadRequest}.

        @param lifetime: in seconds.
        """
        earlier = self._by_identifier.pop(identifier, None)
        if earlier is not None:
            earlier._expiry.cancel()
        elif len(self._by_identifier) >= MOST_PENDING:
            raise BadRequest(
                f"the limit of {MOST_PENDING} pending identifiers is reached; remove some with:"
                " unauth IDENT"
            )
        new = Authorization(identifier, digest, asked_by, self._clock.seconds() + lifetime)
        new._expiry = self._clock.callLater(lifetime, self._drop, identifier)
        self._by_identifier[identifier] = new
        return new

    def remove(self, identifier: str) -> None:
        """C{identifier} is no longer pending; no error if it never was."""
        authorization = self._by_identifier.get(identifier)
        if authorization is not None:
            authorization._expiry.cancel()
            self._drop(identifier)

    def status(self) -> PendingPart:
        """The pending identifiers, for C{status}."""
        now = self._clock.seconds()
        shown = itertools.islice(self._by_identifier.values(), PENDING_SHOWN)
        return {
            "pending": [
                {
                    "identifier": each.identifier,
                    "asked_by": each.asked_by,
                    "seconds_left": max(0.0, each.expires - now),
                    "answered": each.answered,
                }
                for each in shown
            ],
            "pending_count": len(self._by_identifier),
        }

    def _drop(self, identifier: str) -> None:
        del self._by_identifier[identifier]
        if not self._by_identifier:
            self.on_empty()


def parse_digest(text: str) -> bytes:
    """Parse a digest: 64 hexadecimal digits, with or without colons, or base64url (RFC 4648 section
    5) without padding; raises L{BadRequest}."""
    digits = text.replace(":", "")
    try:
        digest = (
            bytes.fromhex(digits)
            if len(digits) == 2 * DIGEST_SIZE
            else base64.b64decode(f"{text.rstrip('=')}=", altchars=b"-_", validate=True)
        )
    except (ValueError, binascii.Error):
        digest = b""
    if len(digest) != DIGEST_SIZE:
        raise BadRequest(
            "the digest must be SHA-256 of the key authorization, in base64url (43 characters) or"
            " hexadecimal (64)"
        )
    return digest


def parse_lifetime(text: str) -> float:
    """Parse a number of seconds; raises L{BadRequest}."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_LIFETIME:
        raise BadRequest(f"a lifetime is a number of seconds up to {LONGEST_LIFETIME:g}")
    return seconds
