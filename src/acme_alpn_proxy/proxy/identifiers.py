"""ACME identifiers (RFC 8555 section 7.1.4, RFC 8738) and the server names that ask for them.

An identifier is a DNS name or an IP address. Here it is text in one normal form: a DNS name in
lower case without the last dot, an IP address as L{ipaddress} writes it. Pure: no I/O.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

LONGEST_NAME: Final = 253
"""Characters of a DNS name as text, without the last dot (RFC 1035 section 2.3.4)."""

_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_IPV4_ZONE: Final = ".in-addr.arpa"
_IPV6_ZONE: Final = ".ip6.arpa"


class BadIdentifier(ValueError):
    """The text is not an identifier that TLS-ALPN-01 can validate; the message says why."""


def parse_identifier(text: str) -> str:
    """The normal form of the identifier in C{text}; raises L{BadIdentifier}."""
    try:
        if "%" not in text:  # a scoped address, valid on one interface only: no CA can use it
            return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    name = text.removesuffix(".").lower()
    shown = ascii(text[:LONGEST_NAME])
    if not name:
        raise BadIdentifier("an identifier is needed: a DNS name or an IP address")
    if not name.isascii():
        raise BadIdentifier(f"{shown} is not ASCII; write its A-label, which begins with xn--")
    if len(name) > LONGEST_NAME:
        raise BadIdentifier(f"a DNS name has {LONGEST_NAME} characters at most, not {len(name)}")
    if name.startswith("*."):
        raise BadIdentifier(
            f"{shown} is a wildcard; a CA validates these by dns-01 only (RFC 8555 section 7.1.4)"
        )
    labels = name.split(".")
    if not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise BadIdentifier(f"{shown} is neither a DNS name nor an IP address")
    return name


def identifier_asked_for(server_name: str | None) -> str | None:
    """The identifier that a validation with this server name is for.

    For an IP address, the server name is the address's name in C{in-addr.arpa} or C{ip6.arpa} (RFC
    8738 section 6).

    @return: L{None} if no identifier has this server name.
    """
    name = (server_name or "").removesuffix(".").lower()
    try:
        if name.endswith(_IPV4_ZONE):
            return _ipv4(name.removesuffix(_IPV4_ZONE)) or parse_identifier(name)
        if name.endswith(_IPV6_ZONE):
            return _ipv6(name.removesuffix(_IPV6_ZONE)) or parse_identifier(name)
        return parse_identifier(name)
    except BadIdentifier:
        return None


def server_name_for(identifier: str) -> str:
    """The server name that a CA sends to validate C{identifier}."""
    try:
        return ipaddress.ip_address(identifier).reverse_pointer
    except ValueError:
        return identifier


def _ipv4(reversed_labels: str) -> str | None:
    try:
        return str(ipaddress.IPv4Address(".".join(reversed(reversed_labels.split(".")))))
    except ValueError:
        return None


def _ipv6(reversed_labels: str) -> str | None:
    digits = reversed_labels.split(".")
    if len(digits) != 32 or any(len(digit) != 1 for digit in digits):
        return None
    text = "".join(reversed(digits))
    try:
        return str(ipaddress.IPv6Address(bytes.fromhex(text)))
    except ValueError:
        return None
