"""Which target a connection goes to. Pure: no I/O, no clock.

A ClientHello whose ALPN list offers C{acme-tls/1} (RFC 8737 section 3) goes to the ACME client's
responder. Every doubt is decided for the visitor: all else goes to the fallback.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .clienthello import ClientHello, Verdict

ACME_TLS_1: Final = b"acme-tls/1"
"""The ALPN name of a TLS-ALPN-01 validation (RFC 8737 section 6.2)."""


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A way for connections to take: each is itself, whatever its target.

    @ivar name: C{acme} or C{fallback}, for logs.
    @ivar target: the address as the operator wrote it.
    """

    name: str
    target: str


@dataclass(frozen=True, slots=True)
class Routing:
    """The two routes and the choice between them."""

    acme: Route
    fallback: Route

    def route(self, verdict: Verdict) -> Route:
        """The route for a connection that began with what C{verdict} says."""
        if isinstance(verdict, ClientHello) and ACME_TLS_1 in verdict.alpn:
            return self.acme
        return self.fallback
