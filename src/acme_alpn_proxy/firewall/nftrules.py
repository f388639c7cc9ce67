"""The rules of one table as C{nft -j list ruleset} prints them: libnftables-json(5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from .iptablesrules import target_of
from .verdicts import LAST_PORT, Action, Certainty, Rule, Visit, sure

Json: TypeAlias = Any

NFPROTO: Final = {4: ("ipv4", "ip", "2"), 6: ("ipv6", "ip6", "10")}


def only(value: Mapping[str, Json]) -> tuple[str, Json]:
    """The name and the content of an object with one member."""
    ((name, content),) = value.items()
    return name, content


class Table:
    """Reads the rules of one table of nftables."""

    def __init__(self, visit: Visit, name: str, sets: Mapping[str, Json]) -> None:
        """@param sets: the elements of the sets and maps of this table by C{@name}."""
        self._visit = visit
        self._name = name
        self._sets = sets

    def rules(self, rule: Mapping[str, Json]) -> list[Rule]:
        """A rule, as one for each verdict that it may come to."""
        where = f"{self._name} {rule['chain']}"
        certainty = Certainty.ALL
        found = []
        for statement in rule.get("expr", []):
            name, content = only(statement)
            text = f"rule {rule['handle']} ({name}) of the nftables chain '{where}'"
            if name == "vmap":
                for key, verdict in self._elements(content["data"]):
                    matches = min(certainty, self._equals(content["key"], key))
                    found.append(Rule(text, matches, *self._verdict(*only(verdict))))
                continue
            action, target = self._verdict(name, content)
            if action is not Action.CONTINUE:
                found.append(Rule(text, certainty, action, target))
            certainty = min(certainty, self._condition(name, content))
        return found or [Rule("", certainty, Action.CONTINUE)]

    def _verdict(self, name: str, content: Json) -> tuple[Action, str]:
        if name in ("jump", "goto"):
            return Action(name), content["target"]
        if name in ("accept", "return", "notrack"):
            return Action(name), ""
        if name in ("drop", "reject", "queue", "synproxy"):
            return Action.DROP, ""
        if name in ("dnat", "redirect", "tproxy"):
            return Action.TRANSLATE, ""
        if name in ("snat", "masquerade"):
            return Action.ACCEPT, ""
        if name == "xt" and (content or {}).get("type") != "match":  # as nft does not tell
            return target_of(["-j", (content or {}).get("name", "")], ())
        return Action.CONTINUE, ""

    def _condition(self, name: str, content: Json) -> Certainty:
        if name == "match":
            return self._match(content["op"], content["left"], content["right"])
        if name in ("limit", "quota", "ct count"):
            return Certainty.SOME if content.get("inv") else Certainty.RATED
        if name in ("set", "meter"):
            nested = content.get("stmt") or []
            statements = nested if isinstance(nested, list) else [nested]
            return min((self._condition(*only(each)) for each in statements), default=Certainty.ALL)
        return Certainty.UNKNOWN if name == "xt" else Certainty.ALL

    def _match(self, op: str, left: Json, right: Json) -> Certainty:
        kind, what = only(left)
        if kind == "&" and self._is_tcp_flags(what[0]):
            matches = self._visit.flags(_words(what[1]), _words(right))
            return matches.negated if op == "!=" else matches
        if kind == "payload" and self._other_packets(what):
            return Certainty.NONE
        if self._is_tcp_flags(left):
            anything = sure("syn" in _words(right))
            exactly = self._visit.flags(["all"], _words(right))
            return {"==": exactly, "!=": exactly.negated, "!": anything.negated}.get(op, anything)
        if op in ("==", "in"):
            return self._equals(left, right)
        if op == "!=":
            return self._equals(left, right).negated
        if isinstance(right, int) and op in ("<", "<=", ">", ">="):
            low, high = {
                "<": (0, right - 1),
                "<=": (0, right),
                ">": (right + 1, LAST_PORT),
                ">=": (right, LAST_PORT),
            }[op]
            return self._equals(left, {"range": [low, high]})
        return Certainty.UNKNOWN

    def _is_tcp_flags(self, left: Json) -> bool:
        return bool(left == {"payload": {"protocol": "tcp", "field": "flags"}})

    def _other_packets(self, payload: Mapping[str, Json]) -> bool:
        """Whether the field belongs to packets of another protocol than a visitor's."""
        ours = ("tcp", "th", "ip" if self._visit.family == 4 else "ip6", "ether")
        return payload.get("protocol", "tcp") not in ours

    def _elements(self, right: Json) -> list[Json]:
        """The elements of a set or a map, named or not; of a single value, that one."""
        if isinstance(right, str) and right.startswith("@"):
            found = self._sets.get(right, [])
        elif isinstance(right, dict) and "set" in right:
            found = right["set"]
        else:
            found = right
        return found if isinstance(found, list) else [found]

    def _equals(self, left: Json, right: Json) -> Certainty:
        """Whether it is one of the elements."""
        kind, what = only(left)
        if kind == "payload" and self._other_packets(what):
            return Certainty.NONE
        return max((self._is(left, each) for each in self._elements(right)), default=Certainty.NONE)

    def _is(self, left: Json, right: Json) -> Certainty:
        kind, what = only(left)
        if isinstance(right, dict) and "elem" in right:
            right = right["elem"]["val"]
        if kind == "concat":
            parts = right["concat"] if isinstance(right, dict) and "concat" in right else []
            if len(parts) != len(what):
                return Certainty.UNKNOWN
            return min(map(self._is, what, parts))
        if kind == "payload":
            return self._payload(what.get("protocol"), what.get("field"), right)
        text = str(right)
        if kind == "meta":
            return self._meta(what["key"], text)
        if kind == "ct":
            return self._ct(what["key"], text)
        if kind == "fib":
            return self._fib(what["result"], what["flags"], right)
        if kind == "exthdr":  # a SYN has no extension headers
            return sure(right is False)
        return Certainty.UNKNOWN

    def _payload(self, protocol: str | None, name: str | None, right: Json) -> Certainty:
        visit = self._visit
        if protocol in ("tcp", "th") and name in ("dport", "sport"):
            low, high = (
                right["range"] if isinstance(right, dict) and "range" in right else [right] * 2
            )
            if not (isinstance(low, int) and isinstance(high, int)):
                return Certainty.UNKNOWN
            return (visit.to_port if name == "dport" else visit.from_port)(low, high)
        if name in ("protocol", "nexthdr"):
            return visit.protocol(str(right))
        if name in ("saddr", "daddr") and protocol in ("ip", "ip6"):
            return (visit.comes_from if name == "saddr" else visit.goes_to)(_address(right))
        return Certainty.UNKNOWN

    def _meta(self, key: str, text: str) -> Certainty:
        visit = self._visit
        if key == "l4proto":
            return visit.protocol(text)
        if key in ("nfproto", "protocol"):
            return sure(text in NFPROTO[visit.family])
        if key in ("iif", "iifname"):
            return visit.comes_in_by(text)
        if key == "pkttype":
            return visit.packet_type(text)
        return visit.mark(text) if key == "mark" else Certainty.UNKNOWN

    def _ct(self, key: str, text: str) -> Certainty:
        if key in ("state", "status"):
            return self._visit.state([text])
        if key == "direction":
            return sure(text == "original")
        return self._visit.mark(text) if key == "mark" else Certainty.UNKNOWN

    def _fib(self, result: str, flags: Sequence[str], right: Json) -> Certainty:
        if result == "type":
            text = str(right)
            return (
                self._visit.destination_type(text)
                if "daddr" in flags
                else self._visit.source_type(text)
            )
        if right is False:  # no way back: a forged source
            return Certainty.SOME
        return Certainty.UNKNOWN


def _words(value: Json) -> list[str]:
    """Flags, one or more, in each of the ways that they are printed."""
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
    """Whether a rule is made by iptables with an extension, which nft cannot show."""
    return any("xt" in statement for statement in rule.get("expr", []))
