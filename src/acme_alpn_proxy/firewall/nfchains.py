"""The chains of nftables, through netlink: they show where rules exist, even if no program can list
them.

Only C{nft} can show the rules themselves. But it takes a second for forty thousand rules, and most
tables of that size are lists of bans, which treat two packets of one visitor alike. This module can
recognize such tables.
"""

from __future__ import annotations

import errno
import re
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Final

from ..host.netlink import NETFILTER, Netlink, attribute, attributes

_GET_CHAIN: Final = 10 << 8 | 4
"""NFNL_SUBSYS_NFTABLES and NFT_MSG_GETCHAIN of C{linux/netfilter}."""

_GET_RULE: Final = 10 << 8 | 7

_TABLE: Final = 1
_NAME: Final = 3
_HOOK: Final = 4
_USES: Final = 6
_HOOK_NUMBER: Final = 1
_HOOK_PRIORITY: Final = 2
_TYPE: Final = 7

_FAMILIES: Final = {1: "inet", 2: "ip", 10: "ip6"}
_HOOKS: Final = ("prerouting", "input", "forward", "output", "postrouting", "ingress")

_NO_NFTABLES: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT)
"""The error that the kernel answers if there are none."""


@dataclass(frozen=True, slots=True)
class BaseChain:
    """A chain that the kernel consults, of the families inet, ip or ip6.

    @ivar rules: about how many rules its table has.
    """

    family: str
    table: str
    name: str
    kind: str
    hook: str
    priority: int
    rules: int = 0


def base_chains() -> list[BaseChain]:
    """All base chains; raises L{OSError}."""
    try:
        with Netlink(NETFILTER) as kernel:
            answers = list(kernel.dump(_GET_CHAIN, struct.pack("!BBH", socket.AF_UNSPEC, 0, 0)))
    except OSError as problem:
        if problem.errno in _NO_NFTABLES:
            return []
        raise
    found = []
    rules: Counter[tuple[int, bytes]] = Counter()
    for answer in answers:
        told = attributes(answer[4:])
        rules[answer[0], told[_TABLE]] += struct.unpack("!I", told.get(_USES, bytes(4)))[0]
    for answer in answers:
        told = attributes(answer[4:])
        if answer[0] in _FAMILIES and _HOOK in told:
            hook = attributes(told[_HOOK])
            found.append(
                BaseChain(
                    _FAMILIES[answer[0]],
                    _text(told[_TABLE]),
                    _text(told[_NAME]),
                    _text(told[_TYPE]),
                    _HOOKS[struct.unpack("!I", hook[_HOOK_NUMBER])[0]],
                    struct.unpack("!i", hook[_HOOK_PRIORITY])[0],
                    rules[answer[0], told[_TABLE]],
                )
            )
    return found


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "replace")


_EXPRESSION: Final = re.compile(rb"\x01\0.\0\x01\0([a-z]+)\0", re.DOTALL)
"""An element of a rule's list of expressions, with the expression's name."""

_ALIKE: Final = (
    *(b"bitwise", b"byteorder", b"cmp", b"connlimit", b"counter", b"dynset", b"immediate"),
    *(b"last", b"limit", b"log", b"lookup", b"objref", b"quota", b"range", b"reject"),
)
"""Expressions whose result depends only on values that the expressions below have loaded."""

_LOADS: Final = {
    b"payload": re.compile(
        # in the network header: the source address, or a byte before it
        rb"\x01\0payload\0.\0\x02\0.{8}\x08\0\x02\0\0\0\0\x01\x08\0\x03\0\0\0\0"
        rb"(?:\x0c\x08\0\x04\0\0\0\0[\x01-\x04]|\x08\x08\0\x04\0\0\0\0[\x01-\x10]"
        rb"|[\0-\x09]\x08\0\x04\0\0\0\0\x01)",
        re.DOTALL,
    ),
    b"meta": re.compile(
        # length, protocol, iif, iifname, iiftype, nfproto, l4proto; to a register
        rb"\x01\0meta\0...\x14\0\x02\0\x08\0\x02\0\0\0\0[\0\x01\x04\x06\x08\x0f\x10]\x08\0\x01\0",
        re.DOTALL,
    ),
    b"ct": re.compile(
        # state and direction; to a register
        rb"\x01\0ct\0.\x14\0\x02\0\x08\0\x01\0.{4}\x08\0\x02\0\0\0\0[\0\x01]",
        re.DOTALL,
    ),
}
"""Loaded values that two packets of one visitor have in common (linux/netfilter/nf_tables.h)."""


def may_tell_apart(chain: BaseChain) -> bool:
    """Whether a rule of this table may look at more in a visitor's packet than where it comes from.

    Raises L{OSError}.
    """
    number = next(each for each, name in _FAMILIES.items() if name == chain.family)
    question = struct.pack("!BBH", number, 0, 0)
    question += attribute(_TABLE, chain.table.encode("utf-8", "replace") + b"\0")
    with Netlink(NETFILTER) as kernel:
        for some in kernel.dump_packets(_GET_RULE, question):
            for name, times in Counter(_EXPRESSION.findall(some)).items():
                alike = _LOADS.get(name)
                if name not in _ALIKE and (alike is None or len(alike.findall(some)) != times):
                    return True
    return False
