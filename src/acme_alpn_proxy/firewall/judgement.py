"""Whether the firewall would drop the visitors that are redirected to the proxy's port.

The redirect happens in PREROUTING, so what the firewall sees from there on is a new TCP connection
to the proxy's port, where it expects one to 443. All that the kernel consults is looked at: the
rules of nftables, those that iptables makes of it among them, and those of the legacy iptables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from twisted.internet.defer import Deferred, inlineCallbacks

from ..host import facts
from ..interfaces import NOT_FOUND, ICommands, Result
from .iptablesrules import iptables_chains
from .nftrules import NFPROTO, Json, Table, is_translated, only
from .verdicts import Action, Caught, Chain, Passed, Verdict, Visit, judge
from .xtables import BINARIES, command

HTTPS: Final = 443

_TABLES: Final = ("raw", "mangle", "nat", "filter", "security")
"""The tables of iptables."""

_NO_SUCH_TABLE: Final = 3
"""Exit status of iptables where the kernel has no such table."""

_CONNTRACK_PRIORITY: Final = -200
_DNAT_PRIORITY: Final = -100
"""Where in PREROUTING connection tracking and the redirect are (<linux/netfilter_ipv4.h>)."""


@dataclass(frozen=True, slots=True)
class Firewall:
    """What a host's firewall consists of, for one family.

    @ivar nftables: the objects of C{nft -j list ruleset}.
    @ivar translated: what C{iptables -S} prints of those tables of nftables that are made by
        iptables with extensions, which nft cannot show; by table.
    @ivar iptables: the same of tables that nft does not know, those of the legacy iptables; pairs
        of table and listing.
    """

    nftables: Sequence[Mapping[str, Json]] = ()
    translated: Mapping[str, str] = field(default_factory=dict)
    iptables: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class _Base:
    """A base chain, and where the kernel consults it."""

    chains: Mapping[str, Chain]
    name: str
    hook: str
    priority: int
    translates: bool

    @property
    def sees_proxy_port(self) -> bool:
        behind = self.hook == "prerouting" and self.priority >= _DNAT_PRIORITY
        return self.hook == "input" or (behind and not self.translates)

    @property
    def before_tracking(self) -> bool:
        return self.hook == "prerouting" and self.priority < _CONNTRACK_PRIORITY


_PRIORITIES: Final = {"raw": -300, "mangle": -150, "nat": _DNAT_PRIORITY}


def drops(firewall: Firewall, visit: Visit) -> Verdict:
    """Whether visitors are dropped on their way from the redirect to the proxy's port."""
    return _first_caught(
        (base for base in _bases(firewall, visit) if base.sees_proxy_port), Action.DROP
    )


def exempts_from_tracking(firewall: Firewall, visit: Visit) -> Verdict:
    """Whether visitors are exempt from connection tracking, so that nothing is redirected.

    @param visit: to the port before the redirect, L{HTTPS}.
    """
    return _first_caught(
        (base for base in _bases(firewall, visit) if base.before_tracking), Action.NOTRACK
    )


def sends_elsewhere(firewall: Firewall, visit: Visit) -> Verdict:
    """Whether visitors are sent elsewhere in PREROUTING, so that no socket here is looked up.

    @param visit: to the port that they dial, L{HTTPS}.
    """
    return _first_caught(
        (base for base in _bases(firewall, visit) if base.hook == "prerouting"), Action.TRANSLATE
    )


def _first_caught(bases: Iterable[_Base], what: Action) -> Verdict:
    """The verdict of the first of these chains that does C{what} to visitors."""
    for base in bases:
        verdict = judge(base.chains, base.name, what)
        if isinstance(verdict, Caught):
            return verdict
    return Passed()


def _bases(firewall: Firewall, visit: Visit) -> list[_Base]:
    found = _nft_bases(firewall, visit)
    for table, listing in firewall.iptables:
        chains = iptables_chains(table, listing, visit)
        for name in ("PREROUTING", "INPUT"):
            if name in chains:
                priority = _PRIORITIES.get(table, 0)
                found.append(_Base(chains, name, name.lower(), priority, table == "nat"))
    return found


def _nft_bases(firewall: Firewall, visit: Visit) -> list[_Base]:
    objects = [only(each) for each in firewall.nftables]
    found = []
    for kind, table in objects:
        if kind != "table" or table["family"] not in ("inet", NFPROTO[visit.family][1]):
            continue
        of_table = [
            (kind, each)
            for kind, each in objects
            if (each.get("family"), each.get("table")) == (table["family"], table["name"])
        ]
        chains = _nft_chains(firewall, visit, table, of_table)
        found += [
            _Base(chains, each["name"], each["hook"], each["prio"], each["type"] == "nat")
            for kind, each in of_table
            if kind == "chain" and "hook" in each
        ]
    return found


def _nft_chains(
    firewall: Firewall,
    visit: Visit,
    table: Mapping[str, Json],
    objects: Sequence[tuple[str, Mapping[str, Json]]],
) -> dict[str, Chain]:
    name = f"{table['family']} {table['name']}"
    sets = {
        f"@{each['name']}": each.get("elem", []) for kind, each in objects if kind in ("set", "map")
    }
    reader = Table(visit, name, sets)
    chains = {}
    rules: dict[str, list[Mapping[str, Json]]] = {}
    for kind, each in objects:
        if kind == "chain":
            policy = Action(each.get("policy", "accept"))
            text = f"the policy '{policy.value}' of the nftables chain '{name} {each['name']}'"
            chains[each["name"]] = Chain(policy, text)
        elif kind == "rule":
            rules.setdefault(each["chain"], []).append(each)
    listing = "" if table["family"] == "inet" else firewall.translated.get(table["name"], "")
    translated = iptables_chains(table["name"], listing, visit)
    for chain, here in rules.items():
        theirs = translated.get(chain, Chain()).rules
        if len(theirs) != len(here):
            theirs = []
        for n, rule in enumerate(here):
            if theirs and is_translated(rule):
                chains[chain].rules.append(theirs[n])
            else:
                chains[chain].rules += reader.rules(rule)
    return chains


