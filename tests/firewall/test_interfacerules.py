"""Whether a firewall treats interfaces differently."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from acme_alpn_proxy.firewall.interfacerules import names_interfaces
from acme_alpn_proxy.interfaces import ICommands, Result


@implementer(ICommands)
class Listings:
    """Commands with given output, by table of iptables and for nft."""

    def __init__(self, tables: Mapping[str, str], nft: str = "") -> None:
        self._tables = tables
        self._nft = nft
        self.binaries: set[str] = set()

    def run(self, argv: Sequence[str]) -> Deferred[Result]:
        self.binaries.add(argv[0])
        output = self._nft if argv[0] == "nft" else self._tables.get(argv[4], "")
        return succeed(Result(tuple(argv), 0, output))

    def pause(self, seconds: float) -> Deferred[None]:
        raise AssertionError("nothing here waits")


def answer(listings: Listings, family: int = 4) -> bool:
    """The result for these rules."""
    told: list[bool] = []
    names_interfaces(listings, family).addCallback(told.append)
    return told[0]


def nft(*objects: Mapping[str, Any]) -> str:
    """As C{nft -j list ruleset} prints it."""
    return json.dumps({"nftables": [{"metainfo": {"version": "1.0"}}, *objects]})


def chain(name: str, hook: str | None = None, kind: str = "filter") -> dict[str, Any]:
    """A chain of nftables."""
    hooked = {"hook": hook, "type": kind} if hook else {}
    return {"chain": {"family": "inet", "table": "filter", "name": name, **hooked}}


def rule(where: str, *expressions: Mapping[str, Any]) -> dict[str, Any]:
    """A rule of nftables."""
    return {
        "rule": {"family": "inet", "table": "filter", "chain": where, "expr": list(expressions)}
    }


NOT_BY_LOOPBACK = {"match": {"op": "!=", "left": {"meta": {"key": "iiftype"}}, "right": "loopback"}}
"""As in this program's own table."""


def by(interface: str) -> dict[str, Any]:
    """A match on the incoming interface."""
    return {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": interface}}


@pytest.mark.parametrize(
    ("listing", "names"),
    [
        ("", False),
        ("-P INPUT DROP\n-A INPUT -i lo -j ACCEPT\n-A INPUT -p tcp -j ACCEPT\n", False),
        ("-A INPUT -i eth0 -p tcp -j ACCEPT\n", True),
        ("-A INPUT ! -i eth0 -j DROP\n", True),
        ("-A FORWARD -i eth0 -j ACCEPT\n", False),
        ("-N OURS\n-A OURS -i eth0 -j ACCEPT\n", False),
        ("-N OURS\n-A INPUT -j OURS\n-A OURS -i eth0 -j ACCEPT\n", True),
        ("-N A\n-N B\n-A INPUT -j A\n-A INPUT -g B\n-A A -j B\n-A B -j ACCEPT\n", False),
        ("-A PREROUTING -i eth0 -j ACCEPT\n", True),
    ],
)
def test_iptables(listing: str, names: bool) -> None:
    """A rule counts if a new visitor's packet reaches it and it names an interface other than the
    loopback."""
    for table in ("raw", "mangle", "filter"):
        assert answer(Listings({table: listing})) is names
    assert not answer(Listings({"nat": listing})), "the nat table turns nobody away"


@pytest.mark.parametrize(
    ("objects", "names"),
    [
        ([chain("in", "input"), rule("in", by("lo"), {"accept": None})], False),
        ([chain("in", "input"), rule("in", by("eth0"), {"accept": None})], True),
        ([chain("in", "prerouting", "nat"), rule("in", by("eth0"), {"accept": None})], False),
        ([chain("in", "forward"), rule("in", by("eth0"), {"accept": None})], False),
        (
            [
                chain("in", "prerouting"),
                chain("zones"),
                rule("in", {"jump": {"target": "zones"}}),
                rule("zones", {"vmap": {"key": {"meta": {"key": "iifname"}}, "data": "@zones"}}),
            ],
            True,
        ),
        ([chain("in", "input"), chain("alone"), rule("alone", by("eth0"))], False),
        ([chain("in", "prerouting"), rule("in", NOT_BY_LOOPBACK)], False),
    ],
)
def test_nftables(objects: list[Mapping[str, Any]], names: bool) -> None:
    """A rule of nftables counts if a new visitor's packet reaches it and it names an interface
    other than the loopback."""
    assert answer(Listings({}, nft(*objects))) is names


@pytest.mark.parametrize("output", ["nft: not found on PATH", "[]", "{}"])
def test_nftables_not_there(output: str) -> None:
    """Rules that nft does not show name no interface."""
    assert answer(Listings({}, output)) is False


def test_family() -> None:
    """Each family's own rules are looked at."""
    listings = Listings({})
    answer(listings, 6)
    assert listings.binaries == {"ip6tables", "nft"}
