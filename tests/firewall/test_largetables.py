"""Large tables that need not be listed."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from acme_alpn_proxy.firewall import largetables, nfchains
from acme_alpn_proxy.firewall.largetables import Name, need_no_listing, read_meanwhile
from acme_alpn_proxy.firewall.nfchains import BaseChain
from acme_alpn_proxy.host.netlink import attribute

from ..fakenetlink import FakeNetlink

IPV4 = 2
BANS = BaseChain("ip", "bans", "c", "filter", "input", 0, 40_000)


class Kernel(FakeNetlink):
    """Has one rule in each table, and counts how often a table is read."""

    def __init__(self, rule: bytes) -> None:
        self.rule = rule
        self.generation = 7
        self.reads = 0

    def ask(self, kind: int, body: bytes) -> bytes:
        return bytes(4) + attribute(1, struct.pack("!I", self.generation))

    def dump_packets(self, kind: int, body: bytes) -> Iterator[bytes]:
        self.reads += 1
        yield self.rule


@pytest.fixture
def kernel_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[bytes]], Kernel]:
    """Makes the kernel: its rule has these expressions."""

    def make(expressions: list[bytes]) -> Kernel:
        head = struct.pack("!BBH", IPV4, 0, 0) + attribute(1, b"bans\0") + attribute(2, b"c\0")
        kernel = Kernel(head + attribute(4, b"".join(expressions)))
        monkeypatch.setattr(largetables, "Netlink", kernel)
        monkeypatch.setattr(largetables, "_read", {})
        monkeypatch.setattr(nfchains, "base_chains", lambda: [BANS])
        return kernel

    return make


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
    ("expressions", "alike"),
    [
        ([SOURCE, COMPARE, DROP], True),
        ([SOURCE_V6, COMPARE, expression("counter"), DROP], True),
        ([loads(1, 9, 1), COMPARE, SOURCE, expression("lookup", (1, b"ban\0")), DROP], True),
        ([expression("meta", (2, number(6)), (1, number(1))), COMPARE, DROP], True),
        ([expression("ct", (1, number(1)), (2, number(0))), COMPARE, DROP], True),
        ([SOURCE, COMPARE, PORT, COMPARE, DROP], False),
        ([loads(1, 16, 4), COMPARE, DROP], False),
        ([loads(1, 12, 8), COMPARE, DROP], False),
        ([expression("meta", (2, number(3)), (1, number(1))), COMPARE, DROP], False),
        ([expression("meta", (2, number(6)), (3, number(1)))], False),
        ([expression("ct", (1, number(1)), (2, number(2))), COMPARE, DROP], False),
        ([expression("fib", (1, number(1)), (2, number(3))), COMPARE, DROP], False),
        ([expression("notrack")], False),
        ([expression("redir")], False),
    ],
)
def test_alike(
    kernel_with: Callable[[list[bytes]], Kernel], expressions: list[bytes], alike: bool
) -> None:
    """Bans of source addresses treat all packets of one visitor alike; any other rule may not."""
    kernel_with(expressions)
    assert need_no_listing([BANS]) == ({("ip", "bans")} if alike else set())


@pytest.mark.parametrize(
    ("others", "unlisted"),
    [
        ([BaseChain("ip", "nat", "c", "nat", "prerouting", 0)], {("ip", "nat"), ("ip", "bans")}),
        ([BaseChain("ip", "t", "c", "filter", "input", 0, 1)], {("ip", "bans")}),
        ([BaseChain("ip", "t", "c", "filter", "input", 0, accepts=False)], {("ip", "bans")}),
        ([BaseChain("ip", "bans", "o", "filter", "output", 0, 40_000)], set()),
    ],
)
def test_other_tables(
    kernel_with: Callable[[list[bytes]], Kernel], others: list[BaseChain], unlisted: set[Name]
) -> None:
    """A table without rules is not listed, but one that drops packets by its policy is. A table
    that sees answers is listed, however large."""
    kernel_with([SOURCE, COMPARE, DROP])
    assert need_no_listing([BANS, *others]) == unlisted


def test_no_large_table(kernel_with: Callable[[list[bytes]], Kernel]) -> None:
    """If no table is large, none is read, and all are listed."""
    kernel = kernel_with([SOURCE, COMPARE, DROP])
    small = BaseChain("ip", "t", "c", "filter", "input", 0)
    assert need_no_listing([small]) == set()
    assert kernel.reads == 0


@pytest.mark.parametrize(
    ("rule", "unlisted"),
    [([SOURCE, COMPARE, DROP], {("ip", "bans")}), ([PORT, COMPARE, DROP], set())],
)
def test_read_meanwhile(
    kernel_with: Callable[[list[bytes]], Kernel], rule: list[bytes], unlisted: set[Name]
) -> None:
    """What the other process has read need not be read again, until a rule changes."""
    kernel = kernel_with(rule)
    with read_meanwhile():
        pass
    assert need_no_listing([BANS]) == unlisted
    assert kernel.reads == 0
    kernel.generation += 1
    assert need_no_listing([BANS]) == unlisted
    assert kernel.reads == 1


def test_other_process_fails(
    kernel_with: Callable[[list[bytes]], Kernel],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """If the other process fails, it does so silently, and the table is read later."""
    kernel = kernel_with([SOURCE, COMPARE, DROP])
    with monkeypatch.context() as broken:
        broken.setattr(kernel, "dump_packets", lambda *arguments: 1 // 0)
        with read_meanwhile():
            pass
    assert need_no_listing([BANS]) == {("ip", "bans")}
    assert kernel.reads == 1
    assert capfd.readouterr() == ("", "")


def test_chains_cannot_be_seen(
    kernel_with: Callable[[list[bytes]], Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without permission to see the chains, nothing is read meanwhile, and nothing fails."""
    kernel_with([])

    def refuse() -> list[BaseChain]:
        raise PermissionError

    monkeypatch.setattr(nfchains, "base_chains", refuse)
    with read_meanwhile():
        pass
    assert largetables._read == {}
