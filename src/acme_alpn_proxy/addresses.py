"""Addresses as operators write them: C{host:port}, C{[v6]:port}, or a Twisted endpoint string."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from zope.interface import implementer

if TYPE_CHECKING:
    from twisted.internet.interfaces import IStreamClientEndpoint

    from .interfaces import Reactor

HTTPS: Final = 443
"""The port that visitors connect to."""

# Importing Twisted's endpoints takes longer than a whole command like C{status}: they are
# imported only where they are needed.

_HOST_PORT = re.compile(r"(?P<host>\[[^\]]*\]|[^\[\]:]*):(?P<port>[^:]*)")
_ENDPOINT = re.compile(r"[a-zA-Z][a-zA-Z0-9]*:")
_KNOWN_KINDS = ("ssl", "tcp", "tls", "unix")
"""The kinds of endpoint that Twisted has; any other word before a colon is a host name."""
_UNESCAPED_COLON = re.compile(r"(?<!\\):")


class BadAddress(ValueError):
    """The text is not an address; the message says what is wrong and shows a correct one."""


def _no_reactor() -> Any:
    """Replaces the reactor while an endpoint string is only checked."""
    from twisted.internet.interfaces import IReactorPluggableNameResolver

    @implementer(IReactorPluggableNameResolver)
    class NoReactor:
        nameResolver = None

        def installNameResolver(self, resolver: Any) -> Any:
            raise NotImplementedError

    return NoReactor()


@dataclass(frozen=True, slots=True)
class Address:
    """An address to connect to.

    @ivar text: as the operator wrote it.
    @ivar host: name, or numeric address without brackets; empty for an endpoint string that is not
        C{tcp:}.
    @ivar port: 1 to 65535; 0 for such an endpoint string.
    @ivar is_endpoint: whether the text is an endpoint string.
    """

    text: str
    host: str
    port: int
    is_endpoint: bool = False

    def __str__(self) -> str:
        return self.text

    @property
    def is_original(self) -> bool:
        """Whether it is L{ORIGINAL}."""
        return self is ORIGINAL

    @property
    def host_and_port(self) -> str:
        """The form that other programs take; an endpoint string that is not C{tcp:} is
        unchanged."""
        if not self.host:
            return self.text
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def endpoint(self, reactor: Reactor, timeout: float) -> IStreamClientEndpoint:
        """An endpoint that connects there; each address of a host name gets C{timeout} seconds."""
        from twisted.internet.endpoints import (
            HostnameEndpoint,
            TCP4ClientEndpoint,
            TCP6ClientEndpoint,
            clientFromString,
        )

        if self.is_endpoint:
            endpoint: IStreamClientEndpoint = clientFromString(reactor, self.text)
            return endpoint
        try:
            version = ipaddress.ip_address(self.host.partition("%")[0]).version
        except ValueError:
            return HostnameEndpoint(reactor, self.host, self.port, timeout)
        kind = TCP4ClientEndpoint if version == 4 else TCP6ClientEndpoint
        return kind(reactor, self.host, self.port, timeout)

    def socket_address(self) -> tuple[int, Any] | None:
        """For a numeric address: its family, and the address in the socket module's form."""
        if self.is_endpoint:
            return None
        try:
            (found, *_) = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
        except OSError:
            return None
        return found[0], found[4]

    def is_local_port(self, port: int) -> bool:
        """Whether this address is C{port} of this host.

        Host names are looked up; the resolver may take a while.
        """
        if self.port != port:
            return False
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):  # UnicodeError: the text cannot be a host name
            return False
        return any(is_ours(family, address) for family, _, _, _, address in found)


ORIGINAL: Final = Address("original", "", 0)
"""Means: for each visitor, the address that the visitor connected to."""


def is_ours(family: int, address: Any) -> bool:
    """Whether C{address} belongs to this host: only then can a socket be bound to it."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address[0], 0, *address[2:]))
    except OSError:
        return False
    return True


def _port(text: str, whole: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65_536):
        raise BadAddress(f"{whole!r}: the port must be a number from 1 to 65535, not {text!r}")
    return int(text)


def parse_address(text: str) -> Address:
    """Parse C{text}; raises L{BadAddress}."""
    kind, _, rest = text.partition(":")
    if kind in _KNOWN_KINDS and not rest.isdigit():
        return _parse_endpoint(text)
    match = _HOST_PORT.fullmatch(text)
    if match is None:
        if _ENDPOINT.match(text):  # a kind that a plugin adds
            return _parse_endpoint(text)
        if text.count(":") > 1 and "[" not in text:
            raise BadAddress(f"{text!r}: put an IPv6 address in brackets, as in [::1]:443")
        raise BadAddress(f"{text!r}: a host and a port are needed, as in 127.0.0.1:443")
    host, port = match["host"], _port(match["port"], text)
    if host.startswith("["):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise BadAddress(
                f"{text!r}: {host!r} is not an IPv6 address; one looks like [::1]:443"
            ) from None
    elif not host:
        raise BadAddress(f"{text!r}: a host is needed before the port, as in 127.0.0.1:443")
    elif re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise BadAddress(
                f"{text!r}: {host!r} is not an IPv4 address; one looks like 127.0.0.1:443"
            ) from None
    return Address(text, host, port)


def _parse_endpoint(text: str) -> Address:
    from twisted.internet.endpoints import clientFromString

    try:
        if text == "unix:":  # Twisted would accept it
            raise TypeError("no path")
        clientFromString(_no_reactor(), text)
    except TypeError:
        raise BadAddress(
            f"{text!r}: something is missing; an endpoint string looks like tcp:127.0.0.1:443 or"
            " unix:/run/web.sock"
        ) from None
    except Exception as problem:  # each kind of endpoint raises its own exceptions
        raise BadAddress(
            f"{text!r}: not an address nor an endpoint string: {problem}; one looks like"
            " tcp:127.0.0.1:443 or unix:/run/web.sock"
        ) from None
    host, port = "", 0
    if text.startswith("tcp:"):
        words = [word.partition("=") for word in _UNESCAPED_COLON.split(text)[1:]]
        named = {name: value for name, equals, value in words if equals}
        bare = [name for name, equals, _ in words if not equals]
        host = (named["host"] if "host" in named else bare.pop(0)).replace("\\:", ":")
        port = _port(named["port"] if "port" in named else bare.pop(0), text)
        if not host:
            raise BadAddress(f"{text!r}: a host is needed, as in tcp:127.0.0.1:443")
    return Address(text, host, port, is_endpoint=True)
