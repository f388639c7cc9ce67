"""Hosts for the tests of this folder: their firewalls, the ways in, and the output of commands."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeAlias

from twisted.internet.defer import Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from acme_alpn_proxy.firewall.judgement import Arrival, Host, Surroundings, Way, iptables
from acme_alpn_proxy.firewall.reading import Firewall
from acme_alpn_proxy.host.routes import Address, Route
from acme_alpn_proxy.interfaces import NOT_FOUND, ICommands, Result
from acme_alpn_proxy.redirects import bpf

DATA = Path(__file__).resolve().parents[1] / "data" / "firewalls"
PORT = 21443
NFT = "nft -j -t list ruleset"
REDIRECT = iptables(PORT)

Answers: TypeAlias = Mapping[str, str | tuple[int, str]]
"""Output, or exit status and errors, by command line."""


@implementer(ICommands)
class Recorded:
    """Answers with the recorded output of commands; there are no other programs."""

    def __init__(self, answers: Answers) -> None:
        self.answers = dict(answers)
        self.asked: list[str] = []

    def run(self, argv: Sequence[str]) -> Deferred[Result]:
        self.asked.append(" ".join(argv))
        answer = self.answers.get(" ".join(argv), (NOT_FOUND, "not found on PATH"))
        code, errors = answer if isinstance(answer, tuple) else (0, "")
        output = "" if isinstance(answer, tuple) else answer
        return succeed(Result(tuple(argv), code, output, errors))

    def pause(self, seconds: float) -> Deferred[None]:
        raise AssertionError("nothing here waits")


def recorded(name: str) -> Recorded:
    return Recorded(json.loads((DATA / f"{name}.json").read_text()))


def accept_the_program(case: SynchronousTestCase) -> None:
    """The kernel accepts the program of sk-lookup."""
    case.patch(bpf, "make_socket_map", lambda slots: os.dup(0))
    case.patch(bpf, "load_sk_lookup", lambda code, name: os.dup(0))


def arrival(
    interface: str = "net0",
    dialled: str = "198.51.100.2",
    address: str | None = None,
    *visitors: str,
) -> Arrival:
    """@param address: the interface's address; L{None} means C{dialled}."""
    own = ip_address(address or dialled)
    return Arrival(interface, ip_address(dialled), own, tuple(map(ip_address, visitors)))


NET0 = {4: [arrival()], 6: [arrival(dialled="2001:db8:1::2")]}
"""One interface with one address of each family."""


def same_way(source: Address, port: int, destination: Address) -> Route:
    """All answers leave by the same route."""
    return Route("net0", "198.51.100.1", (b"",))


def why_not(
    firewall: Firewall,
    way: Way = REDIRECT,
    family: int = 4,
    ways_in: Sequence[Arrival] | None = None,
    commands: ICommands | None = None,
    **around: Any,
) -> str:
    """Why the way hurts visitors, or nothing."""
    arrivals = {family: NET0[family] if ways_in is None else ways_in}
    host = Host({family: firewall}, Surroundings(arrivals, **{"route": same_way, **around}))
    told: list[str | None] = []
    host.why_not(way, commands or Recorded({})).addCallback(told.append)
    assert "\n" not in (told[0] or "")
    return told[0] or ""


def tables(*listings: tuple[str, str], legacy: bool = False) -> Firewall:
    """Tables of iptables: name and listing."""
    return Firewall(iptables=[(table, listing, legacy) for table, listing in listings])


def ruleset(chain: Mapping[str, Any], *exprs: Any, **more: Any) -> list[dict[str, Any]]:
    """A table of nftables with one base chain, as C{nft -j list ruleset} prints it.

    @param more: objects of the table: a kind and a list of their members.
    """
    family, table = chain.get("family", "inet"), chain.get("table", "t")
    of = {"family": family, "table": table, "chain": "c"}
    base = {"family": family, "table": table, "name": "c", "type": "filter", **chain}
    base.pop("handle", None)
    rules = [{"rule": {**of, "handle": n, "expr": expr}} for n, expr in enumerate(exprs)]
    others = [
        {kind: {"family": family, "table": table, **each}}
        for kind, all_ in more.items()
        for each in all_
    ]
    head = {"table": {"family": family, "name": table, "handle": chain.get("handle", 1)}}
    return [head, *others, {"chain": base}, *rules]


def printed(*objects: Mapping[str, Any]) -> str:
    """As nft prints them."""
    return json.dumps({"nftables": [{"metainfo": {"version": "1.0.6"}}, *objects]})


def dport(right: Any, op: str = "==") -> dict[str, Any]:
    left = {"payload": {"protocol": "tcp", "field": "dport"}}
    return {"match": {"op": op, "left": left, "right": right}}


ACCEPT = {"accept": None}
DROP = {"drop": None}
