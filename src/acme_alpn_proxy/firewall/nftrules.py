"""The rules of one table as C{nft -j list ruleset} prints them: libnftables-json(5)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from ..addresses import HTTPS
from .iptablesrules import (
    LENGTH,
    LENGTH_OF_FIRST,
    OWN_ID,
    SEGMENT_SIZE,
    TTL,
    between,
    target_of,
)
from .packets import LAST_PORT, Answer, Packet, all_of, any_of
from .rules import Action, Condition, Reads, Rule, Test, of_destination, of_family, of_source

Json: TypeAlias = Any

OWN_TABLE: Final = "acme_alpn_proxy"
"""The table, of the family inet, that this program makes for C{--redirect nftables}. (nft 1.0.6
prints invalid JSON if a table with an owner has a name of more than 23 characters.)"""

NFPROTO: Final = {4: ("ipv4", "ip", "2"), 6: ("ipv6", "ip6", "10")}

_IGNORED: Final = (
    *("counter", "log", "comment", "last", "flow", "tproxy", "fwd", "dup", "ct helper"),
    *("ct timeout", "ct expectation", "secmark", "synproxy"),
)
"""Statements that neither match a visitor's packet nor decide about it."""

_RATES: Final = ("limit", "quota", "ct count")

_SHARED_KINDS: Final = (
    *("exthdr", "rt", "tcp option", "ip option", "sctp chunk", "dccp option", "ipsec", "numgen"),
    *("symhash", "osf"),
)
_CHANGED_META: Final = ("skuid", "skgid", "cgroup", "mark")
_CHANGED_CT: Final = ("status", "mark", "saddr", "daddr", "src", "dst", "proto-src", "proto-dst")
"""Fields of a packet, or of its connection tracking entry, that may differ between two packets."""

_SHARED_STATUS: Final = ("expected", "seen-reply", "assured", "confirmed", "dying")

_PARTS: Final = ("&", "|", "^", "<<", ">>", "concat", "set", "range", "prefix", "elem", "jhash")
"""Expressions that consist of other expressions."""

_ENDS: Final = {
    "saddr": "source",
    "daddr": "destination",
    "sport": "source",
    "dport": "destination",
}


def only(value: Mapping[str, Json]) -> tuple[str, Json]:
    """The name and the content of an object's only member."""
    ((name, content),) = value.items()
    return name, content


class Sets:
    """The contents of the named sets and maps of a table.

    @ivar wanted: the sets whose contents are needed: a packet was compared with them, and their
        contents are unknown.
    """

    def __init__(self, known: Mapping[str, Sequence[Json] | None]) -> None:
        """@param known: by name; L{None}: nft has not shown them."""
        self._known = known
        self.wanted: set[str] = set()

    def elements(self, right: Json, *, needed: bool) -> Sequence[Json] | None:
        """The elements of a set or a map, named or not; for a single value, that value.

        @return: L{None} if they are unknown.
        """
        if isinstance(right, str) and right.startswith("@"):
            found = self._known.get(right[1:])
            if found is None and needed:
                self.wanted.add(right[1:])
            return found
        if isinstance(right, dict) and "set" in right:
            right = right["set"]
            if isinstance(right, str):
                return self.elements(right, needed=needed)
        if isinstance(right, dict) and "|" in right:
            right = _words(right)
        return right if isinstance(right, list) else [right]


