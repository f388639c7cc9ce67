"""What the kernel makes of the messages of nftables, as nft(8) reads it back."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from acme_alpn_proxy.host.netlink import NETFILTER, Netlink, Refused
from acme_alpn_proxy.redirects import nftmessages as nft
from acme_alpn_proxy.redirects.nftables import steering_table

from .netns import Namespace

TABLE = "tried"
HTTPS = struct.pack("!H", 443)


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace.made("host") as namespace:
        yield namespace


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


TCP = nft.meta(nft.L4PROTO) + nft.compare(bytes([socket.IPPROTO_TCP]))
IPV4 = nft.meta(nft.NFPROTO) + nft.compare(bytes([socket.AF_INET]))
IPV6 = nft.meta(nft.NFPROTO) + nft.compare(bytes([socket.AF_INET6]))

CASES: dict[str, tuple[str, list[bytes], list[dict[str, Any]]]] = {
    "meta": ("filter", [TCP], [match({"meta": {"key": "l4proto"}}, "tcp")]),
    "compare": (
        "filter",
        [nft.meta(nft.IIFTYPE), nft.compare(struct.pack("=H", 772), nft.UNEQUAL)],
        [match({"meta": {"key": "iiftype"}}, "loopback", "!=")],
    ),
    "payload": (
        "filter",
        [TCP, nft.payload(2, 2), nft.compare(HTTPS)],
        [match({"payload": {"protocol": "tcp", "field": "dport"}}, 443)],
    ),
    "fib": (
        "filter",
        [nft.fib_type_of_destination(), nft.compare(struct.pack("=I", 2))],
        [match({"fib": {"result": "type", "flags": ["daddr"]}}, "local")],
    ),
    "mask": (
        "filter",
        [TCP, nft.payload(13, 1), nft.mask(b"\x17"), nft.compare(b"\x02")],
        [
            match(
                {
                    "&": [
                        {"payload": {"protocol": "tcp", "field": "flags"}},
                        ["fin", "syn", "rst", "ack"],
                    ]
                },
                "syn",
            )
        ],
    ),
    "tproxy": (
        "filter",
        [
            *(IPV4, TCP, nft.load(1, socket.inet_aton("127.0.0.1"))),
            *(nft.load(2, struct.pack("!H", 21443)), nft.tproxy(socket.AF_INET, 1, 2)),
        ],
        [{"tproxy": {"family": "ip", "addr": "127.0.0.1", "port": 21443}}],
    ),
    "tproxy by IPv6": (
        "filter",
        [
            *(IPV6, TCP, nft.load(1, socket.inet_pton(socket.AF_INET6, "::1"))),
            *(nft.load(2, struct.pack("!H", 21443)), nft.tproxy(socket.AF_INET6, 1, 2)),
        ],
        [{"tproxy": {"family": "ip6", "addr": "::1", "port": 21443}}],
    ),
    "dnat": (
        "nat",
        [IPV4, TCP, nft.load(1, HTTPS), nft.dnat_to_port(socket.AF_INET, 1)],
        [{"dnat": {"family": "ip", "port": 443}}],
    ),
}


def send(host: Namespace, *messages: Any) -> Netlink:
    """Send a batch to the namespace; the socket is the owner."""
    kernel = host.call(lambda: Netlink(NETFILTER))
    try:
        kernel.send(nft.batch(messages))
    except OSError:
        kernel.close()
        raise
    return kernel


def listed(host: Namespace) -> list[dict[str, Any]]:
    text = host.run("nft", "-j", "list", "table", "inet", TABLE).stdout
    found: list[dict[str, Any]] = json.loads(text)["nftables"]
    return found


@pytest.mark.parametrize("name", CASES)
def test_expression(host: Namespace, name: str) -> None:
    """nft reads back what was meant."""
    kind, expressions, meant = CASES[name]
    with send(
        host,
        nft.new_table(TABLE, nft.OWNER),
        nft.new_chain(TABLE, "c", kind, nft.FILTER if kind == "filter" else nft.BEFORE_DSTNAT),
        nft.new_rule(TABLE, "c", *expressions),
    ):
        (read,) = [each["rule"]["expr"] for each in listed(host) if "rule" in each]
    assert _as_before(read[-len(meant) :]) == meant


def _as_before(read: Any) -> Any:
    """The list of flags as nft printed it before 1.1."""
    if isinstance(read, dict):
        return _as_before(read["|"]) if "|" in read else {n: _as_before(v) for n, v in read.items()}
    return [*map(_as_before, read)] if isinstance(read, list) else read


def test_table_and_chains(host: Namespace) -> None:
    """nft reads back the table, its owner, and the chains with hook and priority."""
    with send(
        host,
        nft.new_table(TABLE, nft.OWNER),
        nft.new_chain(TABLE, "steer", "filter", nft.FILTER),
        nft.new_chain(TABLE, "pin", "nat", nft.BEFORE_DSTNAT),
    ) as kernel:
        chains = [each["chain"] for each in listed(host) if "chain" in each]
        assert [(c["name"], c["type"], c["hook"], c["prio"]) for c in chains] == [
            ("steer", "filter", "prerouting", 0),
            ("pin", "nat", "prerouting", -101),
        ]
        assert "flags owner" in host.run("nft", "list", "table", "inet", TABLE).stdout
        assert kernel.ask(nft.GET_TABLE, nft.which_table(TABLE))
        with pytest.raises(FileNotFoundError):
            kernel.ask(nft.GET_TABLE, nft.which_table("another"))
    assert host.run("nft", "list", "tables").stdout == ""


def test_made_and_deleted(host: Namespace) -> None:
    """A table that is made and deleted in one batch does not exist afterwards, and the same socket
    can make it again."""
    table = steering_table([("127.0.0.1", 1), ("::1", 1)], pin=True)
    with send(host, *table, nft.delete_table("acme_alpn_proxy")) as kernel:
        assert host.run("nft", "list", "tables").stdout == ""
        kernel.send(nft.batch(table))
        assert host.run("nft", "list", "tables").stdout == "table inet acme_alpn_proxy\n"


def test_all_or_nothing(host: Namespace) -> None:
    """If one message of a batch is wrong, the kernel applies none of them, and says which it
    was."""
    chain = nft.new_chain(TABLE, "c", "magic", nft.FILTER)
    with pytest.raises(Refused) as caught:
        send(host, nft.new_table(TABLE, nft.OWNER), chain)
    assert caught.value.message is chain
    assert host.run("nft", "list", "tables").stdout == ""


def test_unknown_expression(host: Namespace) -> None:
    """The kernel reports the position of an unknown expression in a rule."""
    unknown = nft.fib_type_of_destination().replace(b"fib\0", b"fab\0")
    rule = nft.new_rule(TABLE, "c", TCP, unknown)
    chain = nft.new_chain(TABLE, "c", "filter", nft.FILTER)
    with pytest.raises(Refused) as caught:
        send(host, nft.new_table(TABLE, nft.OWNER), chain, rule)
    assert caught.value.message is rule
    assert caught.value.offset is not None
    assert nft.expression_at(rule, caught.value.offset) == "fab"
