"""The rules of one table as C{iptables -S} prints them: iptables(8), iptables-extensions(8)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final

from ..addresses import HTTPS
from .packets import LAST_PORT, Answer, Packet, any_of
from .rules import Action, Chain, Condition, Rule, Test, of_destination, of_family, of_source
from .xtables import BINARIES, listed

OWN_ID: Final = ("0", "root")
"""The user and the group that own the daemon's sockets."""


def _always(answer: Answer) -> Test:
    return lambda packet: answer


def _ranges(text: str) -> list[tuple[int, int]]:
    """Parse C{22,80,1000:2000}; raises L{ValueError} for anything that is not a number."""
    found = []
    for part in text.split(","):
        low, colon, high = part.partition(":")
        found.append((int(low or 0), int(high or LAST_PORT if colon else low)))
    return found


def _end_ports(*ends: str) -> Callable[[str], Test]:
    def test_of(text: str) -> Test:
        ranges = [(end, low, high) for end in ends for low, high in _ranges(text)]
        return lambda packet: any_of(packet.port_within(*each) for each in ranges)

    return test_of


def _original_port(text: str) -> Test:
    return _always(any(low <= HTTPS <= high for low, high in _ranges(text)))


def _reply_port(text: str) -> Test:
    ranges = _ranges(text)
    return lambda packet: any(low <= packet.port <= high for low, high in ranges)


def _number(text: str, low: int, high: int) -> Answer:
    """Whether a number is C{text}, if it lies between C{low} and C{high} in ordinary packets."""
    first, colon, last = text.partition(":")
    try:
        least, most = int(first or 0), int(last or LAST_PORT if colon else first)
    except ValueError:
        return text
    return between(least, most, low, high, text)


def between(least: int, most: int, low: int, high: int, text: str) -> Answer:
    if least <= low and high <= most:
        return True
    return False if most < low or high < least else text


TTL: Final = (16, 255)
LENGTH_OF_FIRST: Final = (40, 128)
LENGTH: Final = (40, LAST_PORT)
SEGMENT_SIZE: Final = (536, 9_176)
"""The values in ordinary visitors' packets."""


def _original_address(text: str) -> Test:
    return lambda packet: packet.has_address(packet.dialled, "original", text)


def _reply_address(text: str) -> Test:
    return lambda packet: packet.has_address(packet.local, "reply", text)


def _end_address(end: str) -> Callable[[str], Test]:
    return lambda text: lambda packet: packet.address_within(end, text)


def _end_type(end: str) -> Callable[[str], Test]:
    return lambda names: (
        lambda packet: any_of(packet.address_type(end, name) for name in names.split(","))
    )


def _interface(inward: bool) -> Callable[[str], Test]:
    return lambda pattern: lambda packet: packet.by_interface(pattern, inward=inward)


def _state(names: str) -> Test:
    return lambda packet: packet.state(names.split(","))


def _flags(mask: str, wanted: str) -> Test:
    return lambda packet: packet.flags(mask.split(","), wanted.split(","))


def _ttl(text: str) -> Test:
    return _always(_number(text, *TTL))


def _ttl_below(text: str) -> Test:
    return _always(_number(f":{int(text) - 1}", *TTL))


def _ttl_above(text: str) -> Test:
    return _always(_number(f"{int(text) + 1}:", *TTL))


def _length(text: str) -> Test:
    return lambda packet: _number(text, *(LENGTH_OF_FIRST if packet.first else LENGTH))


def _segment_size(text: str) -> Test:
    return lambda packet: packet.first and _number(text, *SEGMENT_SIZE)


def _owner(text: str) -> Test:
    return lambda packet: text in OWN_ID if packet.owner == "proxy" else f"owner {text}"


def _in_set(name: str, directions: str) -> Test:
    """A test for a set of ipset(8) whose content is unknown."""

    def test(packet: Packet) -> Answer:
        text = f"set {name} {directions}"
        ends = {"src": "source", "dst": "destination"}
        own = any(packet.is_local(ends[each]) for each in directions.split(",") if each in ends)
        return f"{text} {packet.local} {packet.port}" if own else text

    return test


