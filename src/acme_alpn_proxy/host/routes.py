"""The addresses of this host, and the routes of its packets: rtnetlink(7).

The kernel applies all its rules and tables to answer. Nothing is sent to the network.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from typing import Final, TypeAlias

from .netlink import ROUTE, Netlink, attribute, attributes

Address: TypeAlias = IPv4Address | IPv6Address

_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}

_GET_LINK: Final = 18
_GET_ADDRESS: Final = 22
_GET_ROUTE: Final = 26
_GET_RULE: Final = 34
_FIB_MATCH: Final = 0x2000
"""RTM_F_FIB_MATCH: return the configured route with all its next hops, not only the chosen hop."""

_SCOPE_UNIVERSE: Final = 0

_IFLA_IFNAME: Final = 3
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_RTA_DST: Final = 1
_RTA_SRC: Final = 2
_RTA_OIF: Final = 4
_RTA_GATEWAY: Final = 5
_RTA_MULTIPATH: Final = 9
_RTA_VIA: Final = 18
_RTA_IP_PROTO: Final = 27
_RTA_SPORT: Final = 28
_FRA_FWMARK: Final = 10

_LOOPBACK: Final = 0x08
_POINT_TO_POINT: Final = 0x10
_NO_ARP: Final = 0x80
"""Flags of an interface: netdevice(7)."""


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface and its addresses of one family.

    @ivar addresses: those with global scope, in the kernel's order: REDIRECT leads visitors from
        this interface to the first one.
    @ivar neighbours: an address in each of its subnets that is not the interface's own.
    @ivar apart: whether no packet arrives through it. That is so for the loopback, and for a dummy
        with an address.
    """

    name: str
    apart: bool = False
    addresses: tuple[Address, ...] = ()
    neighbours: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """The way on which a packet leaves.

    @ivar hops: all its next hops with their interfaces; two routes with the same hops are the same
        way.
    """

    interface: str
    gateway: str
    hops: tuple[bytes, ...] = field(repr=False)

    def __str__(self) -> str:
        return f"through {self.interface}{self.gateway and f' (gateway {self.gateway})'}"


def interfaces(family: int) -> list[Interface]:
    """All interfaces; raises L{OSError}.

    @param family: 4 or 6.
    """
    found: dict[int, Interface] = {}
    with Netlink(ROUTE) as kernel:
        for answer in kernel.dump(_GET_LINK, bytes(16)):
            _, _, _, index, flags, _ = struct.unpack_from("=BBHiII", answer)
            name = attributes(answer[16:])[_IFLA_IFNAME].rstrip(b"\0").decode("utf-8", "replace")
            no_neighbours = flags & _NO_ARP and not flags & _POINT_TO_POINT
            found[index] = Interface(name, bool(flags & _LOOPBACK or no_neighbours))
        for answer in kernel.dump(_GET_ADDRESS, struct.pack("=Bxxxi", _FAMILIES[family], 0)):
            of, length, _, scope, index = struct.unpack_from("=BBBBi", answer)
            if of != _FAMILIES[family] or scope != _SCOPE_UNIVERSE or index not in found:
                continue
            told = attributes(answer[8:])
            own = told.get(_IFA_LOCAL, told[_IFA_ADDRESS])
            found[index] = _with_address(found[index], own, told[_IFA_ADDRESS], length)
    return list(found.values())


def own_addresses() -> set[Address]:
    """All addresses of this host, of both families and every scope; raises L{OSError}."""
    found = set()
    with Netlink(ROUTE) as kernel:
        for answer in kernel.dump(_GET_ADDRESS, bytes(8)):
            told = attributes(answer[8:])
            own = told.get(_IFA_LOCAL) or told.get(_IFA_ADDRESS)
            if own is not None and len(own) in (4, 16):
                found.add(ip_address(own))
    return found


def _with_address(to: Interface, own: bytes, peer: bytes, length: int) -> Interface:
    address, other = ip_address(own), ip_address(peer)
    network = ip_interface((own, length)).network
    if other == address and network.num_addresses > 1:
        other = network[-2] if network[-2] != address else network[1]
    neighbours = to.neighbours if other == address else (*to.neighbours, other)
    return Interface(to.name, to.apart, (*to.addresses, address), neighbours)


def route(source: Address, port: int, destination: Address) -> Route | None:
    """The route of a TCP packet that this host sends; L{None} if there is none.

    @param source: one of this host's addresses.
    @param port: the source port of the packet.
    """
    family = _FAMILIES[source.version]
    bits = source.max_prefixlen
    body = struct.pack("=BBBBBBBBI", family, bits, bits, 0, 0, 0, 0, 0, _FIB_MATCH)
    body += attribute(_RTA_DST, destination.packed) + attribute(_RTA_SRC, source.packed)
    body += attribute(_RTA_IP_PROTO, bytes([socket.IPPROTO_TCP]))
    body += attribute(_RTA_SPORT, struct.pack("!H", port))
    with Netlink(ROUTE) as kernel:
        try:
            told = attributes(kernel.ask(_GET_ROUTE, body)[12:])
        except OSError:
            return None
    return _route(told)


def _route(told: Mapping[int, bytes]) -> Route:
    hops = tuple(told.get(kind, b"") for kind in (_RTA_OIF, _RTA_GATEWAY, _RTA_VIA, _RTA_MULTIPATH))
    interface, gateway = "several", ""
    if hops[0]:
        interface = socket.if_indextoname(struct.unpack("=I", hops[0])[0])
    if hops[1]:
        gateway = str(ip_address(hops[1]))
    return Route(interface, gateway, hops)


def routes_by_mark(family: int) -> bool:
    """Whether a rule chooses the route by a packet's mark (ip-rule(8), fwmark)."""
    with Netlink(ROUTE) as kernel:
        rules = kernel.dump(_GET_RULE, struct.pack("=B11x", _FAMILIES[family]))
        return any(any(attributes(rule[12:]).get(_FRA_FWMARK, b"")) for rule in rules)


def only_go_out(family: int, with_default_route: Iterable[str]) -> bool:
    """Whether interfaces without an address only send: packets may leave through them, but no
    visitor arrives through them.

    This is the case with a VPN that has the default route but no address of this family: the host's
    addresses are on another interface, which has a default route, too. If the host has a global
    address on the loopback, visitors do come in through an interface without an address.
    """
    try:
        numbered = [each for each in interfaces(family) if each.addresses]
    except OSError:
        return False
    if any(each.apart for each in numbered):
        return False
    return not numbered or any(each.name in with_default_route for each in numbered)
