"""Whether the firewall would treat visitors differently if they were steered, and why.

How the firewall treats a visitor at :443 is known: visitors are served today. So two packets are
followed through its rules: today's packet and the steered one. Only a rule that passes the first
and catches the second can do harm. What both have in common (the visitor's address, a limit, a
mark) need not be known. All rules that the kernel consults are read: those of nftables, including
those that iptables-nft has made, and those of the legacy iptables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Final, TypeAlias

from twisted.internet.defer import Deferred, inlineCallbacks

from ..addresses import HTTPS
from ..errors import StartError, not_permitted
from ..host import facts, routes
from ..host.routes import Address, Route
from ..interfaces import ICommands, Result
from .choices import PASSED, Choices
from .nftrules import Json
from .packets import Packet
from .reading import (
    ASSUMED,
    CannotLook,
    Firewall,
    Ruleset,
    read,
    read_contents,
    read_nftables,
    ruleset,
)
from .rules import Action, Base, Course
from .xtables import BINARIES

_TRACKING: Final = -200
_REDIRECT: Final = -100
_BACK: Final = 100
"""Priorities in a hook (<linux/netfilter_ipv4.h>): connection tracking; the translation of
destinations (DNAT); the translation of sources (SNAT), which also restores the source of replies.
"""

FAR: Final = {
    4: tuple(map(ip_address, ("192.0.2.1", "203.0.113.77", "1.0.0.1"))),
    6: tuple(map(ip_address, ("2001:db8:ffff::1", "2a00::1"))),
}
"""Addresses of distant visitors, to look up their routes. Nothing is sent to them."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to steer, as far as it matters to a firewall and the routes.

    @ivar port: the port that a redirect leads to; L{None}: the packet is not changed.
    @ivar keeps_address: whether the redirect changes only the port.
    @ivar priority: the redirect's priority in the hook prerouting: translations with a higher
        number run after it. L{None}: all chains of that hook run before it, and can take visitors
        away from it.
    """

    port: int | None = None
    keeps_address: bool = True
    priority: int | None = None


def iptables(port: int, *, keeps_address: bool = False) -> Way:
    """REDIRECT in nat PREROUTING, or DNAT to the same address."""
    return Way(port, keeps_address, _REDIRECT)


SK_LOOKUP: Final = Way()
NFTABLES: Final = Way(priority=_REDIRECT - 1)
"""TPROXY in a table of the program's own, which also keeps other rules from translating
visitors."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """An interface through which visitors' packets to an address of this host arrive.

    @ivar address: the address of the interface, to which REDIRECT maps visitors from this
        interface; L{None}: it has no address.
    @ivar visitors: some addresses that such visitors may have.
    """

    interface: str
    dialled: Address
    address: Address | None
    visitors: tuple[Address, ...] = ()


def arrivals(family: int) -> list[Arrival]:
    """All interfaces through which visitors may arrive: for each address of this host, its own
    interface, and the interface through which replies leave."""
    found = {each.name: each for each in routes.interfaces(family)}
    ways: dict[tuple[str, Address], None] = {}
    for interface in found.values():
        for dialled in interface.addresses:
            if not interface.apart:
                ways[interface.name, dialled] = None
            for far in FAR[family]:
                route = routes.route(dialled, HTTPS, far)
                by = found.get(route.interface) if route else None
                if by is not None and not by.apart and (by.addresses or interface.apart):
                    ways[by.name, dialled] = None
    return [
        Arrival(
            name,
            dialled,
            next(iter(found[name].addresses), None),
            (*found[name].neighbours, *FAR[family]),
        )
        for name, dialled in ways
    ]


AskRoute: TypeAlias = Callable[[Address, int, Address], Route | None]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The facts about a host that matter besides its firewall.

    @ivar arrivals: by family.
    @ivar route: same as L{routes.route}.
    @ivar by_mark: the families whose routes may depend on a packet's mark.
    @ivar legacy: whether the command iptables is the legacy one.
    """

    arrivals: Mapping[int, Sequence[Arrival]]
    route: AskRoute = routes.route
    by_mark: Sequence[int] = ()
    legacy: bool = False


