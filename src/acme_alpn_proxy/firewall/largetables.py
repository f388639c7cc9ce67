"""Recognizes large tables of nftables that treat all packets of one visitor alike.

C{nft} takes a second to list forty thousand rules, and most tables of that size are lists of bans.
The rules of such a table, as the kernel sends them through netlink(7), take a third of that time.
The kernel needs this time: for each netlink message of its answer, it walks through the list of
rules from the start. So L{read_meanwhile} lets another process read them while this one loads
modules.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final, TypeAlias

from ..host.netlink import NETFILTER, Netlink, attribute, attributes
from . import nfchains
from .nfchains import FAMILIES, BaseChain

Name: TypeAlias = tuple[str, str]
"""Family and name of a table."""

_MANY: Final = 1_000
"""A table with more rules is large: it takes long to list, so it is listed only if necessary."""

_GET_RULE: Final = 10 << 8 | 7
_GET_GENERATION: Final = 10 << 8 | 16
"""NFNL_SUBSYS_NFTABLES with NFT_MSG_GETRULE and NFT_MSG_GETGEN of C{linux/netfilter}."""

_TABLE: Final = 1
_GENERATION: Final = 1

_ALIKE: Final = (
    *(b"bitwise", b"byteorder", b"cmp", b"connlimit", b"counter", b"dynset", b"immediate"),
    *(b"last", b"limit", b"log", b"lookup", b"objref", b"quota", b"range", b"reject"),
)
"""Expressions whose result depends only on values that the expressions below have loaded."""

_LOADS_ALIKE: Final = (
    # payload, in the network header: the source address, or a byte before it
    rb"payload\0.\0\x02\0.{8}\x08\0\x02\0\0\0\0\x01\x08\0\x03\0\0\0\0"
    rb"(?:\x0c\x08\0\x04\0\0\0\0[\x01-\x04]|\x08\x08\0\x04\0\0\0\0[\x01-\x10]"
    rb"|[\0-\x09]\x08\0\x04\0\0\0\0\x01)",
    # meta, to a register: length, protocol, iif, iifname, iiftype, nfproto, l4proto
    rb"meta\0...\x14\0\x02\0\x08\0\x02\0\0\0\0[\0\x01\x04\x06\x08\x0f\x10]\x08\0\x01\0",
    # ct, to a register: state and direction
    rb"ct\0.\x14\0\x02\0\x08\0\x01\0.{4}\x08\0\x02\0\0\0\0[\0\x01]",
)
"""Loaded values that two packets of one visitor have in common (linux/netfilter/nf_tables.h)."""

_telling_expression: Final = re.compile(
    rb"(?s)\x01\0.\0\x01\0(?!(?:%b)\0|%b)[a-z]+\0" % (b"|".join(_ALIKE), b"|".join(_LOADS_ALIKE))
).search
"""Finds an element of a rule's list of expressions that the two lists above do not name."""


def need_no_listing(chains: Sequence[BaseChain]) -> set[Name]:
    """The large tables with these chains that treat all packets of one visitor alike. If there is
    one, also the tables without rules.

    It is empty if no table is large: then one command lists all. Raises L{OSError}.
    """
    large = _large(chains)
    if not large:
        return set()
    known = _read.get(_generation(), {})
    alike = {each for each in large if (known[each] if each in known else _is_alike(each))}
    return alike and alike | _without_rules(chains)


_read: dict[int, Mapping[Name, bool]] = {}
"""What L{read_meanwhile} has found: for a generation of the rules, which tables are alike."""


@contextmanager
def read_meanwhile() -> Iterator[None]:
    """During the block, another process reads the large tables.

    What it has found is used until the rules of any table change: the kernel counts generations.
    Whatever fails here, L{need_no_listing} does the work later.
    """
    large: list[Name] = []
    with suppress(OSError):
        large = _large(nfchains.base_chains())
    if not large:
        yield
        return
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            generation = _generation()
            found = [(each, _is_alike(each)) for each in large]
            os.write(writing, json.dumps((generation, found)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    try:
        yield
    finally:
        with open(reading, "rb") as stream:
            answer = stream.read()
        os.waitpid(child, 0)
    if answer:
        generation, found = json.loads(answer)
        _read[generation] = {(family, table): alike for (family, table), alike in found}


def _large(chains: Sequence[BaseChain]) -> list[Name]:
    """The large tables that see nothing but incoming packets."""
    large = dict.fromkeys((each.family, each.table) for each in chains if each.rules > _MANY)
    for each in chains:
        if each.hook in ("output", "postrouting"):  # answers come from this host
            large.pop((each.family, each.table), None)
    return [*large]


def _without_rules(chains: Sequence[BaseChain]) -> set[Name]:
    """The tables in which all packets are accepted, because there is no rule."""
    rules = {(each.family, each.table) for each in chains if each.rules or not each.accepts}
    return {(each.family, each.table) for each in chains} - rules


def _generation() -> int:
    """The number of changes of the rules of nftables in this network namespace."""
    with Netlink(NETFILTER) as kernel:
        answer = kernel.ask(_GET_GENERATION, struct.pack("!BBH", socket.AF_UNSPEC, 0, 0))
    (number,) = struct.unpack("!I", attributes(answer[4:])[_GENERATION])
    return int(number)


def _is_alike(name: Name) -> bool:
    """Whether this table treats all packets of one visitor alike: its rules read only values that
    these packets have in common, such as the source address. Raises L{OSError}.
    """
    family, table = name
    number = next(each for each, family_name in FAMILIES.items() if family_name == family)
    question = struct.pack("!BBH", number, 0, 0)
    question += attribute(_TABLE, table.encode("utf-8", "replace") + b"\0")
    with Netlink(NETFILTER) as kernel:
        return not any(map(_telling_expression, kernel.dump_packets(_GET_RULE, question)))
