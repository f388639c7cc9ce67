"""Which target a connection goes to. Pure: no I/O, no clock.

A ClientHello whose ALPN list offers C{acme-tls/1} (RFC 8737 section 3) goes to an ACME client's
responder. Everything else, including every doubtful case, goes to the fallback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from .clienthello import ClientHello, Verdict

ACME_TLS_1: Final = b"acme-tls/1"
"""The ALPN name of a TLS-ALPN-01 validation (RFC 8737 section 6.2)."""


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A route for connections; two routes are different even if they have the same target.

    @ivar name: C{acme} or C{fallback}, for logs.
    @ivar target: the address as the operator wrote it.
    """

    name: str
    target: str


@dataclass(frozen=True, slots=True)
class Routing:
    """The routes and the choice between them.

    @ivar acme: for validations of all names that are not in C{named}.
    @ivar named: for validations of certain names. A key is a DNS name in lower case without the
        last dot, or C{*.} and such a name, for all names below it.
    """

    acme: Route
    fallback: Route
    named: Mapping[str, Route] = field(default_factory=dict)

    def route(self, verdict: Verdict) -> Route:
        """The route for a connection whose first bytes gave C{verdict}."""
        if isinstance(verdict, ClientHello) and ACME_TLS_1 in verdict.alpn:
            return self.route_for(verdict.server_name) if self.named else self.acme
        return self.fallback

    def route_for(self, server_name: str | None) -> Route:
        """The route for a validation of this name: the one with the most specific key.

        Names are compared as in DNS: case does not matter (RFC 4343), and a wildcard covers every
        depth (RFC 4592 section 2.2.1). A validation of an IP address has the address's reverse name
        as its server name (RFC 8738 section 6).
        """
        name = (server_name or "").removesuffix(".").lower()
        route = self.named.get(name)
        while route is None and name:
            _, _, name = name.partition(".")
            route = self.named.get(f"*.{name}")
        return route or self.acme