class Table:
    """Reads the rules of one table of nftables."""

    def __init__(self, name: str, sets: Sets) -> None:
        self._name = name
        self._sets = sets

    def rules(self, rule: Mapping[str, Json]) -> list[Rule]:
        """A rule, split into one for each verdict that it may give."""
        where = f"{self._name} {rule['chain']}"
        chain = f"the nftables chain '{where}' (see: nft -a list chain {where})"
        conditions: list[Condition] = []
        found: list[Rule] = []
        for statement in rule.get("expr", []):
            try:
                name, content = only(statement)
                text = f"the rule with handle {rule['handle']} ({name}) of {chain}"
                if name == "vmap":
                    found += self._verdicts(text, conditions, content)
                    continue
                action, target = self._verdict(name, content)
                if action is not Action.CONTINUE:
                    found.append(Rule(text, tuple(conditions), action, target))
                conditions += self._conditions(name, content)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                handle = rule.get("handle", "?")
                text = (
                    f"the rule with handle {handle} of {chain}, which this program cannot interpret"
                )
                conditions.append(_unknown(statement))
                found.append(Rule(text, tuple(conditions), Action.DROP))
        return found

    def _verdicts(
        self, text: str, conditions: Sequence[Condition], content: Json
    ) -> Iterator[Rule]:
        elements = self._sets.elements(content["data"], needed=False)
        if elements is None:
            # Which packets get which verdict is unknown, so the rule may drop any packet.
            what = self._asked(content["key"], content["data"])
            yield Rule(text, (*conditions, Condition(what, usual=None)), Action.DROP)
        for key, verdict in elements or ():
            matches = Condition(self._asked(content["key"], {"set": [key]}))
            yield Rule(text, (*conditions, matches), *self._verdict(*only(verdict)))

    def _verdict(self, name: str, content: Json) -> tuple[Action, str]:
        if name in ("jump", "goto"):
            return Action(name), content["target"]
        if name in ("accept", "return", "notrack", "queue"):
            return Action(name), ""
        if name in ("drop", "reject"):
            return Action.DROP, ""
        if name in ("dnat", "redirect", "tproxy"):
            return Action.TRANSLATE, str((content or {}).get("port", ""))
        if name in ("snat", "masquerade"):
            return Action.ACCEPT, ""
        if name == "mangle" and _is_mark(content["key"]):
            return Action.MARK, ""
        if name == "xt" and (content or {}).get("type") != "match":  # nft does not show it
            return target_of(["-j", (content or {}).get("name", "")], ())
        return Action.CONTINUE, ""

    def _conditions(self, name: str, content: Json) -> list[Condition]:
        if name == "match":
            return self._match(content["op"], content["left"], content["right"])
        if name in _RATES:
            over = isinstance(content, dict) and content.get("inv", False)
            return [Condition(_question({name: content}), usual=not over)]
        if name in ("set", "map", "meter"):
            nested = content.get("stmt") or []
            statements = nested if isinstance(nested, list) else [nested]
            return [each for part in statements for each in self._conditions(*only(part))]
        if name == "xt" and (content or {}).get("type") != "target":
            if (content or {}).get("name") == "comment":
                return []
            return [Condition(_peculiar(json.dumps(content)), usual=None)]
        return [] if name in _KNOWN else [_unknown({name: content})]

    def _match(self, op: str, left: Json, right: Json) -> list[Condition]:
        negated = op in ("!=", "!")
        if op == "!":  # none of these flags
            op = "in"
        found = []
        for kind, what in _parts(left):
            if kind == "payload":
                protocol = what.get("protocol", "th")
                if protocol in ("ip", "ip6"):
                    found.append(Condition(_is_family(protocol), reads=of_family))
                elif protocol not in ("tcp", "th", "ether", "vlan"):
                    found.append(Condition(lambda packet: False))
            # An answer has no incoming interface; a visitor's packet has no outgoing one.
            elif kind == "meta" and what["key"] in ("iif", "iifname"):
                found.append(Condition(lambda packet: not packet.reply))
            elif kind == "meta" and what["key"] in ("oif", "oifname"):
                found.append(Condition(lambda packet: packet.reply))
        if isinstance(right, int) and op in ("<", "<=", ">", ">="):
            low, high = {
                "<": (0, right - 1),
                "<=": (0, right),
                ">": (right + 1, LAST_PORT),
                ">=": (right, LAST_PORT),
            }[op]
            right, op = {"range": [low, high]}, "=="
        elif op not in ("==", "!=", "in"):
            return [*found, Condition(_question({op: [left, right]}), usual=None)]
        usual = None if right in (0, False, "0x00000000") else False
        test = self._asked(left, right, op)
        return [*found, Condition(test, negated, usual, _reading(left))]

    def _asked(self, left: Json, right: Json, op: str = "==") -> Test:
        """A test whether the packet's value is one of the elements."""
        wanted = _wanted_flags(left, right, op)
        if wanted is not None:
            return lambda packet: any_of(packet.flags(*each) for each in wanted)

        def test(packet: Packet) -> Answer:
            own = _own(left, packet)
            elements = self._sets.elements(right, needed=bool(own))
            if elements is None:
                return f"{json.dumps([left, right])} {own}"
            return any_of(_is(packet, left, each, op) for each in elements)

        return test


_KNOWN: Final = (
    *("accept", "drop", "reject", "queue", "jump", "goto", "return", "continue", "notrack"),
    *("dnat", "snat", "redirect", "masquerade", "mangle", "xt", *_IGNORED),
)


def _question(expression: Json) -> Test:
    """A test with an unknown result. The question is the same for two packets if all values that
    the expression reads are the same in both."""
    text = json.dumps(expression)
    return lambda packet: f"{text} {_own(expression, packet)}"


_READS: Final = {
    "saddr": of_source,
    "daddr": of_destination,
    "protocol": of_family,
    "nexthdr": of_family,
    "l4proto": of_family,
    "nfproto": of_family,
}
"""For the most common fields and keys: what a test reads from a packet."""