class Host:
    """What was read on a host, so that each way can be judged."""

    def __init__(self, firewalls: Mapping[int, Firewall], around: Surroundings) -> None:
        """@param firewalls: by family."""
        self._firewalls = firewalls
        self._around = around
        self._contents: dict[tuple[str, str], Sequence[Json]] = {}
        self._rulesets = {family: ruleset(each, family) for family, each in firewalls.items()}

    @inlineCallbacks
    def why_not(
        self, way: Way, commands: ICommands
    ) -> Generator[Deferred[Any], Any, Reason | None]:
        """Why this way would hurt visitors here, on one line; L{None}: it would not.

        @return: a Deferred, which never fails.
        """
        useless: list[Reason | None] = []
        for family in self._firewalls:
            judge = self._judge(family, way)
            reason = judge.hurts()
            while reason is not None and (yield self._read_contents(family, commands)):
                judge = self._judge(family, way)
                reason = judge.hurts()
            if reason is not None:
                return reason
            useless.append(judge.useless)
        return useless[0] if useless and all(useless) else None

    @inlineCallbacks
    def why_spared(
        self, way: Way, commands: ICommands
    ) -> Generator[Deferred[Any], Any, str | None]:
        """The rule that keeps some visitors out today, but would let them in with this redirect.

        @return: a Deferred of one line, or of L{None}; it never fails.
        """
        for family in self._firewalls:
            reason = self._judge(family, way).spares()
            while reason is not None and (yield self._read_contents(family, commands)):
                reason = self._judge(family, way).spares()
            if reason is not None:
                return _printable(reason)
        return None

    def not_first(self, way: Way) -> str | None:
        """While this redirect is applied: why visitors are sent elsewhere before it sees them;
        L{None}: they are not."""
        for family in self._firewalls:
            judge = self._judge(family, way, applied=True)
            for arrival in self._around.arrivals[family]:
                reason = judge.taken_away(arrival)
                if reason is not None:
                    return reason
        return None

    def _judge(self, family: int, way: Way, *, applied: bool = False) -> _Judge:
        return _Judge(self._rulesets[family], family, way, self._around, applied=applied)

    @inlineCallbacks
    def _read_contents(
        self, family: int, commands: ICommands
    ) -> Generator[Deferred[Any], Any, bool]:
        """Read the sets that a packet was compared with; returns whether any was read."""
        wanted = [each for each in self._rulesets[family].wanted() if each not in self._contents]
        contents = yield read_contents(commands, wanted)
        if contents:
            self._contents.update(contents)
            for family, firewall in self._firewalls.items():
                self._rulesets[family] = ruleset(firewall, family, self._contents)
        return bool(contents)


