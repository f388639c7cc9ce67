"""A packet of a visitor's connection, as the rules of a firewall see it.

For a packet, the result of a rule's condition may be known: yes or no. Or it may be unknown: is the
visitor in that network, is that limit reached? Then the L{Answer} is the text of the question. Two
packets with the same question get the same result, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Final, TypeAlias

from ..host.routes import Address

Answer: TypeAlias = bool | str
"""Yes or no, or the question."""

FIRST_EPHEMERAL: Final = 1024
LAST_PORT: Final = 65535


def _span(network: str) -> tuple[int, int]:
    """The first and the last address."""
    whole = ip_network(network)
    return int(whole.network_address), int(whole.broadcast_address)


_EVERYBODY: Final = {4: _span("0.0.0.0/0"), 6: _span("2000::/3")}
"""All global addresses (RFC 4291, IANA)."""

_NOBODY: Final = {
    4: tuple(map(_span, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4"))),
    6: tuple(map(_span, ("::/127", "ff00::/8"))),
}
"""Addresses that visitors cannot have."""

_LATER_FLAGS: Final = ("psh", "fin")
"""Flags that packets of an established connection may have besides ACK."""


def any_of(answers: Iterable[Answer]) -> Answer:
    """Whether any of these is true (logical or). The texts of several questions are joined."""
    questions = set()
    for answer in answers:
        if answer is True:
            return True
        if answer is not False:
            questions.add(answer)
    return " or ".join(sorted(questions)) if questions else False


def all_of(answers: Iterable[Answer]) -> Answer:
    """Whether all of these are true (logical and). The texts of several questions are joined."""
    questions = []
    for answer in answers:
        if answer is False:
            return False
        if answer is not True:
            questions.append(answer)
    return " and ".join(questions) if questions else True


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet from a visitor to this host, or a reply.

    @ivar family: 4 or 6.
    @ivar interface: the interface that it comes in or goes out through.
    @ivar local: the host's address in the packet.
    @ivar port: the host's port in the packet.
    @ivar dialled: the address that the visitor connected to.
    @ivar translated: whether connection tracking has a redirect for the connection.
    @ivar owner: the owner of the socket at this end.
    @ivar reply: whether it is a reply.
    @ivar first: whether it is the first packet of its direction, SYN or SYN-ACK.
    @ivar marks: different for two packets if rules have marked them differently.
    """

    family: int
    interface: str
    local: Address
    port: int
    dialled: Address
    translated: bool = False
    owner: str = "server"
    reply: bool = False
    first: bool = True
    marks: str = ""

    @property
    def peculiar(self) -> str:
        """All values that a redirect may change, for a question that may depend on any of them."""
        return f"{self.local} {self.port} {self.translated}"

    def protocol(self, name: str) -> Answer:
        return name.lower() in ("tcp", "6", "all", "0")

    def is_local(self, end: str) -> bool:
        """@param end: C{source} or C{destination}."""
        return (end == "source") is self.reply

    def port_within(self, end: str, low: int, high: int) -> Answer:
        """Whether the port of that end is between C{low} and C{high}."""
        first, last = (self.port,) * 2 if self.is_local(end) else (FIRST_EPHEMERAL, LAST_PORT)
        if low <= first and last <= high:
            return True
        return False if high < first or last < low else f"{end} port {low}-{high}"

    def address_within(self, end: str, text: str) -> Answer:
        """Whether the address of that end is C{text}, or in the network or range C{text}."""
        return self.has_address(self.local if self.is_local(end) else None, end, text)

    def has_address(self, address: Address | None, name: str, text: str) -> Answer:
        """@param address: L{None}: the visitor's, which is unknown."""
        try:
            version, low, high, whose = _network(text)
        except ValueError:  # a mask with holes, or not an address
            return f"{name} {text} {address}"
        if version != self.family:
            return False
        if address is not None:
            return low <= int(address) <= high
        return f"{name} {text}" if whose is None else whose

    def by_interface(self, pattern: str, *, inward: bool) -> Answer:
        """@param pattern: a name, or the beginning of one with C{+} (iptables) or C{*} (nft)."""
        name = "" if inward is self.reply else self.interface
        return name.startswith(pattern[:-1]) if pattern[-1:] in ("+", "*") else name == pattern

    def state(self, names: Iterable[str]) -> Answer:
        """Whether its state in connection tracking is one of C{names}."""
        mine = {"new"} if self.first and not self.reply else {"established"}
        if self.translated:
            mine.add("dnat")
        return not mine.isdisjoint(name.lower() for name in names)

    def flags(self, mask: Iterable[str], wanted: Iterable[str]) -> Answer:
        """Whether the TCP flags in C{wanted} are set and the others in C{mask} are not."""
        masked = {flag.lower() for flag in mask}
        expected = {flag.lower() for flag in wanted} - {"none"}
        if "all" in masked:
            masked = {"fin", "syn", "rst", "psh", "ack", "urg"}
        mine = {"syn"} if self.first else {"ack"}
        if self.reply:
            mine.add("ack")
        doubtful = set() if self.first else masked.intersection(_LATER_FLAGS)
        if masked & mine - doubtful != expected - doubtful:
            return False
        return f"flags {sorted(doubtful)} {sorted(expected & doubtful)}" if doubtful else True

    def address_type(self, end: str, name: str) -> Answer:
        kinds = ("local",) if self.is_local(end) else ("unicast",)
        return name.lower() in kinds

    def mark(self, text: str) -> Answer:
        return f"mark {text}{self.marks}"


@lru_cache(maxsize=1024)
def _network(text: str) -> tuple[int, int, int, bool | None]:
    """Version, first and last address of a network; and whether visitors are in it: all of them
    (L{True}), none (L{False}), or perhaps some (L{None})."""
    if "-" in text:
        first, last = map(ip_address, text.split("-"))
        version, low, high = first.version, int(first), int(last)
    elif "/" in text:
        network = ip_network(text, strict=False)
        version = network.version
        low, high = int(network.network_address), int(network.broadcast_address)
    else:
        address = ip_address(text)
        version, low, high = address.version, int(address), int(address)
    if low <= _EVERYBODY[version][0] and _EVERYBODY[version][1] <= high:
        return version, low, high, True
    nobody = any(least <= low and high <= most for least, most in _NOBODY[version])
    return version, low, high, False if nobody else None
