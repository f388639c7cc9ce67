"""The rules of one table as C{iptables -S} prints them: iptables(8), iptables-extensions(8)."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from .verdicts import LAST_PORT, Action, Certainty, Chain, Rule, Visit
from .xtables import BINARIES, listed


def _ports(text: str, match: Callable[[int, int], Certainty]) -> Certainty:
    """C{22}, C{1000:2000}, C{22,80,1000:2000}."""
    found = Certainty.NONE
    for part in text.split(","):
        low, colon, high = part.partition(":")
        try:
            found = max(found, match(int(low or 0), int(high or LAST_PORT if colon else low)))
        except ValueError:
            return Certainty.UNKNOWN
    return found


def _set_match(visit: Visit, name: str, directions: str) -> Certainty:
    return Certainty.SOME if set(directions.split(",")) == {"src"} else Certainty.UNKNOWN


_CONDITIONS: Final[Mapping[str, Callable[..., Certainty]]] = {
    "-p": Visit.protocol,
    "-s": Visit.comes_from,
    "-d": Visit.goes_to,
    "-i": Visit.comes_in_by,
    "-f": lambda visit: Certainty.NONE,
    "--dport": lambda visit, text: _ports(text, visit.to_port),
    "--dports": lambda visit, text: _ports(text, visit.to_port),
    "--sport": lambda visit, text: _ports(text, visit.from_port),
    "--sports": lambda visit, text: _ports(text, visit.from_port),
    "--tcp-flags": lambda visit, mask, wanted: visit.flags(mask.split(","), wanted.split(",")),
    "--ctstate": lambda visit, names: visit.state(names.split(",")),
    "--state": lambda visit, names: visit.state(names.split(",")),
    "--dst-type": Visit.destination_type,
    "--src-type": Visit.source_type,
    "--pkt-type": Visit.packet_type,
    "--mark": Visit.mark,
    "--match-set": _set_match,
    "--src-range": lambda visit, text: Certainty.SOME,
    "--mac-source": lambda visit, text: Certainty.SOME,
    "--source-country": lambda visit, text: Certainty.SOME,
    "--limit": lambda visit, text: Certainty.RATED,
    "--hashlimit-upto": lambda visit, text: Certainty.RATED,
    "--hashlimit-above": lambda visit, text: Certainty.SOME,
    "--connlimit-upto": lambda visit, text: Certainty.RATED,
    "--connlimit-above": lambda visit, text: Certainty.SOME,
    "--rcheck": lambda visit: Certainty.SOME,
    "--update": lambda visit: Certainty.SOME,
    "--string": lambda visit, text: Certainty.NONE,  # a SYN carries none
    "--hex-string": lambda visit, text: Certainty.NONE,
    "--rt-type": lambda visit, text: Certainty.NONE,  # nor a routing header
}

_NO_CONDITIONS: Final = (
    *("-m", "--comment", "--limit-burst", "--set", "--seconds", "--hitcount", "--name", "--mask"),
    *("--rsource", "--rttl", "--reap", "--connlimit-mask", "--connlimit-saddr"),
    *("--hashlimit-burst", "--hashlimit-mode", "--hashlimit-name", "--hashlimit-srcmask"),
    *("--hashlimit-htable-expire", "--hashlimit-htable-size", "--hashlimit-htable-max"),
    *("--hashlimit-htable-gcinterval", "--algo", "--to"),
)
"""What only goes with conditions; C{--invert} of rpfilter and all others are not understood."""

_GO_ON: Final = (
    *("AUDIT", "CHECKSUM", "CLASSIFY", "CONNMARK", "CONNSECMARK", "CT", "DSCP", "HL", "LOG"),
    *("MARK", "NFLOG", "RATEEST", "SECMARK", "SET", "TCPMSS", "TOS", "TRACE", "TTL", "ULOG"),
)
"""Targets behind which the next rule is consulted."""


def _condition(visit: Visit, flag: str, words: Sequence[str]) -> Certainty:
    if flag in _NO_CONDITIONS:
        return Certainty.ALL
    try:
        return _CONDITIONS[flag](visit, *words)
    except (KeyError, TypeError):  # not understood
        return Certainty.UNKNOWN


def _conditions(visit: Visit, words: Sequence[str]) -> Certainty:
    certainty = Certainty.ALL
    at = 0
    while at < len(words):
        negated = words[at] == "!"
        at += negated
        end = at + 1
        while end < len(words) and not words[end].startswith("-") and words[end] != "!":
            end += 1
        if words[at] in ("--comment", "--string", "--hex-string"):  # any word may follow
            end = at + 2
        this = _condition(visit, words[at], words[at + 1 : end])
        certainty = min(certainty, this.negated if negated else this)
        at = end
    return certainty


def target_of(words: Sequence[str], chains: Iterable[str]) -> tuple[Action, str]:
    """@param words: from C{-j} or C{-g} on."""
    if not words:
        return Action.CONTINUE, ""
    flag, name, *options = words
    if name in chains:
        return (Action.GOTO if flag == "-g" else Action.JUMP), name
    if name in ("ACCEPT", "RETURN"):
        return Action[name], ""
    if name == "NOTRACK" or (name == "CT" and "--notrack" in options):
        return Action.NOTRACK, ""
    if name in ("DNAT", "NETMAP", "REDIRECT", "TPROXY"):
        return Action.TRANSLATE, ""
    return (Action.CONTINUE if name in _GO_ON else Action.DROP), ""


def iptables_chains(table: str, listing: str, visit: Visit) -> dict[str, Chain]:
    """The chains of one table, by name.

    @param listing: what C{iptables -S} printed of it.
    """
    binary = BINARIES[visit.family]
    commands = listed(listing)
    chains: dict[str, Chain] = {words[1]: Chain() for words in commands}
    for words in commands:
        command, name, *rest = words
        text = " ".join(shlex.join([binary, "-t", table, *words]).split())  # one line
        if command == "-P":
            policy = Action.ACCEPT if rest[:1] == ["ACCEPT"] else Action.DROP
            chains[name].policy, chains[name].policy_text = policy, text
        elif command == "-A":
            at = next((n for n, word in enumerate(rest) if word in ("-j", "-g")), len(rest))
            action, target = target_of(rest[at:], chains)
            chains[name].rules.append(Rule(text, _conditions(visit, rest[:at]), action, target))
    return chains