def _reading(left: Json) -> Reads | None:
    """What an expression reads from a packet; L{None}: something that is not in the list."""
    kind, what = only(left)
    if kind not in ("payload", "meta"):
        return None
    return _READS.get(what.get("field", what.get("key")))


def _unknown(statement: Json) -> Condition:
    return Condition(_peculiar(json.dumps(statement)), usual=None)


def _peculiar(text: str) -> Test:
    """A test for something that is not understood: it may depend on anything in the packet."""
    return lambda packet: f"{text} {packet.peculiar}"


def _is_family(protocol: str) -> Test:
    return lambda packet: NFPROTO[packet.family][1] == protocol


def _is_mark(key: Json) -> bool:
    return _reads(key, "meta", "mark") or _reads(key, "ct", "mark")


def _reads(expression: Json, kind: str, *keys: str) -> bool:
    """Whether one of the expression's parts is of this kind and has one of these keys."""
    return any(what.get("key") in keys for name, what in _parts(expression) if name == kind)


def _payloads(expression: Json) -> list[Mapping[str, Json]]:
    return [what for name, what in _parts(expression) if name == "payload"]


def _parts(expression: Json) -> Iterator[tuple[str, Json]]:
    """The fields of a packet that make up an expression, with their kinds."""
    if isinstance(expression, list):
        for each in expression:
            yield from _parts(each)
    elif isinstance(expression, dict):
        for kind, what in expression.items():
            if (
                kind in _PARTS
                or isinstance(what, list)
                or kind in ("map", "expr", "key", "data", "val", "limit", "left")
            ):
                yield from _parts(what)
            elif isinstance(what, dict):
                yield kind, what


def _own(expression: Json, packet: Packet) -> str:
    """The values in this packet that the expression reads and that a redirect may have changed.

    Empty if it reads only values that two packets of the same visitor have in common.
    """
    return " ".join(filter(None, (_changed(packet, *part) for part in _parts(expression))))


def _changed(packet: Packet, kind: str, what: Mapping[str, Json]) -> str:
    if kind == "payload":
        name = what.get("field")
        if name in _ENDS:
            local = packet.local if name.endswith("addr") else packet.port
            return str(local) if packet.is_local(_ENDS[name]) else ""
        if name not in (None, "checksum") or what.get("base") in ("ll", "ih"):
            return ""
        return packet.peculiar
    if kind == "meta":
        key = what.get("key")
        if key == "mark":
            return packet.marks
        return packet.owner if key in _CHANGED_META else ""
    if kind == "ct":
        key = str(what.get("key")).rpartition(" ")[2]
        if key == "mark":
            return packet.marks
        if what.get("dir") == "original" and key != "status":
            return ""
        return packet.peculiar if key in _CHANGED_CT else ""
    if kind == "fib":
        return str(packet.local) if {"iif", "oif"} & set(what.get("flags", ())) else ""
    if kind == "socket":
        return packet.owner
    return "" if kind in _SHARED_KINDS or kind in _RATES else packet.peculiar


def _wanted_flags(left: Json, right: Json, op: str) -> list[tuple[list[str], list[str]]] | None:
    """Pairs of TCP flags: a mask, and the flags in the mask that must be set. A packet matches if
    one of the pairs matches.

    L{None} if the expression is not about TCP flags.
    """
    flags = {"payload": {"protocol": "tcp", "field": "flags"}}
    if isinstance(left, dict) and "&" in left and left["&"][0] == flags:
        return [(_words(left["&"][1:]), _words(right))]
    if left != flags:
        return None
    if op == "in":
        return [([each], [each]) for each in _words(right)]
    every = [*("fin", "syn", "rst", "psh", "ack", "urg", "ecn", "cwr")]
    if isinstance(right, dict) and "set" in right and isinstance(right["set"], list):
        return [(every, _words(each)) for each in right["set"]]
    return [(every, _words(right))]


def _is(packet: Packet, left: Json, right: Json, op: str) -> Answer:
    """Whether an expression has this value for the packet."""
    if isinstance(right, dict) and "elem" in right:
        right = right["elem"]["val"]
    kind, what = only(left)
    answer: Answer | None = None
    if kind == "concat":
        parts = right.get("concat", []) if isinstance(right, dict) else []
        if len(parts) == len(what):
            return all_of(_is(packet, *pair, op) for pair in zip(what, parts, strict=True))
    elif kind == "payload":
        answer = _payload(packet, what.get("protocol"), what.get("field"), right)
    elif kind == "meta":
        answer = _meta(packet, what["key"], right)
    elif kind == "ct":
        answer = _ct(packet, what, right, op)
    elif kind == "fib":
        answer = _fib(packet, what["result"], what["flags"], right)
    elif kind in ("exthdr", "rt"):  # ordinary clients send no extension headers
        answer = right is False if kind == "exthdr" else False
    elif kind == "tcp option" and what.get("field") == "size":
        answer = packet.first and _number(right, *SEGMENT_SIZE)
    elif kind == "&" and _payloads(what[0]) == [{"protocol": "ip", "field": "frag-off"}]:
        answer = right == 0  # the kernel reassembles fragments before the rules
    if answer is None:
        return f"{json.dumps([left, right])} {_own(left, packet)}"
    return answer


