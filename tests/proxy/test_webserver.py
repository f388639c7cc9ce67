"""The web server is looked at before anybody is steered."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest
from twisted.logger import capturedLogs, formatEvent

from acme_alpn_proxy.addresses import ORIGINAL, parse_address
from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.proxy import webserver
from acme_alpn_proxy.proxy.webserver import require_web_server


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses at which port 443 is served."""
    served: list[str] = []
    monkeypatch.setattr(webserver, "listeners", lambda port: served)
    return served


@pytest.fixture
def closed() -> str:
    """An address without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def refusal(address: str) -> str:
    with pytest.raises(StartError) as caught:
        require_web_server(parse_address(address), 1)
    assert caught.value.status == os.EX_CONFIG
    return str(caught.value)


def test_answers(at: list[str], tmp_path: Path) -> None:
    """A web server that accepts connections is enough, for every kind of address."""
    with capturedLogs() as events, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for text in (f"127.0.0.1:{port}", f"localhost:{port}", f"tcp:127.0.0.1:{port}"):
            require_web_server(parse_address(text), 1)
    path = str(tmp_path / "web.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        for text in (f"unix:{path}", f"unix:path={path}", f"unix:{path}:timeout=3"):
            require_web_server(parse_address(text), 1)
    assert events == []


def test_silence(at: list[str], closed: str, tmp_path: Path) -> None:
    """If nothing answers, it is refused, with a remedy."""
    assert refusal(closed) == (
        f"no web server answers at {closed}, the address of --fallback: Connection refused; start"
        " the web server, or give its address with --fallback"
    )
    assert "No such file" in refusal(f"unix:{tmp_path}/no.sock")


def test_elsewhere(at: list[str], closed: str) -> None:
    """If port 443 is served at another address, the remedy names that."""
    at += ["198.51.100.2:443", "[2001:db8::1]:443"]
    assert refusal(closed).endswith(
        "use --fallback 198.51.100.2:443 (servers listen there and at [2001:db8::1]:443)"
    )
    at[:] = ["0.0.0.0:443", "[::]:443"]
    assert refusal(closed).endswith("give its address with --fallback")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The addresses of this host, on the port that stands for 443."""
    addresses: list[str] = []
    monkeypatch.setattr(webserver, "own_addresses", lambda: set(map(ip_address, addresses)))
    monkeypatch.setattr(IPv4Address, "is_loopback", property(lambda address: False))
    with socket.create_server(("127.0.0.2", 0)) as listener:
        monkeypatch.setattr(webserver, "HTTPS", listener.getsockname()[1])
        yield addresses


def test_original(own: list[str]) -> None:
    """With C{--fallback original}, one address that answers is enough, and the log names those that
    do not."""
    own += ["127.0.0.2", "127.0.0.3", "127.0.0.4", "::1", "fe80::1"]
    with capturedLogs() as events:
        require_web_server(ORIGINAL, 1)
    (line,) = map(formatEvent, events)
    assert line.startswith("No web server answers on port 443 of 127.0.0.3, 127.0.0.4: ")


def test_original_everywhere(own: list[str]) -> None:
    """If all answer there is nothing to say."""
    own += ["127.0.0.2"]
    with capturedLogs() as events:
        require_web_server(ORIGINAL, 1)
    assert events == []


def test_original_nowhere(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is refused if no address answers, or if this host's addresses cannot be read."""
    own += ["127.0.0.3"]
    with pytest.raises(StartError, match=r"at any address of this host.*; start the") as caught:
        require_web_server(ORIGINAL, 1)
    assert caught.value.status == os.EX_CONFIG

    def fails() -> None:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(webserver, "own_addresses", fails)
    with pytest.raises(
        StartError, match=r"the kernel refused an operation: .*No buffer space"
    ) as caught:
        require_web_server(ORIGINAL, 1)
    assert caught.value.status == os.EX_OSERR


@pytest.mark.parametrize(
    ("served", "several"),
    [
        (["198.51.100.2:443", "198.51.100.3:443"], True),
        (["[2001:db8::1]:443", "[2001:db8::2]:443"], True),
        (["198.51.100.2:443", "[2001:db8::1]:443", "127.0.0.1:443", "127.0.0.2:443"], False),
        (["0.0.0.0:443", "198.51.100.2:443", "198.51.100.3:443"], False),
        ([], False),
    ],
)
def test_several_sites(at: list[str], served: list[str], several: bool) -> None:
    """Sites with a server each, on several addresses, cannot all be the fallback: a warning."""
    at += served
    with capturedLogs() as events, socket.create_server(("127.0.0.1", 0)) as listener:
        require_web_server(parse_address(f"127.0.0.1:{listener.getsockname()[1]}"), 1)
    assert [
        formatEvent(event).startswith("Web servers listen on port 443 of") for event in events
    ] == ([True] if several else [])
