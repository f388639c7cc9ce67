"""The base chains of nftables, from a kernel with given answers."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from acme_alpn_proxy.firewall import nfchains
from acme_alpn_proxy.firewall.nfchains import BaseChain, base_chains
from acme_alpn_proxy.host.netlink import attribute

from ..fakenetlink import FakeNetlink

INET, IPV4, ARP, IPV6 = 1, 2, 3, 10
TABLE, NAME, HOOK, KIND = 1, 3, 4, 7


def chain(family: int, table: str, name: str, hook: tuple[int, int] | None, kind: str) -> bytes:
    answer = struct.pack("!BBH", family, 0, 0)
    answer += attribute(TABLE, table.encode() + b"\0") + attribute(NAME, name.encode() + b"\0")
    if table == "agent":
        answer += attribute(6, struct.pack("!I", 3 if hook else 4))
    if name == "strict":
        answer += attribute(5, struct.pack("!I", 0))
    if hook is not None:
        number, priority = hook
        inner = attribute(1, struct.pack("!I", number)) + attribute(2, struct.pack("!i", priority))
        answer += attribute(0x8000 | HOOK, inner) + attribute(KIND, kind.encode() + b"\0")
    return answer


class Kernel(FakeNetlink):
    """Answers one dump, or refuses."""

    def __init__(self, *answers: bytes, error: int = 0) -> None:
        self._answers = answers
        self._error = error

    def __call__(self, protocol: int) -> Kernel:
        assert protocol == 12
        return self

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        if self._error:
            raise OSError(self._error, "refused")
        return iter(self._answers)


def test_base_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the kernel consults for a visitor's packets are found, with their places."""
    kernel = Kernel(
        chain(INET, "agent", "input", (1, -10), "filter"),
        chain(INET, "agent", "others", None, ""),
        chain(IPV4, "nat", "PREROUTING", (0, -100), "nat"),
        chain(ARP, "arp", "in", (0, 0), "filter"),
        chain(IPV6, "f", "out", (3, 0), "filter"),
        chain(IPV6, "f", "strict", (1, 0), "filter"),
    )
    monkeypatch.setattr(nfchains, "Netlink", kernel)
    assert base_chains() == [
        BaseChain("inet", "agent", "input", "filter", "input", -10, 7),
        BaseChain("ip", "nat", "PREROUTING", "nat", "prerouting", -100),
        BaseChain("ip6", "f", "out", "filter", "output", 0),
        BaseChain("ip6", "f", "strict", "filter", "input", 0, accepts=False),
    ]


def test_no_nftables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without nftables has none; one that may not be asked says so."""
    monkeypatch.setattr(nfchains, "Netlink", Kernel(error=errno.EINVAL))
    assert base_chains() == []
    monkeypatch.setattr(nfchains, "Netlink", Kernel(error=errno.EPERM))
    with pytest.raises(PermissionError):
        base_chains()