def _payload(packet: Packet, protocol: str | None, name: str | None, right: Json) -> Answer | None:
    if protocol in ("tcp", "th") and name in ("dport", "sport"):
        low, high = right["range"] if isinstance(right, dict) and "range" in right else [right] * 2
        if isinstance(low, int) and isinstance(high, int):
            return packet.port_within(_ENDS[name], low, high)
    elif protocol in ("ip", "ip6") and name in ("saddr", "daddr"):
        return packet.address_within(_ENDS[name], _address(right))
    elif name in ("protocol", "nexthdr"):
        return packet.protocol(str(right))
    elif name in ("ttl", "hoplimit"):
        return _number(right, *TTL)
    elif name == "length" and protocol == "ip":
        return _number(right, *(LENGTH_OF_FIRST if packet.first else LENGTH))
    elif name == "window":
        return _number(right, 1, LAST_PORT)
    elif name == "doff":
        return _number(right, 5, 15)
    return None


def _number(right: Json, low: int, high: int) -> Answer | None:
    """Whether a number is this one, if it lies between C{low} and C{high} in ordinary packets."""
    least, most = right["range"] if isinstance(right, dict) and "range" in right else [right] * 2
    if isinstance(least, int) and isinstance(most, int):
        return between(least, most, low, high, f"number {least}-{most} {low}")
    return None


def _meta(packet: Packet, key: str, right: Json) -> Answer | None:
    text = str(right)
    if key == "l4proto":
        return packet.protocol(text)
    if key in ("nfproto", "protocol"):
        return text in NFPROTO[packet.family]
    if key in ("iif", "iifname"):
        return packet.by_interface(text, inward=True)
    if key in ("oif", "oifname"):
        return packet.by_interface(text, inward=False)
    if key == "pkttype":
        return text in ("unicast", "host")
    if key in ("skuid", "skgid", "cgroup") and packet.owner == "proxy":
        return text in OWN_ID
    if key == "length":
        return _number(right, *(LENGTH_OF_FIRST if packet.first else LENGTH))
    return None


def _ct(packet: Packet, what: Mapping[str, Json], right: Json, op: str) -> Answer | None:
    key, text = what["key"], str(right)
    if key == "state":
        return packet.state([text])
    if key == "status" and text in ("dnat", "snat"):
        # With "==", all other bits would have to be 0, and they never are.
        return op == "in" and text == "dnat" and packet.translated
    if key == "status" and op == "in" and text in _SHARED_STATUS:
        return f"ct status {text}"
    if key == "direction":
        return (text == "reply") is packet.reply
    end, direction = key.rpartition(" ")[2], what.get("dir")
    port = {"original proto-dst": HTTPS, "reply proto-src": packet.port}.get(f"{direction} {end}")
    if port is not None:
        low, high = right["range"] if isinstance(right, dict) else [right] * 2
        return bool(low <= port <= high)
    address = {"original daddr": packet.dialled, "reply saddr": packet.local}.get(
        f"{direction} {end}"
    )
    if address is not None:
        return packet.has_address(address, key, _address(right))
    return None


def _fib(packet: Packet, result: str, flags: Sequence[str], right: Json) -> Answer | None:
    if result == "type" and not {"iif", "oif"} & set(flags):
        return packet.address_type("destination" if "daddr" in flags else "source", str(right))
    return None


def _words(value: Json) -> list[str]:
    """One or more flags, from each of the forms that nft prints."""
    if isinstance(value, dict):
        value = value.get("|", value.get("set", []))
    if isinstance(value, list):
        return [word for each in value for word in _words(each)]
    return [str(value)] if value else []


def _address(value: Json) -> str:
    if isinstance(value, dict) and "prefix" in value:
        return f"{value['prefix']['addr']}/{value['prefix']['len']}"
    if isinstance(value, dict) and "range" in value:
        return "-".join(value["range"])
    return str(value)


def is_translated(rule: Mapping[str, Json]) -> bool:
    """Whether iptables made the rule with an extension that nft cannot show."""
    return any(
        "xt" in statement and (statement["xt"] or {}).get("name") != "comment"
        for statement in rule.get("expr", [])
    )
