"""The numbers, and what they count."""

from __future__ import annotations

import json

import pytest

from acme_alpn_proxy.proxy.clienthello import (
    OTHER,
    ClientHello,
    NotClientHello,
    Verdict,
)
from acme_alpn_proxy.proxy.routing import Route, Routing
from acme_alpn_proxy.proxy.statistics import Statistics

from ..monitoring.descriptions import DOUBTS, ROUTING, statistics


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (OTHER, "no_acme_alpn"),
        (ClientHello((b"h2",)), "no_acme_alpn"),
        (NotClientHello("not a handshake record"), "not_tls"),
        (NotClientHello("no complete ClientHello within 5 s", "deadline"), "deadline"),
        (NotClientHello("closed before a complete ClientHello", "end_of_file"), "end_of_file"),
        (NotClientHello("too many incomplete ClientHellos", "crowded"), "crowded"),
    ],
)
def test_visitor(verdict: Verdict, reason: str) -> None:
    """A visitor counts as live until it has ended, and for good under the reason of its route."""
    numbers = statistics()
    record = numbers.visitor(verdict)
    assert (numbers.fallback.live, numbers.fallback.total) == (1, 1)
    numbers.ended(record, 100, 2_000)
    shown = numbers.status("none", 0)["routes"]["fallback"]
    assert (shown["live"], shown["total"], shown["failures"]) == (0, 1, 0)
    assert (shown["bytes_from_visitors"], shown["bytes_to_visitors"]) == (100, 2_000)
    assert {why: count for why, count in shown["reasons"].items() if count} == {reason: 1}
    assert numbers.last_validation is None


def test_unreachable_web_server() -> None:
    """A web server that cannot be reached counts as a failure, and as no validation's result."""
    numbers = statistics()
    record = numbers.visitor(ClientHello())
    numbers.unreachable(record, "refused")
    numbers.ended(record, 0, 0)
    assert (numbers.fallback.failures, numbers.fallback.live) == (1, 0)


def result_of(numbers: Statistics) -> str:
    """The result of the last validation."""
    last = numbers.status("none", 0)["last_validation"]
    assert last is not None
    return last["result"]


def test_validation() -> None:
    """The last validation has peer, name, time, and whether the ACME client answered."""
    numbers = statistics()
    record = numbers.validation(ROUTING.acme, "192.0.2.7:50000", "site.example")
    shown = {"peer": "192.0.2.7:50000", "server_name": "site.example", "at": 1_000.0}
    assert numbers.status("none", 0)["last_validation"] == shown | {"result": "under way"}
    numbers.ended(record, 300, 900)
    assert numbers.status("none", 0)["last_validation"] == shown | {"result": "answered"}
    silent = numbers.validation(ROUTING.acme, "192.0.2.8:50000", "site.example")
    numbers.ended(silent, 300, 0)
    assert result_of(numbers) == "not answered"
    nobody = numbers.validation(ROUTING.acme, "192.0.2.9:50000", "site.example")
    numbers.unreachable(nobody, "refused")
    numbers.ended(nobody, 0, 0)
    assert result_of(numbers) == "unreachable: refused"
    assert (numbers.acme.total, numbers.acme.failures, numbers.acme.live) == (3, 1, 0)


def test_named() -> None:
    """A validation of a name with a separate ACME client counts for that client."""
    client = Route("acme", "127.0.0.1:31444")
    routing = Routing(ROUTING.acme, ROUTING.fallback, {"site.example": client})
    numbers = Statistics(routing, DOUBTS)
    numbers.validation(routing.acme, "192.0.2.7:50000", "other.example")
    record = numbers.validation(client, "192.0.2.7:50001", "site.example")
    numbers.ended(record, 300, 900)
    routes = numbers.status("none", 0)["routes"]
    assert (routes["acme"]["total"], routes["acme"]["live"]) == (1, 1)
    assert routes["acme_for"] == {
        "site.example": {
            "target": "127.0.0.1:31444",
            "live": 0,
            "total": 1,
            "failures": 0,
            "bytes_from_visitors": 300,
            "bytes_to_visitors": 900,
        }
    }


def test_state() -> None:
    """The state has the time of its beginning; all of it is JSON."""
    times = iter([1.0, 2.0, 3.0])
    numbers = Statistics(ROUTING, DOUBTS, lambda: next(times))
    assert (numbers.state, numbers.since) == ("starting", 1.0)
    numbers.enter("running")
    assert (numbers.state, numbers.since) == ("running", 2.0)
    shown = numbers.status("iptables", 3)
    assert json.loads(json.dumps(shown)) == shown
    assert (shown["since"], shown["redirect"], shown["undecided"]) == (2.0, "iptables", 3)
