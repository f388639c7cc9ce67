"""Which route a verdict takes."""

from __future__ import annotations

import pytest

from acme_alpn_proxy.proxy.clienthello import NEED_MORE, ClientHello, NotClientHello, Verdict
from acme_alpn_proxy.proxy.routing import Route, Routing

ROUTING = Routing(Route("acme", "127.0.0.1:31443"), Route("fallback", "127.0.0.1:443"))


@pytest.mark.parametrize("alpn", [(b"acme-tls/1",), (b"h2", b"acme-tls/1", b"http/1.1")])
def test_acme(alpn: tuple[bytes, ...]) -> None:
    """A hello that offers acme-tls/1, alone or among others, goes to the responder."""
    assert ROUTING.route(ClientHello(alpn, "site.example")) is ROUTING.acme


@pytest.mark.parametrize(
    "verdict",
    [
        ClientHello(),
        ClientHello((b"h2",)),
        ClientHello((b"ACME-TLS/1", b"acme-tls/1 ", b"acme-tls/2")),
        NotClientHello("not a handshake record"),
        NEED_MORE,
    ],
)
def test_every_doubt_is_the_visitors(verdict: Verdict) -> None:
    """All else goes to the fallback."""
    assert ROUTING.route(verdict) is ROUTING.fallback