def _peculiar(text: str) -> Test:
    """A test for a condition that is not understood: it may depend on anything in the packet."""
    return lambda packet: f"{text} {packet.peculiar}"


_FLAGS: Final[Mapping[str, Callable[..., Test]]] = {
    "-p": lambda name: lambda packet: packet.protocol(name),
    "-s": _end_address("source"),
    "-d": _end_address("destination"),
    "-i": _interface(inward=True),
    "-o": _interface(inward=False),
    "-f": lambda: _always(False),
    "--dport": _end_ports("destination"),
    "--dports": _end_ports("destination"),
    "--sport": _end_ports("source"),
    "--sports": _end_ports("source"),
    "--ports": _end_ports("source", "destination"),
    "--tcp-flags": _flags,
    "--syn": lambda: _flags("FIN,SYN,RST,ACK", "SYN"),
    "--tcp-option": lambda number: _always(f"tcp option {number}"),
    "--ctstate": _state,
    "--state": _state,
    "--ctdir": lambda name: lambda packet: (name == "REPLY") is packet.reply,
    "--ctproto": lambda name: lambda packet: packet.protocol(name),
    "--ctorigdst": _original_address,
    "--ctorigdstport": _original_port,
    "--ctreplsrc": _reply_address,
    "--ctreplsrcport": _reply_port,
    "--dst-type": _end_type("destination"),
    "--src-type": _end_type("source"),
    "--limit-iface-in": lambda: lambda packet: f"on its interface {packet.local}",
    "--limit-iface-out": lambda: lambda packet: f"on its interface {packet.local}",
    "--pkt-type": lambda name: _always(name == "unicast"),
    "--match-set": _in_set,
    "--src-range": _end_address("source"),
    "--dst-range": _end_address("destination"),
    "--string": lambda text: lambda packet: not packet.first and f"string {text}",
    "--hex-string": lambda text: lambda packet: not packet.first and f"string {text}",
    "--rt-type": lambda number: _always(False),  # ordinary clients send no routing header
    "--ttl-eq": _ttl,
    "--ttl-lt": _ttl_below,
    "--ttl-gt": _ttl_above,
    "--hl-eq": _ttl,
    "--hl-lt": _ttl_below,
    "--hl-gt": _ttl_above,
    "--length": _length,
    "--mss": _segment_size,
    "--uid-owner": _owner,
    "--gid-owner": _owner,
    "--cgroup": _owner,
    "--path": lambda text: lambda packet: f"cgroup {text} {packet.owner}",
    "--transparent": lambda: lambda packet: f"transparent socket {packet.owner}",
    "--nowildcard": lambda: lambda packet: f"wildcard socket {packet.owner}",
}
"""Flags of conditions, with the test of a packet for each."""

_READS: Final = {
    "-p": of_family,
    "-s": of_source,
    "--src-range": of_source,
    "-d": of_destination,
    "--dst-range": of_destination,
}

_PLAIN: Final = (
    *("addrtype", "cgroup", "comment", "conntrack", "hl", "iprange", "length", "mark", "multiport"),
    *("owner", "pkttype", "rt", "set", "state", "string", "tcp", "tcpmss", "ttl", "udp", "icmp"),
    *("icmp6", "connmark"),
)
"""Modules whose conditions are all among the flags above, or give all packets the same result."""

_SHARED: Final[Mapping[str, bool | None]] = {
    **dict.fromkeys(("limit", "hashlimit", "connlimit"), True),
    **dict.fromkeys(("time", "statistic", "cpu", "quota", "quota2", "condition", "fuzzy")),
    **dict.fromkeys(("recent", "geoip", "asn", "mac", "physdev", "rpfilter", "realm"), False),
    **dict.fromkeys(("policy", "connbytes", "connlabel", "helper", "nfacct", "rateest"), False),
    **dict.fromkeys(("cluster", "devgroup", "dscp", "tos", "ecn", "ipp2p", "layer7"), False),
    **dict.fromkeys(("ipv6header", "frag", "dst", "hbh", "eui64", "account", "iface"), False),
}
"""Modules whose conditions depend on nothing that a redirect changes, with the usual result for an
ordinary visitor."""

