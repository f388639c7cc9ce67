"""How an instance's answer is shown to people."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from acme_alpn_proxy.console import display
from acme_alpn_proxy.console.display import account, drain, duration, size, table
from acme_alpn_proxy.monitoring.status import SILENT, SilentInstance
from acme_alpn_proxy.proxy.clienthello import ClientHello

from ..monitoring.descriptions import ROUTING, answer_of, describe, statistics


@pytest.fixture(autouse=True)
def _zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is an hour before that of Greenwich."""
    monkeypatch.setenv("TZ", "CET-1")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_table() -> None:
    """State, local time with its zone, targets, numbers with units, and the last validation."""
    assert table([answer_of(describe())], now=1_060.0) == (
        "PID 7  running for 1 min 0 s, since 1970-01-01 01:16:40 CET, redirect none\n"
        "  route     target           open  all  not reached  received  sent\n"
        "  acme      127.0.0.1:31443     1    1            0       0 B   0 B\n"
        "  fallback  127.0.0.1:443       0    1            0      10 B  20 B\n"
        "  sent to the web server: 1 TLS\n"
        "  source address at the web server: the visitor's in 1 connection, this host's in 0\n"
        "  2 connections without a complete ClientHello yet\n"
        "  last validation: 1970-01-01 01:16:40 CET from 192.0.2.7:50000 for site.example:"
        " under way\n"
    )


def test_named() -> None:
    """A name with a separate ACME client has a line, and its validations count."""
    answer = answer_of(describe())
    routes: Any = answer["routes"]
    routes["acme_for"] = {"*.site.example": dict(routes["acme"])}
    text = table([answer], now=1_060.0)
    assert "  acme for *.site.example  127.0.0.1:31443     1    1 " in text
    assert account(answer, 1_060.0)[1].startswith("2 validations")
    assert drain(answer, 7, 1_060.0).startswith("waiting for 4 open connections of PID 7")


def test_little() -> None:
    """Missing parts are shown as missing: no instance, no answer, no validation, no name."""
    assert table([], now=0) == "no instance runs\n"
    silent: SilentInstance = {"version": 1, "pid": 7, "state": SILENT}
    assert table([silent], now=0) == ("PID 7  silent: it runs but does not answer; see its log\n")
    answer = answer_of(statistics().status("none", 0))
    text = table([answer], now=0)
    assert text.endswith("0 B   0 B\n  no validation yet\n")
    for name, shown in ((None, "no name"), ("a\x1b[2J", r"a\x1b[2J")):
        answer["last_validation"] = {
            "peer": "p",
            "server_name": name,
            "at": 0,
            "result": "answered",
        }
        assert f" for {shown}: answered\n" in table([answer], now=0)


def test_several() -> None:
    """An empty line is between two instances."""
    silent: SilentInstance = {"version": 1, "pid": 7, "state": SILENT}
    assert "\n\n" in table([silent, silent], now=0)


class Terminal(io.StringIO):
    """Standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the state has a colour."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "PID 7  \x1b[32mrunning\x1b[m for" in table([answer_of(describe())], now=0)


def test_account() -> None:
    """For a C{run}: how long it steered, the visitors, the failures, and the validations."""
    numbers = statistics()
    numbers.enter("running")
    numbers.unreachable(numbers.visitor(ClientHello()), "refused")
    numbers.visitor(ClientHello())
    for host in range(1, 8):
        numbers.validation(ROUTING.acme, f"192.0.2.{host}:50000", "site.example")
    numbers.unreachable(
        numbers.validation(ROUTING.acme, "192.0.2.1:50001", "site.example"), "refused"
    )
    assert account(answer_of(numbers.status("none", 0)), now=1_042.4) == [
        "steered for 42 s: 2 visitors, 1 did not reach the web server (127.0.0.1:443)",
        "8 validations from 192.0.2.1, 192.0.2.2, 192.0.2.3, 192.0.2.4, 192.0.2.5, and others,"
        " 1 did not reach the ACME client",
    ]


def test_account_of_nothing() -> None:
    """It says if no validation came: that matters after a failed order."""
    assert account(answer_of(statistics().status("none", 0)), now=1_001) == [
        "steered for 1 s: 0 visitors, no failure",
        "no validation arrived: the CA did not connect to port 443 of this host; see:"
        " acme-alpn-proxy explain NAME",
    ]


def test_drain() -> None:
    """How many connections are waited for, and until when at most."""
    answer = answer_of(describe())
    assert drain(answer, 7, now=1_010) == (
        "waiting for 3 open connections of PID 7, reset in 3 min 5 s at most"
    )
    answer["options"] = {}
    assert drain(answer, 7, now=1_010) == "waiting for 3 open connections of PID 7"
    assert drain(None, 7, now=1_010) == "waiting for PID 7"
    assert display.draining(answer) == (
        "PID 7 was stopped earlier and still has 3 open connections (see: acme-alpn-proxy status)"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (59.4, "59 s"),
        (60, "1 min 0 s"),
        (3_599, "59 min 59 s"),
        (7_260, "2 h 1 min"),
        (100_000, "1 d 3 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    """A duration has its two largest units."""
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1_023, "1023 B"),
        (1_024, "1.0 KiB"),
        (1_023_999, "1000.0 KiB"),
        (1_024_000, "1.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_size(count: int, text: str) -> None:
    """Bytes have the unit that keeps the number short."""
    assert size(count) == text
