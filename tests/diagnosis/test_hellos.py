"""The hellos that the probe sends."""

from __future__ import annotations

import socket

import pytest

from acme_alpn_proxy.diagnosis import hellos
from acme_alpn_proxy.proxy.clienthello import ClientHello, ClientHelloParser, NeedMore
from acme_alpn_proxy.proxy.routing import ACME_TLS_1


def test_acme_hello() -> None:
    """A validator's hello is as long as those of CAs, needs both halves, and offers acme-tls/1."""
    hello = hellos.acme_hello("site.example")
    assert len(hello) == hellos.ACME_HELLO_BYTES
    parser = ClientHelloParser()
    assert isinstance(parser.feed(hello[:1448]), NeedMore)
    assert parser.feed(hello[1448:]) == ClientHello((ACME_TLS_1,), "site.example")


def test_long_name() -> None:
    """The name of a host may be as long as names can be."""
    name = ".".join(["a" * 63] * 3 + ["b" * 61])
    hello = hellos.acme_hello(name)
    assert ClientHelloParser().feed(hello) == ClientHello((ACME_TLS_1,), name)


def test_hellos_differ() -> None:
    """No two hellos are the same."""
    assert hellos.acme_hello(None) != hellos.acme_hello(None)


def test_visitor_hello() -> None:
    """A visitor's hello is a valid ClientHello that offers no ACME protocol."""
    for name in ("site.example", None):
        hello = hellos.visitor_hello(name)
        assert ClientHelloParser().feed(hello) == ClientHello((), name)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("site", "site"),
        ("www.site-1.example", "www.site-1.example"),
        ("", None),
        (".site", None),
        ("my_host", None),
        ("a" * 64, None),
        ("(none)", None),
    ],
)
def test_server_name(monkeypatch: pytest.MonkeyPatch, host: str, name: str | None) -> None:
    """The hello asks for the host's name if that can be a name in the DNS."""
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert hellos.server_name() == name
