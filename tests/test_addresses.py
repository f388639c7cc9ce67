"""Addresses as operators write them, right ones and wrong ones."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.interfaces import IReactorPluggableNameResolver, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from zope.interface.verify import verifyObject

from acme_alpn_proxy.addresses import Address, BadAddress, _no_reactor, parse_address

from .memory import MemoryReactor


@pytest.mark.parametrize(
    ("text", "host", "port", "is_endpoint"),
    [
        ("127.0.0.1:443", "127.0.0.1", 443, False),
        ("[::1]:1", "::1", 1, False),
        ("[fe80::1%eth0]:443", "fe80::1%eth0", 443, False),
        ("web.example:65535", "web.example", 65_535, False),
        ("tcp:443", "tcp", 443, False),
        ("unix:443", "unix", 443, False),
        ("tcp:127.0.0.1:443", "127.0.0.1", 443, True),
        ("tcp:host=127.0.0.1:port=443:timeout=5", "127.0.0.1", 443, True),
        ("tcp:port=443:127.0.0.1", "127.0.0.1", 443, True),
        (r"tcp:host=\:\:1:port=443", "::1", 443, True),
        ("unix:/run/web.sock", "", 0, True),
        ("unix:path=/run/web.sock:timeout=5", "", 0, True),
    ],
)
def test_addresses(text: str, host: str, port: int, is_endpoint: bool) -> None:
    """Host and port, an IPv6 address in brackets, and endpoint strings are understood, and shown
    as they were written; a host may be called like a kind of endpoint."""
    address = parse_address(text)
    assert address == Address(text, host, port, is_endpoint)
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a host and a port are needed, as in 127.0.0.1:443"),
        ("127.0.0.1", "a host and a port are needed, as in 127.0.0.1:443"),
        ("[::1]", "a host and a port are needed, as in 127.0.0.1:443"),
        (":443", "a host is needed before the port, as in 127.0.0.1:443"),
        ("tcp::443", "a host is needed, as in tcp:127.0.0.1:443"),
        ("tcp:127.0.0.1", "something is missing; an endpoint string looks like tcp:127.0.0.1:443"),
        ("tcp:host=:port=443", "a host is needed, as in tcp:127.0.0.1:443"),
        ("127.0.0.1:", "the port must be a number from 1 to 65535, not ''"),
        ("127.0.0.1:0", "the port must be a number from 1 to 65535, not '0'"),
        ("127.0.0.1:70000", "the port must be a number from 1 to 65535, not '70000'"),
        ("127.0.0.1:-1", "the port must be a number from 1 to 65535, not '-1'"),
        ("127.0.0.1:https", "the port must be a number from 1 to 65535, not 'https'"),
        ("127.0.0.1:\u0664\u0664\u0663", "the port must be a number from 1 to 65535"),
        ("tcp:127.0.0.1:70000", "the port must be a number from 1 to 65535, not '70000'"),
        ("::1:443", "put an IPv6 address in brackets, as in [::1]:443"),
        ("[]:443", "'' is not an IPv6 address; one looks like [::1]:443"),
        ("[::g]:443", "'::g' is not an IPv6 address; one looks like [::1]:443"),
        ("[127.0.0.1]:443", "'127.0.0.1' is not an IPv6 address; one looks like [::1]:443"),
        ("1.2.3:443", "'1.2.3' is not an IPv4 address"),
        ("256.0.0.1:443", "'256.0.0.1' is not an IPv4 address; one looks like 127.0.0.1:443"),
        ("unix:", "something is missing; an endpoint string looks like"),
        ("pigeon:coop=7:colour=grey", "not an address nor an endpoint string"),
    ],
)
def test_bad_addresses(text: str, why: str) -> None:
    """A text that is no address is refused, with the text, the fault, and a correct example."""
    with pytest.raises(BadAddress) as refusal:
        parse_address(text)
    assert repr(text) in str(refusal.value)
    assert why in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("127.0.0.1:443", TCP4ClientEndpoint),
        ("[::1]:443", TCP6ClientEndpoint),
        ("[fe80::1%eth0]:443", TCP6ClientEndpoint),
        ("web.example:443", HostnameEndpoint),
    ],
)
def test_endpoints(text: str, kind: type[Any]) -> None:
    """A numeric address is used directly, a host name is looked up."""
    endpoint = parse_address(text).endpoint(_no_reactor(), 7)
    assert type(endpoint) is kind
    verifyObject(IStreamClientEndpoint, endpoint)


def test_timeout() -> None:
    """The connection uses the given address and number of seconds."""
    reactor = MemoryReactor()
    parse_address("[::1]:443").endpoint(reactor, 7).connect(Factory())
    ((host, port, _, timeout, _),) = reactor.tcpClients
    assert (host, port, timeout) == ("::1", 443, 7)


def test_endpoint_string() -> None:
    """An endpoint string is connected to as Twisted understands it."""
    reactor = MemoryReactor()
    parse_address("unix:/run/web.sock").endpoint(reactor, 7).connect(Factory())
    assert reactor.unixClients[0][0] == "/run/web.sock"


def test_check_needs_no_reactor() -> None:
    """The stand-in for the reactor looks like one that resolves names, and can do nothing."""
    stand_in = _no_reactor()
    verifyObject(IReactorPluggableNameResolver, stand_in)
    with pytest.raises(NotImplementedError):
        stand_in.installNameResolver(None)


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:443",
        "127.8.9.10:443",
        "0.0.0.0:443",
        "[::1]:443",
        "[::ffff:127.0.0.1]:443",
        "localhost:443",
        "tcp:127.0.0.1:443",
        r"tcp:host=\:\:1:port=443",
    ],
)
def test_this_host(text: str) -> None:
    """An address of this host is recognized in every spelling, and only with that port."""
    address = parse_address(text)
    assert address.is_local_port(443)
    assert not address.is_local_port(444)


@pytest.mark.parametrize("text", ["192.0.2.1:443", "[2001:db8::1]:443", "unix:/run/web.sock"])
def test_other_hosts(text: str) -> None:
    """An address of another host is not, nor is a Unix socket."""
    assert not parse_address(text).is_local_port(443)


@pytest.mark.parametrize("host", ["web.example", "web..example", "w" * 64])
def test_unknown_host(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that cannot be looked up, or cannot be a name at all, is not this host."""
    lookup = socket.getaddrinfo

    def offline(name: str, port: int, **named: Any) -> Any:
        name.encode("idna")  # as the real one does first
        return lookup(name, port, **(named | {"flags": socket.AI_NUMERICHOST}))

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    assert not parse_address(f"{host}:443").is_local_port(443)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web.example:443", "web.example:443"),
        ("tcp:host=127.0.0.1:port=443", "127.0.0.1:443"),
        (r"tcp:host=\:\:1:port=443", "[::1]:443"),
        ("unix:/run/web.sock", "unix:/run/web.sock"),
    ],
)
def test_host_and_port(text: str, shown: str) -> None:
    """Other programs get host and port, if the address has them."""
    assert parse_address(text).host_and_port == shown
