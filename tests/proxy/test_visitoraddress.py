"""Whether the web server can see the visitors' addresses; in the integration tests it does."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.logger import capturedLogs, formatEvent

from acme_alpn_proxy.addresses import parse_address
from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host.returnpath import WebServer
from acme_alpn_proxy.host.tcpsockets import LISTENING, TCPSocket
from acme_alpn_proxy.proxy import visitoraddress
from acme_alpn_proxy.proxy.visitoraddress import (
    VisitorAddress,
    no_way_back,
    refuse_translation,
    same_program,
    web_server,
)
from acme_alpn_proxy.transports.network import TwistedNetwork

from ..memory import MemoryReactor

SERVER = WebServer("127.0.0.1", 443)


@pytest.mark.parametrize("text", ["127.0.0.1:443", "127.8.8.8:8443", "[::1]:443"])
def test_loopback(text: str) -> None:
    """A web server at a loopback address will do, of either family."""
    address = parse_address(text)
    assert web_server(address) == (address.host, address.port)


@pytest.mark.parametrize(
    "text",
    ["192.0.2.1:443", "[2001:db8::1]:443", "localhost:443", "unix:/run/x", "tcp:127.0.0.1:443"],
)
def test_no_loopback(text: str) -> None:
    """Any other one is refused, with the remedy."""
    with pytest.raises(StartError, match="no numeric loopback address; name one with") as refused:
        web_server(parse_address(text))
    assert refused.value.status == os.EX_CONFIG


@pytest.mark.parametrize(
    ("interface", "value", "refused"),
    [
        ("eth0", 1, True),
        ("all", 1, True),
        ("lo", 1, False),
        ("default", 1, False),
        ("eth0", 0, False),
    ],
)
def test_translation(tmp_path: Path, interface: str, value: int, refused: bool) -> None:
    """If a rule may translate visitors to loopback (C{route_localnet}), that is refused; for IPv6
    there is no such setting."""
    folder = tmp_path / "sys/net/ipv4/conf" / interface
    folder.mkdir(parents=True)
    (folder / "route_localnet").write_text(f"{value}\n")
    refuse_translation([WebServer("::1", 443)], tmp_path)
    if refused:
        with pytest.raises(
            StartError, match=rf"net\.ipv4\.conf\.{interface}\.route_localnet is on"
        ):
            refuse_translation([SERVER], tmp_path)
    else:
        refuse_translation([SERVER], tmp_path)


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (errno.ENOENT, os.EX_UNAVAILABLE, "/dev/net/tun does not exist; load the kernel's module"),
        (errno.ENODEV, os.EX_UNAVAILABLE, "/dev/net/tun does not exist; load the kernel's module"),
        (errno.EPERM, os.EX_NOPERM, "no permission to use a TUN device; run this as root"),
        (errno.EBUSY, os.EX_OSERR, "busy; look for conflicting entries"),
    ],
)
def test_no_way_back(number: int, status: int, words: str) -> None:
    """If the kernel refuses, the error says why, with a remedy."""
    problem = no_way_back(OSError(number, os.strerror(number)))
    assert (problem.status, words in str(problem)) == (status, True)


def listening(host: str, uid: int = 0, cgroup: int = 7) -> TCPSocket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return TCPSocket(family, LISTENING, (host, 443), ("", 0), uid, 1, cgroup)


@pytest.mark.parametrize(
    ("sockets", "same"),
    [
        ([listening("0.0.0.0"), listening("::")], True),
        ([listening("::")], True),
        ([listening("127.0.0.1"), listening("::1")], True),
        ([listening("127.0.0.1")], False),
        ([listening("0.0.0.0"), listening("::", uid=33)], False),
        ([listening("0.0.0.0"), listening("::", cgroup=8)], False),
        ([listening("0.0.0.0"), listening("::"), listening("::1", cgroup=8)], False),
        ([], False),
    ],
)
def test_same_web_server(sockets: list[TCPSocket], same: bool) -> None:
    """Visitors by IPv6 go to [::1] only if the same program listens there."""
    own, other = (
        visitoraddress._listener(WebServer(host, 443), sockets) for host in ("127.0.0.1", "::1")
    )
    assert same_program(own, other) is same


def called(call: Callable[[], None]) -> Deferred[None]:
    call()
    return succeed(None)


def test_transports_that_cannot() -> None:
    """On a reactor whose transports cannot do it, the log says that the web server does not see the
    visitors' addresses; if that is required, the start is refused."""
    network = TwistedNetwork(MemoryReactor())
    address = parse_address("127.0.0.1:443")
    plain = network.target(address, 1)
    with capturedLogs() as events:
        how = VisitorAddress(network, plain, address)
        how.open(called)
    assert how.target is plain
    assert [formatEvent(event) for event in events] == [
        "The web server sees an address of this host instead of the visitors' addresses: this"
        " reactor's transports do not allow it"
    ]
    with pytest.raises(StartError, match="or start without --visitor-address require"):
        VisitorAddress(network, plain, address, required=True).open(called)
    how.close()