class _Judge:
    """Judges one way for one family.

    @ivar useless: set by L{hurts}: a rule that catches all visitors, steered or not, so that
        steering would be of no use; L{None} if visitors can get through.
    """

    useless: Reason | None = None

    def __init__(
        self, rules: Ruleset, family: int, way: Way, around: Surroundings, *, applied: bool
    ) -> None:
        self._rules = rules
        self._family = family
        self._way = way
        self._around = around
        self._applied = applied
        self._own_table = "legacy nat" if around.legacy else f"{'ip' if family == 4 else 'ip6'} nat"
        self._who = f"IPv{family} visitors"

    def hurts(self) -> Reason | None:
        """The first reason why steered visitors would be treated worse."""
        ways_in = self._around.arrivals[self._family]
        several = len({each.interface for each in ways_in}) > 1
        caught: list[Reason | None] = []
        for arrival in ways_in:
            self._who = f"IPv{self._family} visitors"
            if several:
                self._who += f" that arrive at {arrival.interface}"
            for why_not in (self.taken_away, self._untracked, self._answered_elsewhere):
                reason = why_not(arrival)
                if reason is not None:
                    return reason
            reason, all_caught = self._caught(arrival)
            if reason is not None:
                return reason
            caught.append(all_caught)
        self.useless = caught[0] if all(caught) and caught else None
        return None

    def spares(self) -> str | None:
        """The first rule that catches some visitors today, but would let them in if steered."""
        for arrival in self._around.arrivals[self._family]:
            choices = Choices()
            today, steered = (
                Course(packet, choices).through(self._met())
                for packet in (self._packet(arrival), self._steered(arrival))
            )
            reason = choices.lost(steered, today) if choices.may_pass(today) else None
            if reason is not None:
                return reason
        return None

    def taken_away(self, arrival: Arrival) -> Reason | None:
        """The rule that sends visitors elsewhere before this way sees them."""
        choices = Choices()
        outcome = Course(
            self._packet(arrival), choices, Action.TRANSLATE, str(self._way.port or "")
        ).through(self._translating())
        for end in choices.usual_ends(outcome):
            if end is not PASSED:
                before = "" if self._way.priority is None else ", before the proxy's rule"
                text = f"a rule sends the {self._who} to another port or host{before}: {end.by}"
                return _reason(text, end.by, REMOVE)
        return None

    def _translating(self) -> list[Base]:
        """The chains that may send visitors elsewhere before this way."""
        at, before = self._way.priority, []
        bases = self._hook("prerouting")
        if at is None:
            return bases
        bases = [base for base in bases if base.kind == "nat"]
        own = next(
            (each for each in bases if (each.table, each.name) == (self._own_table, "PREROUTING")),
            None,
        )
        for base in bases:
            earlier = base.priority < at or (base.priority == at and self._is_younger(base, own))
            if base is not own and earlier:
                before.append(base)
        return [*before, own] if own is not None and self._applied else before

    def _is_younger(self, base: Base, own: Base | None) -> bool:
        """For two chains of equal priority: whether the kernel consults C{base} before ours.

        Of two chains with equal priority, the kernel consults the newer one first. If our chain
        does not exist yet, it will be the newer one.
        """
        if own is None or self._way.port is None:
            return False
        if base.age is None or own.age is None:  # one of them belongs to the legacy iptables
            return not self._applied
        return base.age > own.age

    def _untracked(self, arrival: Arrival) -> Reason | None:
        """The rule that exempts visitors, or the answers to them, from connection tracking."""
        if self._way.port is None:
            return None
        before, after = self._packet(arrival), self._steered(arrival)
        for hook, packet in (("prerouting", before), ("output", replace(after, reply=True))):
            choices = Choices()
            bases = [base for base in self._hook(hook) if base.priority < _TRACKING]
            outcome = Course(packet, choices, Action.NOTRACK).through(bases)
            for end in choices.usual_ends(outcome):
                if end is not PASSED:
                    what = "answers to the " if packet.reply else ""
                    text = (
                        f"a rule exempts the {what}{self._who} from connection tracking, so"
                        f" iptables cannot redirect these visitors: {end.by}"
                    )
                    return _reason(text, end.by, REMOVE)
        return None

    def _answered_elsewhere(self, arrival: Arrival) -> Reason | None:
        """Why replies would take another route: until the translation restores their source, they
        come from another address and port."""
        if self._way.port is None:
            return None
        packet = self._steered(arrival)
        for visitor in arrival.visitors:
            before = self._around.route(arrival.dialled, HTTPS, visitor)
            after = self._around.route(packet.local, packet.port, visitor)
            if before is not None and before != after:
                leave = f"leave {after} instead of {before}"
                if after is None:
                    leave = f"have no route instead of leaving {before}"
                return Reason(
                    f"answers to the {self._who} (connected to {arrival.dialled}) would"
                    f" {leave}, because they come from {packet.local} port {packet.port} until the"
                    " kernel translates them back",
                    "change the routing rules (see: ip rule)",
                )
        return None

    def _caught(self, arrival: Arrival) -> tuple[Reason | None, Reason | None]:
        """The rule that catches visitors only if they are steered, and the rule that catches them
        all, steered or not."""
        before, after = self._packet(arrival), self._steered(arrival)
        all_caught = None
        for first in (True, False):
            for answers, bases in ((False, self._met()), (True, self._answered())):
                by, by_all = self._compare(
                    replace(before, first=first, reply=answers),
                    replace(after, first=first, reply=answers),
                    bases,
                )
                if isinstance(by, Reason):
                    return by, None
                if by is not None:
                    return self._told(by, answers), None
                if by_all is not None:
                    all_caught = all_caught or self._told(by_all, answers)
        return None, all_caught

    def _compare(
        self, before: Packet, after: Packet, bases: Sequence[Base]
    ) -> tuple[str | None, str | None]:
        choices = Choices()
        courses = Course(before, choices), Course(after, choices)
        outcomes = [course.through(bases) for course in courses]
        if courses[0].marked != courses[1].marked:  # questions about marks then differ
            if after.reply and self._family in self._around.by_mark:
                by, _ = min(courses[0].marked ^ courses[1].marked)
                return Reason(
                    "a rule marks the answers to steered visitors differently, and routing rules"
                    f" depend on marks: {by}",
                    "change that rule, or the routing rules (see: ip rule)",
                ), None
            after = replace(after, marks=" of another packet")
            outcomes[1] = Course(after, choices).through(bases)
        by_all = None if choices.may_pass(outcomes[1]) else choices.lost(PASSED, outcomes[1])
        return choices.lost(*outcomes), by_all

    def _told(self, by: str, answers: bool) -> Reason:
        port = self._way.port
        if answers:
            what = f"the proxy's answers to the {self._who}"
            what += "" if port is None else f" (their source port is {port})"
            remedy = f"accept answers from port {port}, too"
        else:
            after = (
                "that the proxy receives" if port is None else f"after the redirect to port {port}"
            )
            what = f"the {self._who} {after}"
            remedy = f"accept connections to port {port}, too"
        if port is None:
            remedy = "change that rule"
        return _reason(f"the firewall would drop {what}: {by}", by, remedy)

    def _packet(self, arrival: Arrival) -> Packet:
        return Packet(self._family, arrival.interface, arrival.dialled, HTTPS, arrival.dialled)

    def _steered(self, arrival: Arrival) -> Packet:
        packet = replace(self._packet(arrival), owner="proxy")
        if self._way.port is None:
            return packet
        address = arrival.dialled if self._way.keeps_address else arrival.address
        return replace(
            packet, port=self._way.port, local=address or arrival.dialled, translated=True
        )

    def _hook(self, name: str) -> list[Base]:
        bases = [base for base in self._rules.bases if base.hook == name]
        return sorted(bases, key=lambda base: base.priority)

    def _met(self) -> list[Base]:
        """The chains that a visitor's packet passes after the redirect."""
        after = [
            base
            for base in self._hook("prerouting")
            if base.priority >= _REDIRECT and base.kind != "nat"
        ]
        return after + self._hook("input")

    def _answered(self) -> list[Base]:
        """The chains that an answer passes before it is translated back."""
        before = [base for base in self._hook("postrouting") if base.priority <= _BACK]
        return [base for base in self._hook("output") + before if base.kind != "nat"]


