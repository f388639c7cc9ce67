"""Whether the firewall treats interfaces differently.

If it does, it may reject a probe from an interface made for the probe, and still accept visitors.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Final

from twisted.internet.defer import Deferred, inlineCallbacks

from ..interfaces import ICommands, Result
from .reading import CannotLook, read_nftables
from .xtables import command, listed

_TABLES: Final = ("raw", "mangle", "filter")
"""Tables that may reject packets. nat does not count: container engines name interfaces there."""

_HOOKS: Final = ("PREROUTING", "INPUT")

_Rule = tuple[bool, set[str]]
"""A rule: whether it matches on an interface, and the chains that it leads to."""


@inlineCallbacks
def names_interfaces(commands: ICommands, family: int) -> Generator[Deferred[Any], Any, bool]:
    """Whether a rule that a new visitor's packet may reach names an interface other than C{lo}.

    If the rules cannot be read, the answer is no: the probe itself has reported why.

    @param family: 4 or 6.
    """
    for table in _TABLES:
        shown: Result = yield commands.run(command(family, table, "-S"))
        if _reached(_iptables_rules(shown.output), _HOOKS):
            return True
    try:
        objects, _ = yield read_nftables(commands)
    except CannotLook:
        return False
    return _reached(_nft_rules(objects), _nft_hooks(objects))


def _reached(rules: Mapping[str, list[_Rule]], begin: Iterable[str]) -> bool:
    """Whether these chains lead to a rule that names an interface."""
    to_do, done = list(begin), set()
    while to_do:
        chain = to_do.pop()
        if chain in done:
            continue
        done.add(chain)
        for names, targets in rules.get(chain, ()):
            if names:
                return True
            to_do += targets
    return False


def _iptables_rules(output: str) -> dict[str, list[_Rule]]:
    rules: dict[str, list[_Rule]] = {}
    for operation, chain, *words in listed(output):
        if operation == "-A":
            pairs = list(pairwise(words))
            names = any(flag == "-i" and name != "lo" for flag, name in pairs)
            targets = {target for flag, target in pairs if flag in ("-j", "-g")}
            rules.setdefault(chain, []).append((names, targets))
    return rules


def _nft_hooks(objects: list[Any]) -> list[str]:
    hooks = [name.lower() for name in _HOOKS]
    chains = [each["chain"] for each in objects if "chain" in each]
    return [
        _chain(each, each["name"])
        for each in chains
        if each.get("hook") in hooks and each.get("type") != "nat"
    ]


def _nft_rules(objects: list[Any]) -> dict[str, list[_Rule]]:
    rules: dict[str, list[_Rule]] = {}
    for each in objects:
        if "rule" in each:
            rule = each["rule"]
            parts = list(_parts(rule["expr"]))
            targets = {_chain(rule, part["target"]) for part in parts if "target" in part}
            at = _chain(rule, rule["chain"])
            rules.setdefault(at, []).append((_names_interface(parts), targets))
    return rules


def _names_interface(parts: list[dict[str, Any]]) -> bool:
    named = [part for part in parts if str(part.get("key", "")).startswith("iif")]
    loopback = [part for part in parts if part.get("right") in ("lo", "loopback")]
    return len(named) > len(loopback)


def _chain(within: dict[str, Any], name: str) -> str:
    return f"{within['family']} {within['table']} {name}"


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in this JSON value, at any depth."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _parts(each)
