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


NAMED = Routing(
    Route("acme", "127.0.0.1:31443"),
    Route("fallback", "127.0.0.1:443"),
    {
        name: Route("acme", name)
        for name in (
            "site.example",
            "*.site.example",
            "*.deep.site.example",
            "*.example",
            "7.2.0.192.in-addr.arpa",
        )
    },
)


@pytest.mark.parametrize(
    ("server_name", "key"),
    [
        ("site.example", "site.example"),
        ("SITE.Example.", "site.example"),
        ("www.site.example", "*.site.example"),
        ("a.b.site.example", "*.site.example"),
        ("deep.site.example", "*.site.example"),
        ("www.deep.site.example", "*.deep.site.example"),
        ("other.example", "*.example"),
        ("mysite.example", "*.example"),
        ("7.2.0.192.in-addr.arpa", "7.2.0.192.in-addr.arpa"),
        ("8.2.0.192.in-addr.arpa", "127.0.0.1:31443"),
        ("example", "127.0.0.1:31443"),
        ("site.test", "127.0.0.1:31443"),
        ("..", "127.0.0.1:31443"),
        ("", "127.0.0.1:31443"),
        (None, "127.0.0.1:31443"),
        ("a." * 127 + "example", "*.example"),
    ],
)
def test_names(server_name: str | None, key: str) -> None:
    """A validation goes to the ACME client with the most specific name that covers the server name,
    otherwise to the general one. Names are compared as in DNS."""
    assert NAMED.route(ClientHello((b"acme-tls/1",), server_name)).target == key


def test_names_are_no_visitors() -> None:
    """A visitor goes to the web server, even if its server name has a separate ACME client."""
    assert NAMED.route(ClientHello((b"h2",), "site.example")) is NAMED.fallback
