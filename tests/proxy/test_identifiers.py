"""Identifiers, and the server names that ask for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acme_alpn_proxy.proxy.identifiers import (
    BadIdentifier,
    identifier_asked_for,
    parse_identifier,
    server_name_for,
)

LONGEST = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ("site.example", "site.example"),
        ("SITE.Example", "site.example"),
        ("site.example.", "site.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        (LONGEST, LONGEST),
        ("192.0.2.7", "192.0.2.7"),
        ("2001:DB8:0::1", "2001:db8::1"),
    ],
)
def test_one_spelling(text: str, identifier: str) -> None:
    """Every spelling of an identifier becomes the one that a CA uses."""
    assert parse_identifier(text) == identifier


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is needed"),
        (".", "is needed"),
        ("*.site.example", "wildcard"),
        ("bücher.example", "A-label"),
        (f"e{LONGEST}", "253"),
        (f"{'a' * 64}.example", "neither"),
        ("-a.example", "neither"),
        ("a-.example", "neither"),
        ("a..example", "neither"),
        ("a b.example", "neither"),
        ("../../etc/passwd", "neither"),
        ("192.0.2.300", "neither"),
        ("192.0.2", "neither"),
        ("fe80::1%eth0", "neither"),
        ("[2001:db8::1]", "neither"),
    ],
)
def test_refused(text: str, why: str) -> None:
    """Identifiers that no CA validates with TLS-ALPN-01 are refused, with the reason."""
    with pytest.raises(BadIdentifier, match=why):
        parse_identifier(text)


@pytest.mark.parametrize(
    ("name", "identifier"),
    [
        (None, None),
        ("", None),
        ("SITE.example", "site.example"),
        ("7.2.0.192.in-addr.arpa", "192.0.2.7"),
        ("7.2.0.192.in-addr.arpa.", "192.0.2.7"),
        ("2.0.192.in-addr.arpa", "2.0.192.in-addr.arpa"),
        ("007.2.0.192.in-addr.arpa", "007.2.0.192.in-addr.arpa"),
        ("1.0.ip6.arpa", "1.0.ip6.arpa"),
        (".".join(["x", *["0"] * 31, "ip6", "arpa"]), ".".join(["x", *["0"] * 31, "ip6", "arpa"])),
        ("\\xff.example", None),
    ],
)
def test_asked_for(name: str | None, identifier: str | None) -> None:
    """A CA asks for a name with that name, and for an address with its reverse name (RFC 8738)."""
    assert identifier_asked_for(name) == identifier


@given(st.ip_addresses())
def test_every_address_comes_back(address: object) -> None:
    """The reverse name of any address, also with a last dot, asks for that address."""
    name = server_name_for(str(address))
    assert identifier_asked_for(name) == identifier_asked_for(f"{name}.".upper()) == str(address)


@given(st.text(max_size=300))
def test_nothing_raises(text: str) -> None:
    """Every server name that a peer may send is either an identifier or none."""
    identifier = identifier_asked_for(text)
    assert identifier is None or parse_identifier(identifier) == identifier
