"""The base chains of nftables, from a kernel with given answers."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from acme_alpn_proxy.firewall import nfchains
from acme_alpn_proxy.firewall.nfchains import BaseChain, base_chains
from acme_alpn_proxy.host.netlink import attribute

INET, IPV4, ARP, IPV6 = 1, 2, 3, 10
TABLE, NAME, HOOK, KIND = 1, 3, 4, 7


def chain(family: int, table: str, name: str, hook: tuple[int, int] | None, kind: str) -> bytes:
    answer = struct.pack("!BBH", family, 0, 0)
    answer += attribute(TABLE, table.encode() + b"\0") + attribute(NAME, name.encode() + b"\0")
    if table == "agent":
        answer += attribute(6, struct.pack("!I", 3 if hook else 4))
    if hook is not None:
        number, priority = hook
        inner = attribute(1, struct.pack("!I", number)) + attribute(2, struct.pack("!i", priority))
        answer += attribute(0x8000 | HOOK, inner) + attribute(KIND, kind.encode() + b"\0")
    return answer


class Kernel:
    """Answers one dump, or refuses."""

    def __init__(self, *answers: bytes, error: int = 0) -> None:
        self._answers = answers
        self._error = error

    def __call__(self, protocol: int) -> Kernel:
        assert protocol == 12
        return self

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        if self._error:
            raise OSError(self._error, "refused")
        return iter(self._answers)

    def dump_packets(self, kind: int, body: bytes) -> Iterator[bytes]:
        yield b"".join(self.dump(kind, body))


def test_base_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the kernel consults for a visitor's packets are found, with their places."""
    kernel = Kernel(
        chain(INET, "agent", "input", (1, -10), "filter"),
        chain(INET, "agent", "others", None, ""),
        chain(IPV4, "nat", "PREROUTING", (0, -100), "nat"),
        chain(ARP, "arp", "in", (0, 0), "filter"),
        chain(IPV6, "f", "out", (3, 0), "filter"),
    )
    monkeypatch.setattr(nfchains, "Netlink", kernel)
    assert base_chains() == [
        BaseChain("inet", "agent", "input", "filter", "input", -10, 7),
        BaseChain("ip", "nat", "PREROUTING", "nat", "prerouting", -100),
        BaseChain("ip6", "f", "out", "filter", "output", 0),
    ]


def expression(name: str, *values: tuple[int, bytes]) -> bytes:
    """One of a rule's."""
    data = b"".join(attribute(kind, value) for kind, value in values)
    return attribute(1, attribute(1, name.encode() + b"\0") + attribute(2, data))


def number(value: int) -> bytes:
    return struct.pack("!I", value)


def loads(base: int, offset: int, length: int) -> bytes:
    values = ((1, number(1)), (2, number(base)), (3, number(offset)), (4, number(length)))
    return expression("payload", *values)


COMPARE = expression("cmp", (1, number(1)), (2, number(0)), (3, attribute(1, b"\1\2\3\4")))
DROP = expression("immediate", (1, number(0)), (2, attribute(2, attribute(1, number(0)))))
SOURCE, SOURCE_V6, PORT = loads(1, 12, 4), loads(1, 8, 16), loads(2, 2, 2)


@pytest.mark.parametrize(
    ("expressions", "apart"),
    [
        ([SOURCE, COMPARE, DROP], False),
        ([SOURCE_V6, COMPARE, expression("counter"), DROP], False),
        ([loads(1, 9, 1), COMPARE, SOURCE, expression("lookup", (1, b"ban\0")), DROP], False),
        ([expression("meta", (2, number(6)), (1, number(1))), COMPARE, DROP], False),
        ([expression("ct", (1, number(1)), (2, number(0))), COMPARE, DROP], False),
        ([SOURCE, COMPARE, PORT, COMPARE, DROP], True),
        ([loads(1, 16, 4), COMPARE, DROP], True),
        ([loads(1, 12, 8), COMPARE, DROP], True),
        ([expression("meta", (2, number(3)), (1, number(1))), COMPARE, DROP], True),
        ([expression("meta", (2, number(6)), (3, number(1)))], True),
        ([expression("ct", (1, number(1)), (2, number(2))), COMPARE, DROP], True),
        ([expression("fib", (1, number(1)), (2, number(3))), COMPARE, DROP], True),
        ([expression("notrack")], True),
        ([expression("redir")], True),
    ],
)
def test_may_tell_apart(
    monkeypatch: pytest.MonkeyPatch, expressions: list[bytes], apart: bool
) -> None:
    """Bans of source addresses treat all packets of one visitor alike; any other rule may not."""
    head = struct.pack("!BBH", IPV4, 0, 0) + attribute(TABLE, b"t\0") + attribute(2, b"c\0")
    rule = head + attribute(4, b"".join(expressions))
    monkeypatch.setattr(nfchains, "Netlink", Kernel(rule))
    table = BaseChain("ip", "t", "c", "filter", "input", 0)
    assert nfchains.may_tell_apart(table) is apart


def test_no_nftables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without nftables has none; one that may not be asked says so."""
    monkeypatch.setattr(nfchains, "Netlink", Kernel(error=errno.EINVAL))
    assert base_chains() == []
    monkeypatch.setattr(nfchains, "Netlink", Kernel(error=errno.EPERM))
    with pytest.raises(PermissionError):
        base_chains()
