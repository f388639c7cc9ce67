"""Bridges that pass packets to the firewall; tests/integration has real ones."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.host import bridges
from acme_alpn_proxy.host.netlink import attribute, nested

from ..diagnosis.folders import folder_for


def link(name: str, kind: str = "", own: tuple[int, int] = (0, 0)) -> bytes:
    """The kernel's answer about an interface: its name, its kind and the switches of a bridge."""
    told = attribute(3, name.encode() + b"\0")
    if kind:
        switches = attribute(36, bytes([own[0]])) + attribute(37, bytes([own[1]]))
        told += nested(18, attribute(1, kind.encode() + b"\0"), nested(2, switches))
    return struct.pack("=16x") + told


class BridgeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.proc = folder_for(self)
        self.links = [link("lo"), link("eth0", "veth"), link("br0", "bridge", (0, 1))]
        links = self.links

        class Kernel:
            def __init__(self, protocol: int) -> None:
                assert protocol == 0

            def __enter__(self) -> Kernel:
                return self

            def __exit__(self, *exception: object) -> None:
                pass

            def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
                assert kind == 18
                return iter(links)

        self.patch(bridges, "Netlink", Kernel)

    def switch(self, ipv4: int, ipv6: int) -> None:
        folder = self.proc / "sys/net/bridge"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bridge-nf-call-iptables").write_text(f"{ipv4}\n")
        (folder / "bridge-nf-call-ip6tables").write_text(f"{ipv6}\n")

    def found(self) -> list[set[str]]:
        return [bridges.filtered_bridges(family, self.proc) for family in (4, 6)]

    def test_not_loaded(self) -> None:
        """Without br_netfilter there are none."""
        self.assertEqual(self.found(), [set(), set()])

    def test_own_switch(self) -> None:
        """A bridge has a switch of its own for each family."""
        self.switch(0, 0)
        self.assertEqual(self.found(), [set(), {"br0"}])
        self.links.append(link("br1", "bridge", (1, 0)))
        self.assertEqual(self.found(), [{"br1"}, {"br0"}])

    def test_switch_for_all(self) -> None:
        """There is a switch for all bridges; an interface of another kind is none."""
        self.switch(1, 0)
        self.links.append(link("br1", "bridge"))
        self.assertEqual(self.found(), [{"br0", "br1"}, {"br0"}])