def tables_to_translate(objects: Iterable[Mapping[str, Json]], family: int) -> list[str]:
    """The tables of nftables that only iptables can show, in part at least."""
    rules = [each["rule"] for each in objects if "rule" in each]
    of = NFPROTO[family][1]
    names = {rule["table"] for rule in rules if rule["family"] == of and is_translated(rule)}
    return [table for table in _TABLES if table in names]


class _CannotLook(Exception):
    """What the firewall does cannot be seen."""


def look(commands: ICommands, families: Iterable[int], port: int) -> Deferred[str | None]:
    """Why visitors would not reach C{port} by a redirect. Changes nothing.

    @param families: 4, 6 or both.
    @return: a Deferred of the reason, on one line, or of L{None}. That it cannot be seen is a
        reason too.
    """

    def ask(firewall: Firewall, family: int, interface: str) -> str | None:
        verdict = drops(firewall, Visit(family, port, interface))
        if isinstance(verdict, Caught):
            return (
                f"visitors by IPv{family} would be redirected to port {port}, where the firewall"
                f" drops them: {verdict.by}"
            )
        verdict = exempts_from_tracking(firewall, Visit(family, HTTPS, interface))
        if isinstance(verdict, Caught):
            return (
                f"visitors by IPv{family} are exempt from connection tracking, so that no redirect"
                f" reaches them: {verdict.by}"
            )
        return None

    return _look(commands, families, ask)


def look_whether_sent_elsewhere(
    commands: ICommands, families: Iterable[int]
) -> Deferred[str | None]:
    """Why the port that visitors dial is not one of this host's own; otherwise as L{look}."""

    def ask(firewall: Firewall, family: int, interface: str) -> str | None:
        verdict = sends_elsewhere(firewall, Visit(family, HTTPS, interface))
        if isinstance(verdict, Caught):
            return f"visitors by IPv{family} are sent elsewhere: {verdict.by}"
        return None

    return _look(commands, families, ask)


@inlineCallbacks
def _look(
    commands: ICommands,
    families: Iterable[int],
    ask: Callable[[Firewall, int, str], str | None],
) -> Generator[Deferred[Any], Any, str | None]:
    try:
        nftables = yield _read_nftables(commands)
        for family in families:
            firewall = yield _read(commands, family, nftables)
            for interface in sorted(facts.visitor_interfaces(family)) or [""]:
                reason = ask(firewall, family, interface)
                if reason is not None:
                    return reason
    except _CannotLook as problem:
        return str(problem)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
        return f"the rules that nft shows are not understood ({problem!r})"
    return None


@inlineCallbacks
def _read_nftables(
    commands: ICommands,
) -> Generator[Deferred[Any], Any, list[Mapping[str, Json]] | None]:
    """What C{nft} shows, of all families; L{None} if there is no such program."""
    shown: Result = yield commands.run(["nft", "-j", "list", "ruleset"])
    if shown.code == NOT_FOUND:
        return None
    if shown.code != 0:
        raise _CannotLook(_failure(shown))
    return json.loads(shown.output)["nftables"] if shown.output.strip() else []


@inlineCallbacks
def _read(
    commands: ICommands, family: int, nftables: list[Mapping[str, Json]] | None
) -> Generator[Deferred[Any], Any, Firewall]:
    legacy = yield _listings(commands, family, "legacy", facts.legacy_tables(family))
    if nftables is None:
        version: Result = yield commands.run([BINARIES[family], "-V"])
        if version.code not in (0, NOT_FOUND):
            raise _CannotLook(_failure(version))
        tables = list(_TABLES) if "nf_tables" in version.output else []
        listings = yield _listings(commands, family, "nft", tables)
        return Firewall(iptables=[*listings, *legacy])
    tables = tables_to_translate(nftables, family)
    return Firewall(nftables, dict((yield _listings(commands, family, "nft", tables))), legacy)


@inlineCallbacks
def _listings(
    commands: ICommands, family: int, variant: str, tables: Iterable[str]
) -> Generator[Deferred[Any], Any, list[tuple[str, str]]]:
    """What a variant of iptables, C{nft} or C{legacy}, prints of each of C{tables} that exist."""
    found = []
    for table in tables:
        argv = command(family, table, "-S", variant=f"-{variant}")
        result: Result = yield commands.run(argv)
        if result.code == NOT_FOUND:
            result = yield commands.run(command(family, table, "-S"))
        if "incompatible" in result.output:  # has rules of nft's own: what nft shows must do
            continue
        if result.code not in (0, NOT_FOUND, _NO_SUCH_TABLE):
            raise _CannotLook(_failure(result))
        if variant == "legacy" and "legacy tables present" in result.output:
            raise _CannotLook(
                f"the {table} table of {argv[0]} cannot be seen: {argv[0]} is missing"
            )
        if result.code == 0:
            found.append((table, result.output))
    return found


def _failure(result: Result) -> str:
    return f"what the firewall does cannot be seen: {result.failure}"