REMOVE: Final = "remove that rule, if the site does not need it"
"""The remedy for a rule that takes visitors away from the proxy."""


class Reason(str):
    """Why a way would hurt visitors, on one line.

    @ivar remedy: what the operator can change so that it would not.
    """

    remedy: str

    def __new__(cls, text: str, remedy: str) -> Reason:
        reason = super().__new__(cls, _printable(text))
        reason.remedy = remedy
        return reason


def _reason(text: str, by: str, remedy: str) -> Reason:
    """@param by: the rule; the remedy is another one if its chain cannot be read."""
    return Reason(
        text,
        "make it possible to read these rules (apt install nftables iptables)"
        if by.startswith(ASSUMED)
        else remedy,
    )


def _printable(text: str) -> str:
    """Escape bytes that are not UTF-8: a comment of a rule may have some."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@inlineCallbacks
def look(commands: ICommands, families: Iterable[int]) -> Generator[Deferred[Any], Any, Host]:
    """Read the firewall and the routes; changes nothing. Fails with L{CannotLook}."""
    nftables = yield read_nftables(commands)
    firewalls = {}
    for family in families:
        firewalls[family] = yield read(commands, family, nftables)
    version: Result = yield commands.run([BINARIES[4], "-V"])
    try:
        around = Surroundings(
            {family: arrivals(family) for family in firewalls},
            by_mark=[family for family in firewalls if routes.routes_by_mark(family)],
            legacy="legacy" in version.output,
        )
    except OSError as problem:  # a sandbox may forbid netlink
        raise CannotLook(
            f"cannot read this host's addresses and routes from the kernel: {problem.strerror}",
            "allow netlink sockets (in a systemd unit: AF_NETLINK in RestrictAddressFamilies=)",
        ) from None
    return Host(firewalls, around)


@inlineCallbacks
def require(
    way: Way, commands: ICommands, families: Iterable[int], variant: tuple[Way, str] | None = None
) -> Generator[Deferred[Any], Any, Host]:
    """Refuse a way that would hurt visitors here: the Deferred fails with L{StartError}.

    @param variant: another form of this way, and how to choose it.
    @return: a Deferred of what was read.
    """
    try:
        host: Host = yield look(commands, families)
    except CannotLook as problem:
        raise _refusal(str(problem), problem.remedy) from None
    reason: Reason | None = yield host.why_not(way, commands)
    if reason is None:
        return host
    if variant is not None and (yield host.why_not(variant[0], commands)) is None:
        raise _refusal(reason, f"{variant[1]}, or {reason.remedy}")
    raise _refusal(reason, reason.remedy)


def _refusal(reason: str, remedy: str) -> StartError:
    if not facts.may_administer_network():
        return not_permitted(reason)
    return StartError(
        f"{reason}; {remedy} (--force skips this check, but visitors may be lost)", os.EX_CONFIG
    )
