"""Reads a host's firewall without changing it.

If one program cannot show a part, the next one is asked. If none can show it, it is still known
that the part exists.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from twisted.internet.defer import Deferred, inlineCallbacks

from ..host import facts
from ..interfaces import NOT_FOUND, ICommands, Result
from . import nfchains
from .iptablesrules import iptables_chains
from .largetables import need_no_listing
from .nfchains import BaseChain
from .nftrules import NFPROTO, OWN_TABLE, Json, Sets, Table, is_translated, only
from .rules import Action, Base, Chain, Condition, Rule, bundled
from .xtables import command

_TABLES: Final = {
    "raw": (-300, ("PREROUTING", "OUTPUT")),
    "mangle": (-150, ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")),
    "nat": (-100, ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")),
    "filter": (0, ("INPUT", "OUTPUT")),
    "security": (50, ("INPUT", "OUTPUT")),
}
"""The tables of iptables, their priorities and hooks (<linux/netfilter_ipv4.h>)."""

_NO_SUCH_TABLE: Final = 3
"""Exit status of iptables if the kernel has no such table."""

_TERSE: Final = ("nft", "-j", "-t", "list")
"""Lists without the contents of named sets, which may have a million elements."""


ASSUMED: Final = "this is assumed, because "
"""Begins the text of a rule in a chain that cannot be read."""


class CannotLook(Exception):
    """The rules of the firewall cannot be read.

    @ivar remedy: what to do.
    """

    def __init__(
        self, text: str, remedy: str = "run that command as root, and correct what it reports"
    ) -> None:
        super().__init__(text)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Firewall:
    """The contents of a host's firewall, for one family.

    @ivar nftables: the objects of C{nft -j list ruleset}.
    @ivar unreadable: base chains whose rules no program can show, each with the reason.
    @ivar translated: by table: the output of C{iptables -S}, for tables that the nftables variant
        of iptables has made and that nft does not show completely.
    @ivar iptables: the same for tables that nft does not show: those of the legacy iptables and,
        without nft, all. Triples of table, listing and whether it is a legacy table.
    """

    nftables: Sequence[Mapping[str, Json]] = ()
    unreadable: Sequence[tuple[BaseChain, str]] = ()
    translated: Mapping[str, str] = field(default_factory=dict)
    iptables: Sequence[tuple[str, str, bool]] = ()


@dataclass(slots=True)
class Ruleset:
    """The base chains of a firewall, for one family.

    @ivar sets: the sets of each table, by C{FAMILY NAME}.
    """

    bases: list[Base]
    sets: dict[str, Sets] = field(default_factory=dict)

    def wanted(self) -> list[tuple[str, str]]:
        """The table and the name of each set whose contents are needed."""
        return [(table, name) for table, sets in self.sets.items() for name in sorted(sets.wanted)]


def ruleset(
    firewall: Firewall,
    family: int,
    contents: Mapping[tuple[str, str], Sequence[Json]] | None = None,
) -> Ruleset:
    """
    @param contents: of sets that C{firewall} does not have, by table and name.
    """
    found = Ruleset([])
    for table, listing, legacy in firewall.iptables:
        chains = iptables_chains(table, listing, family)
        name = f"{'legacy' if legacy else NFPROTO[family][1]} {table}"
        for each in _iptables_chains(name, table):
            if each.name in chains:
                base = Base(chains, each.name, each.hook, each.priority, each.kind, name)
                found.bases.append(base)
    _add_nftables(found, firewall, family, contents or {})
    for base in found.bases:
        for chain in base.chains.values():
            chain.rules = bundled(chain.rules)
    for hidden, reason in firewall.unreadable:
        own = (hidden.family, hidden.table) == ("inet", OWN_TABLE)
        if hidden.family in ("inet", NFPROTO[family][1]) and not own:
            found.bases.append(_unreadable(hidden, reason))
    return found


def _iptables_chains(of: str, table: str) -> list[BaseChain]:
    """The base chains that a table of iptables may have."""
    priority, hooks = _TABLES[table]
    return [
        BaseChain(
            of,
            table,
            hook,
            "nat" if table == "nat" else "filter",
            hook.lower(),
            -priority if table == "nat" and hook in ("INPUT", "POSTROUTING") else priority,
        )
        for hook in hooks
    ]


def _unreadable(chain: BaseChain, reason: str) -> Base:
    """A chain that may do anything with the values that a redirect changes."""
    table = f"{chain.family} {chain.table}"
    text = f"{ASSUMED}the rules of the chain '{table} {chain.name}' cannot be read: {reason}"
    anything = Condition(lambda packet: f"{text} {packet.peculiar}", usual=None)
    actions = (Action.NOTRACK, Action.TRANSLATE if chain.kind == "nat" else Action.DROP)
    chains = {chain.name: Chain(rules=[Rule(text, (anything,), each) for each in actions])}
    return Base(chains, chain.name, chain.hook, chain.priority, chain.kind, table)


def _add_nftables(
    to: Ruleset,
    firewall: Firewall,
    family: int,
    contents: Mapping[tuple[str, str], Sequence[Json]],
) -> None:
    of_tables: dict[str, list[tuple[str, Mapping[str, Json]]]] = {}
    for kind, each in map(only, firewall.nftables):
        name = each["name"] if kind == "table" else each["table"]
        of_tables.setdefault(f"{each['family']} {name}", []).append((kind, each))
    for name, objects in of_tables.items():
        of, _, table = name.partition(" ")
        if of not in ("inet", NFPROTO[family][1]) or (of, table) == ("inet", OWN_TABLE):
            continue
        known = {
            each["name"]: contents.get((name, each["name"]), each.get("elem"))
            for kind, each in objects
            if kind in ("set", "map")
        }
        to.sets[name] = Sets(known)
        listing = "" if of == "inet" else firewall.translated.get(table, "")
        chains = _chains(name, objects, to.sets[name], iptables_chains(table, listing, family))
        age = next((each.get("handle") for kind, each in objects if kind == "table"), None)
        to.bases += [
            Base(chains, each["name"], each["hook"], each.get("prio", 0), each["type"], name, age)
            for kind, each in objects
            if kind == "chain" and "hook" in each
        ]


def _chains(
    name: str,
    objects: Sequence[tuple[str, Mapping[str, Json]]],
    sets: Sets,
    translated: Mapping[str, Chain],
) -> dict[str, Chain]:
    reader = Table(name, sets)
    chains = {}
    rules: dict[str, list[Mapping[str, Json]]] = {}
    for kind, each in objects:
        if kind == "chain":
            policy = Action(each.get("policy", "accept"))
            text = f"the policy '{policy.value}' of the nftables chain '{name} {each['name']}'"
            chains[each["name"]] = Chain(policy, text)
        elif kind == "rule":
            rules.setdefault(each["chain"], []).append(each)
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


Nftables: TypeAlias = tuple[Sequence[Mapping[str, Json]], Sequence[tuple[BaseChain, str]]]
"""The objects that C{nft} shows, of all families, and the base chains of the tables that it does
not show, each with the reason."""


@inlineCallbacks
def read_nftables(commands: ICommands) -> Generator[Deferred[Any], Any, Nftables]:
    """Fails with L{CannotLook}."""
    try:
        chains, problem = nfchains.base_chains(), None
        unlisted = need_no_listing(chains)
    except OSError as refusal:
        chains, unlisted, problem = [], set(), refusal
    shown = Result.not_found(["nft"])
    if not unlisted:
        shown = yield commands.run([*_TERSE, "ruleset"])
        if shown.code not in (0, NOT_FOUND):
            older: Result = yield commands.run(["nft", "-j", "list", "ruleset"])  # knows no -t
            shown = older if older.code == 0 else shown
        whole = _objects(shown)
        if whole is not None:
            return whole, []
        if problem is not None:
            if shown.code == NOT_FOUND:  # perhaps it may not run nft: reported where nft is needed
                return [], []
            raise CannotLook(f"cannot read the firewall rules: {shown.failure}")
    objects: list[Mapping[str, Json]] = []
    unreadable = []
    for table in dict.fromkeys((each.family, each.table) for each in chains):
        if table in unlisted:
            continue
        if unlisted or shown.code != NOT_FOUND:
            shown = yield commands.run([*_TERSE, "table", *table])
        here = _objects(shown)
        if here is None:
            reason = shown.failure if shown.code else f"'{shlex.join(shown.argv)}' prints no JSON"
            of = [each for each in chains if (each.family, each.table) == table]
            unreadable += [(each, reason) for each in of]
        objects += here or ()
    return objects, unreadable


def _objects(shown: Result) -> list[Mapping[str, Json]] | None:
    """The objects; L{None}: the output cannot be parsed."""
    if shown.code != 0:
        return None
    if not shown.output.strip():
        return []
    try:
        objects = json.loads(shown.output, strict=False)["nftables"]
        return [each for each in objects if _is_whole(*only(each))]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _is_whole(kind: str, content: Json) -> bool:
    """Whether the object has all members that are used below; raises L{KeyError} if not."""
    if kind == "table":
        content["family"], content["name"]
    elif kind == "chain":
        content["family"], content["table"], content["name"]
    elif kind == "rule":
        content["family"], content["table"], content["chain"]
    elif kind in ("set", "map"):
        content["family"], content["table"], content["name"]
    else:
        return False
    return True


@inlineCallbacks
def read_contents(
    commands: ICommands, wanted: Iterable[tuple[str, str]]
) -> Generator[Deferred[Any], Any, dict[tuple[str, str], Sequence[Json]]]:
    """The contents of those sets and maps that can be read, by table and name."""
    found: dict[tuple[str, str], Sequence[Json]] = {}
    for table, name in wanted:
        for kind in ("set", "map"):
            shown: Result = yield commands.run(
                ["nft", "-j", "list", kind, *table.split(" ", 1), name]
            )
            objects = _objects(shown)
            if objects:
                _, content = only(objects[-1])
                found[table, name] = content.get("elem", [])
                break
    return found


@inlineCallbacks
def read(
    commands: ICommands, family: int, nftables: Nftables
) -> Generator[Deferred[Any], Any, Firewall]:
    """Read the firewall for one family."""
    objects, unreadable = nftables
    translated: dict[str, str] = {}
    of = NFPROTO[family][1]
    iptables = []
    for table in facts.legacy_tables(family):
        result = yield _listing(commands, family, table, "legacy")
        if result.code == 0 and "legacy tables present" not in result.one_line:
            iptables.append((table, result.output, True))
        elif result.code != _NO_SUCH_TABLE:
            reason = f"{result.argv[0]}-legacy is missing" if result.code == 0 else result.failure
            chains = _iptables_chains(of, table)
            legacy = [replace(each, table=f"{table} (legacy)") for each in chains]
            unreadable = [*unreadable, *((each, reason) for each in legacy)]
    hidden = {each.table for each, _ in unreadable if each.family == of}
    to_translate = tables_to_translate(objects, family)
    for table in _TABLES:
        if table in hidden or table in to_translate:
            result = yield _listing(commands, family, table, "nft")
            if result.code == 0 and "incompatible" not in result.one_line:
                translated[table] = result.output
    iptables += [(each, listing, False) for each, listing in translated.items() if each in hidden]
    unreadable = [
        (each, reason)
        for each, reason in unreadable
        if each.family != of or each.table not in translated
    ]
    return Firewall(objects, unreadable, translated, iptables)


def _listing(commands: ICommands, family: int, table: str, variant: str) -> Deferred[Result]:
    """The listing of a table by one variant of iptables, C{nft} or C{legacy}."""

    def or_by_the_other_name(result: Result) -> Result | Deferred[Result]:
        if result.code != NOT_FOUND:
            return result
        return commands.run(command(family, table, "-S"))

    shown = commands.run(command(family, table, "-S", variant=f"-{variant}"))
    return shown.addCallback(or_by_the_other_name)


def tables_to_translate(objects: Iterable[Mapping[str, Json]], family: int) -> list[str]:
    """The tables of nftables that only iptables can show completely."""
    rules = [each["rule"] for each in objects if "rule" in each]
    of = NFPROTO[family][1]
    names = {rule["table"] for rule in rules if rule["family"] == of and is_translated(rule)}
    return [table for table in _TABLES if table in names]
