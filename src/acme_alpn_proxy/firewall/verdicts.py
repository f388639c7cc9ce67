"""What a rule does to a visitor's connection, whichever language it is written in.

The connection is a new one by TCP, from anywhere. A rule matches it more or less surely, and doubt
counts as a match of what drops; but what drops some visitors only (a blacklist, a limit) is no
general drop: it did so before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from ipaddress import IPv6Network, ip_network
from typing import Final, TypeAlias

FIRST_EPHEMERAL: Final = 1024
LAST_PORT: Final = 65535

_EVERYWHERE_V6: Final = IPv6Network("2000::/3")
"""All the global addresses that there are (RFC 4291, IANA)."""


class Certainty(IntEnum):
    """How many of the visitors' connections a rule matches."""

    NONE = 0
    SOME = 1
    """Of some visitors, or at times: what drops these is no general drop."""
    UNKNOWN = 2
    RATED = 3
    """All, up to a rate."""
    ALL = 4

    @property
    def negated(self) -> Certainty:
        """Of the opposite condition."""
        return _NEGATED[self]


_NEGATED: Final = {
    Certainty.NONE: Certainty.ALL,
    Certainty.SOME: Certainty.UNKNOWN,
    Certainty.UNKNOWN: Certainty.UNKNOWN,
    Certainty.RATED: Certainty.SOME,
    Certainty.ALL: Certainty.NONE,
}


def sure(condition: bool) -> Certainty:
    """All or none."""
    return Certainty.ALL if condition else Certainty.NONE


class Action(Enum):
    """What a rule does with what it matches."""

    CONTINUE = "continue"
    ACCEPT = "accept"
    DROP = "drop"
    RETURN = "return"
    JUMP = "jump"
    GOTO = "goto"
    NOTRACK = "notrack"
    TRANSLATE = "translate"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, seen from a visitor's connection.

    @ivar text: names it for the operator.
    @ivar target: the chain, if C{action} is a jump or a goto.
    """

    text: str
    certainty: Certainty
    action: Action
    target: str = ""


@dataclass(slots=True)
class Chain:
    """The rules of a chain, and its policy, L{Action.DROP} or L{Action.ACCEPT}."""

    policy: Action = Action.ACCEPT
    policy_text: str = ""
    rules: list[Rule] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Passed:
    """The firewall lets visitors through."""


@dataclass(frozen=True, slots=True)
class Caught:
    """The rule, or the policy, that visitors run into."""

    by: str


Verdict: TypeAlias = Passed | Caught


class _End(Enum):
    """How a chain ends for a connection that is not caught."""

    ACCEPTED = "accepted"
    FELL_THROUGH = "fell through"


def judge(chains: Mapping[str, Chain], name: str, what: Action) -> Verdict:
    """Whether visitors that enter the base chain C{name} run into a rule that does C{what}."""
    end = _follow(chains, name, what)
    if isinstance(end, Caught):
        return end
    chain = chains[name]
    if end is _End.FELL_THROUGH and chain.policy is what:
        return Caught(chain.policy_text)
    return Passed()


def _follow(chains: Mapping[str, Chain], name: str, what: Action) -> Caught | _End:
    left = False  # whether visitors may have left this chain before its end
    for rule in chains[name].rules:
        certainty, action = rule.certainty, rule.action
        if certainty is Certainty.NONE:
            continue
        end: Caught | _End | None = None
        if action in (Action.JUMP, Action.GOTO):
            end = _follow(chains, rule.target, what)
        elif action is what:
            end = Caught(rule.text)
        elif action in (Action.ACCEPT, Action.DROP, Action.TRANSLATE):
            end = _End.ACCEPTED
        if isinstance(end, Caught):
            if certainty >= Certainty.UNKNOWN:
                return end
        elif end is _End.ACCEPTED:
            if certainty is Certainty.ALL:
                return _End.FELL_THROUGH if left else end
        elif action in (Action.RETURN, Action.GOTO):
            if certainty >= Certainty.RATED:
                return _End.FELL_THROUGH
            left |= certainty is Certainty.UNKNOWN
    return _End.FELL_THROUGH


@dataclass(frozen=True, slots=True)
class Visit:
    """The first packet of a visitor's connection, as the firewall sees it.

    Each method says how surely the packet has what a rule asks for.

    @ivar family: 4 or 6.
    @ivar port: where it goes to.
    @ivar interface: which one it comes in by, or nothing if that is not known.
    """

    family: int
    port: int
    interface: str = ""

    def protocol(self, name: str) -> Certainty:
        return sure(name.lower() in ("tcp", "6", "all", "0"))

    def to_port(self, low: int, high: int) -> Certainty:
        return sure(low <= self.port <= high)

    def from_port(self, low: int, high: int) -> Certainty:
        if low <= FIRST_EPHEMERAL and high == LAST_PORT:
            return Certainty.ALL
        return Certainty.SOME

    def comes_in_by(self, pattern: str) -> Certainty:
        """@param pattern: a name, or the beginning of one and C{+} (iptables) or C{*} (nft)."""
        if pattern in ("+", "*"):
            return Certainty.ALL
        if pattern == "lo":
            return Certainty.NONE
        if not self.interface:
            return Certainty.UNKNOWN
        if pattern[-1:] in ("+", "*"):
            return sure(self.interface.startswith(pattern[:-1]))
        return sure(self.interface == pattern)

    def comes_from(self, text: str) -> Certainty:
        return self._address(text, Certainty.SOME)

    def goes_to(self, text: str) -> Certainty:
        return self._address(text, Certainty.UNKNOWN)

    def _address(self, text: str, otherwise: Certainty) -> Certainty:
        if "-" in text:  # a range
            return otherwise
        try:
            network = ip_network(text, strict=False)
        except ValueError:  # a mask with holes
            return Certainty.UNKNOWN
        if network.version != self.family:
            return Certainty.NONE
        if network.prefixlen == 0:
            return Certainty.ALL
        if isinstance(network, IPv6Network) and network.supernet_of(_EVERYWHERE_V6):
            return Certainty.ALL
        nobody = network.is_loopback or network.is_multicast or str(network) == "255.255.255.255/32"
        return Certainty.NONE if nobody else otherwise

    def state(self, names: Iterable[str]) -> Certainty:
        """Of connection tracking: new, and translated by the redirect."""
        return sure(not {"new", "dnat"}.isdisjoint(name.lower() for name in names))

    def flags(self, mask: Iterable[str], wanted: Iterable[str]) -> Certainty:
        """Whether of the TCP flags in C{mask} just those in C{wanted} are set: only SYN is."""
        masked = {flag.lower() for flag in mask}
        expected = {flag.lower() for flag in wanted} - {"none"}
        return sure(expected == ({"syn"} if masked & {"syn", "all"} else set()))

    def destination_type(self, name: str) -> Certainty:
        return sure(name.lower() == "local")

    def source_type(self, name: str) -> Certainty:
        return {"local": Certainty.NONE, "unicast": Certainty.ALL}.get(name.lower(), Certainty.SOME)

    def packet_type(self, name: str) -> Certainty:
        return sure(name.lower() in ("unicast", "host"))

    def mark(self, value: str) -> Certainty:
        """Nobody is known to mark it."""
        number, _, mask = value.partition("/")
        try:
            unmarked = int(number, 0) & int(mask or "-1", 0) == 0
        except ValueError:
            return Certainty.UNKNOWN
        return Certainty.UNKNOWN if unmarked else Certainty.SOME
