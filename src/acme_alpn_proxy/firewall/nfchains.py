"""The chains of nftables, through netlink: they show where rules exist, even if no program can list
them."""

from __future__ import annotations

import errno
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Final

from ..host.netlink import NETFILTER, Netlink, attributes

_GET_CHAIN: Final = 10 << 8 | 4
"""NFNL_SUBSYS_NFTABLES and NFT_MSG_GETCHAIN of C{linux/netfilter}."""

_TABLE: Final = 1
_NAME: Final = 3
_HOOK: Final = 4
_POLICY: Final = 5
_USES: Final = 6
_HOOK_NUMBER: Final = 1
_HOOK_PRIORITY: Final = 2
_TYPE: Final = 7

FAMILIES: Final = {1: "inet", 2: "ip", 10: "ip6"}
"""NFPROTO_INET, NFPROTO_IPV4 and NFPROTO_IPV6 of C{linux/netfilter.h}."""

_HOOKS: Final = ("prerouting", "input", "forward", "output", "postrouting", "ingress")

_ACCEPT: Final = struct.pack("!I", 1)
"""NF_ACCEPT of C{linux/netfilter.h}."""

_NO_NFTABLES: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT)
"""The errors that a kernel without nftables returns."""


@dataclass(frozen=True, slots=True)
class BaseChain:
    """A chain that the kernel consults, of the families inet, ip or ip6.

    @ivar rules: about how many rules its table has.
    @ivar accepts: whether its policy is to accept packets.
    """

    family: str
    table: str
    name: str
    kind: str
    hook: str
    priority: int
    rules: int = 0
    accepts: bool = True


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
        if answer[0] in FAMILIES and _HOOK in told:
            hook = attributes(told[_HOOK])
            found.append(
                BaseChain(
                    FAMILIES[answer[0]],
                    _text(told[_TABLE]),
                    _text(told[_NAME]),
                    _text(told[_TYPE]),
                    _HOOKS[struct.unpack("!I", hook[_HOOK_NUMBER])[0]],
                    struct.unpack("!i", hook[_HOOK_PRIORITY])[0],
                    rules[answer[0], told[_TABLE]],
                    told.get(_POLICY, _ACCEPT) == _ACCEPT,
                )
            )
    return found


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "replace")