_GO_ON: Final = (
    *("AUDIT", "CHECKSUM", "CLASSIFY", "CONNSECMARK", "CT", "DSCP", "HL", "LOG", "NFLOG"),
    *("RATEEST", "SECMARK", "SET", "TCPMSS", "TOS", "TRACE", "TTL", "ULOG", "TEE", "ECN"),
    *("TCPOPTSTRIP", "IDLETIMER", "LED", "ACCOUNT"),
)
"""Targets after which the kernel goes on with the next rule."""

_ANYTHING_FOLLOWS: Final = ("--comment", "--string", "--hex-string")


def _conditions(words: Sequence[str]) -> list[Condition]:
    found: list[Condition] = []
    module = ""
    shared: list[str] = []
    for negated, flag, values in [*_flags_of(words), (False, "-m", [""])]:
        if flag == "-m":
            if shared:
                found.append(_shared(shared))
            module, shared = values[0], []
            if module in _SHARED:
                shared = [module]
            elif module == "socket":
                found.append(Condition(lambda packet: f"socket {packet.owner}", usual=None))
            elif module and module not in _PLAIN:
                found.append(Condition(_peculiar(f"module {module}"), usual=None))
        elif module in _SHARED and flag not in _FLAGS:
            shared += ["!"] * negated + [flag, *values]
        elif flag != "--comment":
            found.append(_condition(module, negated, flag, values))
    return found


def _flags_of(words: Sequence[str]) -> Iterator[tuple[bool, str, list[str]]]:
    """For each flag: whether it is negated, its name, and its values."""
    at = 0
    while at < len(words):
        negated = words[at] == "!"
        at += negated
        end = at + 1
        while end < len(words) and not words[end].startswith("-") and words[end] != "!":
            end += 1
        if words[at] in _ANYTHING_FOLLOWS:
            end = at + 2
        yield negated, words[at], list(words[at + 1 : end])
        at = end


def _shared(words: Sequence[str]) -> Condition:
    above = any(word.endswith("-above") for word in words)
    return Condition(_always(" ".join(words)), usual=False if above else _SHARED[words[0]])


def _condition(module: str, negated: bool, flag: str, values: Sequence[str]) -> Condition:
    text = " ".join([module, flag, *values])
    if flag == "--mark":
        unmarked = re.match("0x0+(/|$)|0(/|$)", values[0])
        return Condition(lambda packet: packet.mark(text), negated, None if unmarked else False)
    try:
        return Condition(_FLAGS[flag](*values), negated, reads=_READS.get(flag))
    except (KeyError, TypeError, ValueError):
        understood = module in _PLAIN and flag not in _FLAGS
        return Condition(_always(text) if understood else _peculiar(text), negated, None)


def target_of(words: Sequence[str], chains: Iterable[str]) -> tuple[Action, str]:
    """@param words: the words from C{-j} or C{-g} on."""
    if not words:
        return Action.CONTINUE, ""
    flag, name, *options = words
    if name in chains:
        return (Action.GOTO if flag == "-g" else Action.JUMP), name
    if name in ("ACCEPT", "RETURN"):
        return Action[name], ""
    if name == "NOTRACK" or (name == "CT" and "--notrack" in options):
        return Action.NOTRACK, ""
    if name in ("MARK", "CONNMARK"):
        return Action.MARK, ""
    if name in ("DNAT", "NETMAP", "REDIRECT", "TPROXY"):
        to = [word for flag, word in pairwise(options) if flag.startswith("--to-")]
        return Action.TRANSLATE, to[0].rpartition(":")[2] if to else ""
    if name in ("SNAT", "MASQUERADE"):
        return Action.ACCEPT, ""
    if name == "NFQUEUE":
        return Action.QUEUE, ""
    return (Action.CONTINUE if name in _GO_ON else Action.DROP), ""


def iptables_chains(table: str, listing: str, family: int) -> dict[str, Chain]:
    """The chains of one table, by name.

    @param listing: the output of C{iptables -S} for the table.
    """
    binary = BINARIES[family]
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
            chains[name].rules.append(Rule(text, _conditions(rest[:at]), action, target))
    return chains
