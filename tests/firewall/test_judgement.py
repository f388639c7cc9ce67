"""What the firewall would do to visitors who are redirected, judged without a kernel."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from twisted.internet.defer import Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.firewall.judgement import (
    Firewall,
    drops,
    exempts_from_tracking,
    look,
    sends_elsewhere,
)
from acme_alpn_proxy.firewall.nftrules import Table
from acme_alpn_proxy.firewall.verdicts import Caught, Passed, Verdict, Visit
from acme_alpn_proxy.firewall.xtables import BINARIES
from acme_alpn_proxy.host import facts
from acme_alpn_proxy.interfaces import NOT_FOUND, ICommands, Result
from acme_alpn_proxy.options import ProxyOptions
from acme_alpn_proxy.redirects import bpf
from acme_alpn_proxy.redirects.iptables import IptablesRedirect
from acme_alpn_proxy.redirects.sklookup import SkLookupRedirect
from acme_alpn_proxy.tap import make_redirect

DATA = Path(__file__).resolve().parents[1] / "data" / "firewalls"
PORT = 21443
NFT = "nft -j list ruleset"
FILTER = "iptables-nft -w 5 -t filter -S"
NAT = "iptables-nft -w 5 -t nat -S"
USUAL = """
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p icmp -j ACCEPT
"""


Answers: TypeAlias = Mapping[str, str | tuple[int, str]]
"""Output, or exit status and output, by command line."""


@implementer(ICommands)
class Recorded:
    """Answers with what commands once printed; there are no other programs."""

    def __init__(self, answers: Answers) -> None:
        self.answers = dict(answers)
        self.asked: list[str] = []

    def run(self, argv: Sequence[str]) -> Deferred[Result]:
        self.asked.append(" ".join(argv))
        answer = self.answers.get(" ".join(argv), (NOT_FOUND, "not found on PATH"))
        code, output = answer if isinstance(answer, tuple) else (0, answer)
        return succeed(Result(tuple(argv), code, output))

    def pause(self, seconds: float) -> Deferred[None]:
        raise AssertionError("nothing here waits")


def accept_the_program(case: SynchronousTestCase) -> None:
    """The kernel takes the program of sk-lookup."""
    case.patch(bpf, "make_socket_map", lambda slots: os.dup(0))
    case.patch(bpf, "load_sk_lookup", lambda code, name: os.dup(0))


def recorded(name: str) -> Recorded:
    return Recorded(json.loads((DATA / f"{name}.json").read_text()))


def caught_by(listing: str, table: str = "filter", visit: Visit | None = None) -> str:
    """The rule of one table of iptables that catches visitors, or nothing."""
    verdict = drops(Firewall(iptables=[(table, listing)]), visit or Visit(4, PORT, "net0"))
    return verdict.by if isinstance(verdict, Caught) else ""


def closed(rules: str, port: int = PORT) -> bool:
    """Whether INPUT, dropping by default, with these rules, is closed for visitors."""
    listing = f"-P INPUT DROP\n{rules}"
    return bool(caught_by(listing, visit=Visit(4, port, "net0")))


def dropped(rules: str) -> bool:
    """Whether INPUT, accepting by default, with these rules, drops visitors."""
    return bool(caught_by(f"-P INPUT ACCEPT\n{rules}"))


def ruleset(chain: Mapping[str, Any], *exprs: Any) -> list[dict[str, Any]]:
    """A table with one base chain."""
    of = {"family": "inet", "table": "t", "chain": "c"}
    base = {"family": "inet", "table": "t", "name": "c", "type": "filter", **chain}
    rules = [{"rule": {**of, "handle": n, "expr": expr}} for n, expr in enumerate(exprs)]
    return [{"table": {"family": "inet", "name": "t"}}, {"chain": base}, *rules]


class IptablesTests(SynchronousTestCase):
    def test_no_firewall(self) -> None:
        """Without a rule, or with none that drops, visitors get through."""
        self.assertFalse(dropped(""))
        self.assertFalse(dropped(USUAL))

    def test_default_drop(self) -> None:
        """Where INPUT drops by default, 443 let in is not enough; 21443 is."""
        web = USUAL + "-A INPUT -p tcp -m tcp --dport 443 -j ACCEPT\n"
        self.assertTrue(closed(web))
        self.assertFalse(closed(web, port=443))
        self.assertFalse(closed(web + "-A INPUT -p tcp -m tcp --dport 21443 -j ACCEPT\n"))

    def test_named(self) -> None:
        """What would drop is named as the command that would make it."""
        self.assertEqual(caught_by("-P INPUT DROP\n"), "iptables -t filter -P INPUT DROP")
        two_lines = '-P INPUT ACCEPT\n-A INPUT -m comment --comment "no\nmore" -j DROP\n'
        self.assertIn("'no more'", caught_by(two_lines))
        closing = "-A INPUT -j REJECT --reject-with icmp6-adm-prohibited"
        self.assertEqual(
            caught_by(f"-P INPUT ACCEPT\n{closing}\n", visit=Visit(6, PORT)),
            f"ip6tables -t filter {closing}",
        )

    def test_surely_let_in(self) -> None:
        """Port 21443 may be let in in many ways."""
        for rule in (
            "-p tcp -m multiport --dports 443,21000:22000 -j ACCEPT",
            "-p tcp -m tcp --dport 1024: -j ACCEPT",
            "-p tcp -m tcp --sport 1024:65535 --dport :65535 -j ACCEPT",
            "-p tcp -m tcp ! --dport 22 -j ACCEPT",
            "-p 6 -m conntrack --ctstate NEW -j ACCEPT",
            "-m state --state NEW -j ACCEPT",
            "-m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT",
            "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT",
            "-i net0 -j ACCEPT",
            "-i ne+ -j ACCEPT",
            "-i + -j ACCEPT",
            "! -i lo -j ACCEPT",
            "-s 0.0.0.0/0 -j ACCEPT",
            "-m addrtype --dst-type LOCAL -m pkttype --pkt-type unicast -j ACCEPT",
            "-m addrtype --src-type UNICAST -j ACCEPT",
            '-m comment --comment "! -s all --of them" -j ACCEPT',
        ):
            self.assertFalse(closed(f"-A INPUT {rule}"), rule)
        self.assertFalse(
            caught_by("-P INPUT DROP\n-A INPUT -s 2000::/3 -j ACCEPT", visit=Visit(6, 1))
        )

    def test_not_surely_let_in(self) -> None:
        """A rule that accepts some visitors only, or that is not understood, does not count."""
        for rule in (
            "-s 10.0.0.0/8 -j ACCEPT",
            "! -s 203.0.113.7/32 -j ACCEPT",
            "-d 192.0.2.1/32 -j ACCEPT",
            "-i net1 -j ACCEPT",
            "-f -j ACCEPT",
            "-p udp -j ACCEPT",
            "-p tcp -m tcp --dport https -j ACCEPT",
            "-p tcp -m tcp --sport 53 -j ACCEPT",
            "-p tcp -m set --match-set friends src -j ACCEPT",
            "-p tcp -m set --match-set ports dst -j ACCEPT",
            "-p tcp -m limit --limit 5/sec -j ACCEPT",
            "-m mark --mark 0x1 -j ACCEPT",
            "-m mark --mark x -j ACCEPT",
            "-m bpf --bytecode x -j ACCEPT",
            "-s 10.0.0.1/10.0.0.255 -j ACCEPT",
            "-m iprange --src-range 192.0.2.1-192.0.2.9 -j ACCEPT",
            "-p tcp -j LOG --log-prefix allowed",
            "-p tcp",
        ):
            self.assertTrue(closed(f"-A INPUT {rule}"), rule)

    def test_general_drop(self) -> None:
        """A drop of everybody, of all but a few, or one that is not understood, is a drop."""
        for rule in (
            "-j DROP",
            "-j REJECT --reject-with icmp-port-unreachable",
            "-p tcp -m tcp --dport 1024:65535 -j DROP",
            "-p tcp -m tcp ! --dport 443 -j DROP",
            "! -s 10.0.0.0/8 -j DROP",
            "-m set ! --match-set friends src -j DROP",
            "-m geoip ! --source-country DE -j DROP",
            "-i net0 -j DROP",
            "-d 192.0.2.1/32 -j DROP",
            "-m mark --mark 0x0/0xff -j DROP",
            "-m bpf --bytecode x -j DROP",
            "-j NFQUEUE --queue-num 1",
            "-j TARPIT",
        ):
            self.assertTrue(dropped(f"-A INPUT {rule}"), rule)

    def test_blacklist(self) -> None:
        """Who was banned, or comes too often, or sends nonsense, is no visitor who is missed."""
        for rule in (
            "-s 203.0.113.7/32 -j DROP",
            "-p tcp -m multiport --dports 80,443 -m set --match-set banned src -j REJECT",
            "-p tcp -m multiport --sports 53 -j DROP",
            "-m conntrack --ctstate INVALID -j DROP",
            "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate NEW -j DROP",
            "-p tcp -m tcp --tcp-flags FIN,SYN,RST,PSH,ACK,URG NONE -j DROP",
            "-p tcp -m tcp --tcp-flags FIN,SYN,RST,PSH,ACK,URG FIN,PSH,URG -j DROP",
            "-p tcp -m connlimit --connlimit-above 50 --connlimit-mask 32 -j REJECT",
            "-m hashlimit --hashlimit-above 9/sec --hashlimit-burst 5 --hashlimit-name h -j DROP",
            "-m recent --rcheck --seconds 60 --hitcount 4 --name x --mask 255.255.255.255 -j DROP",
            "-m addrtype --dst-type BROADCAST -j DROP",
            "-m addrtype --src-type LOCAL -j DROP",
            "-m mac --mac-source 00:00:5e:00:53:01 -j DROP",
            '-m string --string "! -j" --algo bm -j DROP',
            "-d 224.0.0.0/4 -j DROP",
            "-d 255.255.255.255/32 -j DROP",
            "! -s 127.0.0.0/8 -d 127.0.0.0/8 -j DROP",
            "-m rt --rt-type 0 -j DROP",
        ):
            self.assertFalse(dropped(f"-A INPUT {rule}"), rule)

    def test_interface_not_known(self) -> None:
        """Where nobody knows by which interface visitors come, either may be theirs."""
        unknown = Visit(4, PORT)
        self.assertTrue(caught_by("-P INPUT ACCEPT\n-A INPUT -i net0 -j DROP", visit=unknown))
        self.assertTrue(caught_by("-P INPUT DROP\n-A INPUT -i net0 -j ACCEPT", visit=unknown))
        self.assertFalse(caught_by("-P INPUT ACCEPT\n-A INPUT -i lo -j DROP", visit=unknown))

    def test_other_tables(self) -> None:
        """INPUT of other tables is passed too; PREROUTING there comes before the redirect."""
        rules = "-P PREROUTING ACCEPT\n-P INPUT ACCEPT\n-A {} -j DROP"
        for table in ("mangle", "security"):
            self.assertTrue(caught_by(rules.format("INPUT"), table))
        self.assertFalse(caught_by("-P OUTPUT DROP"))
        for table in ("raw", "mangle", "nat"):
            self.assertFalse(caught_by(rules.format("PREROUTING"), table))


class ChainTests(SynchronousTestCase):
    def closed(self, first: str, chain: str, policy: str = "DROP") -> bool:
        """Whether INPUT with a first rule into C{chain}, X, is closed."""
        rules = "".join(f"-A X {rule}\n" for rule in chain.split("; "))
        return bool(caught_by(f"-P INPUT {policy}\n-N X\n-A INPUT {first}\n{rules}"))

    def test_jump(self) -> None:
        """What a chain accepts is accepted, what it drops is dropped, what it leaves goes on."""
        self.assertFalse(self.closed("-j X", "-j ACCEPT"))
        self.assertTrue(self.closed("-j X", "-j DROP", "ACCEPT"))
        self.assertTrue(self.closed("-j X", "-s 192.0.2.1/32 -j ACCEPT"))
        self.assertFalse(self.closed("-j X\n-A INPUT -j ACCEPT", "-j RETURN; -j DROP"))

    def test_goto(self) -> None:
        """A goto does not come back to the rules behind it."""
        self.assertTrue(self.closed("-g X\n-A INPUT -j ACCEPT", "-j LOG"))
        self.assertFalse(self.closed("-j X\n-A INPUT -j ACCEPT", "-j LOG"))

    def test_jump_of_some(self) -> None:
        """Who goes to a chain by a blacklist may be dropped there, others go on."""
        self.assertFalse(self.closed("-s 203.0.113.7/32 -j X", "-j DROP", "ACCEPT"))
        self.assertTrue(self.closed("-s 203.0.113.7/32 -j X", "-j ACCEPT"))

    def test_jump_in_doubt(self) -> None:
        """Where it is not known who goes to a chain, its drop counts and its accept does not."""
        self.assertTrue(self.closed("-m bpf --bytecode x -j X", "-j DROP", "ACCEPT"))
        self.assertTrue(self.closed("-m bpf --bytecode x -j X", "-j ACCEPT"))

    def test_who_has_left(self) -> None:
        """An accept does not count for those who may have left the chain before it."""
        self.assertTrue(self.closed("-j X", "-m bpf --bytecode x -j RETURN; -j ACCEPT"))
        self.assertFalse(self.closed("-j X", "-s 192.0.2.1/32 -j RETURN; -j ACCEPT"))

    def test_limit(self) -> None:
        """A chain that lets visitors go up to a rate, and drops the rest, is no general drop."""
        self.assertFalse(
            self.closed(
                "-j X", "-m limit --limit 9/sec --limit-burst 5 -j RETURN; -j DROP", "ACCEPT"
            )
        )


class NftTests(SynchronousTestCase):
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (DATA / "nft-rules.jsonl").read_text().splitlines()]

    def caught(self, objects: list[dict[str, Any]]) -> bool:
        return isinstance(drops(Firewall(objects), Visit(4, PORT, "net0")), Caught)

    def test_rules(self) -> None:
        """Each kind of rule is read as the visitors that it matches and what it does to them."""
        sets = {}
        for line in self.lines():
            if "rule" not in line:
                (content,) = line.values()
                sets[f"@{content['name']}"] = content.get("elem", [])
                continue
            rule = {"chain": "c", "handle": 1, "expr": line["expr"]}
            for family in (4, 6):
                rules = Table(Visit(family, PORT, "net0"), "inet t", sets).rules(rule)
                found = max(rules, key=lambda each: each.certainty)
                read = f"{found.certainty.name.lower()} {found.action.value}"
                self.assertEqual(read, line[f"ipv{family}"], (line["rule"], family))

    def test_other_printings(self) -> None:
        """What other releases of nft print in other words, or not at all, is doubt at worst."""
        table = Table(Visit(4, PORT, "net0"), "inet t", {})
        flags = {"payload": {"protocol": "tcp", "field": "flags"}}
        mask = {"|": ["fin", {"|": ["syn", "rst"]}]}
        port = {"payload": {"protocol": "tcp", "field": "dport"}}
        for statement, expected in (
            ({"match": {"op": "==", "left": {"&": [flags, mask]}, "right": "syn"}}, "all"),
            (
                {
                    "match": {
                        "op": "==",
                        "left": {"&": [{"meta": {"key": "mark"}}, 255]},
                        "right": 1,
                    }
                },
                "unknown",
            ),
            ({"match": {"op": "==", "left": port, "right": "https"}}, "unknown"),
            ({"match": {"op": "in", "left": port, "right": {"set": "@ports"}}}, "unknown"),
            ({"match": {"op": "<", "left": port, "right": "https"}}, "unknown"),
            ({"match": {"op": "==", "left": {"concat": [port, port]}, "right": "?"}}, "unknown"),
            ({"xt": {"type": "match", "name": "geoip"}}, "unknown"),
            ({"xt": None}, "unknown"),
            ({"unheard of": None}, "all"),
        ):
            rule = {"chain": "c", "handle": 1, "expr": [statement, {"accept": None}]}
            found = table.rules(rule)[-1]
            self.assertEqual(found.certainty.name.lower(), expected, statement)
        key = {"payload": {"protocol": "udp", "field": "dport"}}
        verdicts = {"vmap": {"key": key, "data": {"set": [[PORT, {"drop": None}]]}}}
        self.assertFalse(self.caught(ruleset({"hook": "input", "prio": 0}, [verdicts])))
        target = {"xt": {"type": "target", "name": "REJECT"}}
        self.assertTrue(self.caught(ruleset({"hook": "input", "prio": 0}, [target])))

    def test_where(self) -> None:
        """Input counts, and PREROUTING behind the redirect; what comes before it does not."""
        drop = [{"drop": None}]
        for chain, expected in (
            ({"hook": "input", "prio": -300}, True),
            ({"hook": "input", "prio": 0, "type": "nat"}, True),
            ({"hook": "prerouting", "prio": 10}, True),
            ({"hook": "prerouting", "prio": 10, "type": "nat"}, False),
            ({"hook": "prerouting", "prio": -150}, False),
            ({"hook": "forward", "prio": 0}, False),
        ):
            self.assertEqual(self.caught(ruleset(chain, drop)), expected, chain)

    def test_policy(self) -> None:
        """A policy of drop is named with its chain; one of accept lets visitors through."""
        chain = {"hook": "input", "prio": 0, "policy": "drop"}
        verdict = drops(Firewall(ruleset(chain)), Visit(6, PORT))
        self.assertEqual(verdict, Caught("the policy 'drop' of the nftables chain 'inet t c'"))
        self.assertFalse(self.caught(ruleset({**chain, "policy": "accept"})))

    def test_named_set(self) -> None:
        """The ports that a named set lets in are those that it holds."""
        port = {"payload": {"protocol": "tcp", "field": "dport"}}
        rule = [{"match": {"op": "==", "left": port, "right": "@ports"}}, {"accept": None}]
        objects = ruleset({"hook": "input", "prio": 0, "policy": "drop"}, rule)
        for elements, expected in (([22, 443], True), ([22, PORT], False)):
            ports = {"family": "inet", "table": "t", "name": "ports", "elem": elements}
            self.assertEqual(self.caught([*objects, {"set": ports}]), expected, elements)

    def test_other_family(self) -> None:
        """Rules of the other family are no matter."""
        objects = ruleset({"hook": "input", "prio": 0}, [{"drop": None}])
        for each in objects:
            for content in each.values():
                content["family"] = "ip6"
        self.assertFalse(self.caught(objects))


class NotrackTests(SynchronousTestCase):
    def exempt(self, *rules: str) -> bool:
        listing = "-P PREROUTING ACCEPT\n" + "".join(f"-A PREROUTING {rule}\n" for rule in rules)
        firewall = Firewall(iptables=[("raw", listing)])
        return isinstance(exempts_from_tracking(firewall, Visit(4, 443, "net0")), Caught)

    def test_iptables(self) -> None:
        """Where :443 is exempt from tracking nobody is redirected."""
        https = "-p tcp -m tcp --dport 443"
        self.assertTrue(self.exempt(f"{https} -j NOTRACK"))
        self.assertTrue(self.exempt(f"{https} -j CT --notrack"))
        self.assertFalse(self.exempt(f"{https} -j CT --helper ftp"))
        self.assertFalse(self.exempt("-p tcp -m tcp --dport 53 -j NOTRACK"))
        self.assertFalse(self.exempt(f"-s 192.0.2.1/32 {https} -j NOTRACK"))
        self.assertFalse(self.exempt("-j ACCEPT", f"{https} -j NOTRACK"))

    def test_nft(self) -> None:
        """So it is by nft, in a chain that comes before connection tracking."""
        for priority, expected in ((-300, True), (-150, False)):
            chain = {"hook": "prerouting", "prio": priority}
            objects = ruleset(chain, [{"notrack": None}])
            verdict = exempts_from_tracking(Firewall(objects), Visit(4, 443))
            self.assertEqual(isinstance(verdict, Caught), expected, priority)

    def test_drops_nobody(self) -> None:
        """To go untracked is not to be dropped."""
        self.assertFalse(caught_by("-P INPUT ACCEPT\n-A INPUT -j NOTRACK"))


class HostCase(SynchronousTestCase):
    """A host of which nothing is known but what its commands print."""

    def setUp(self) -> None:
        self.legacy: list[str] = []
        self.interfaces: set[str] = set()
        self.patch(facts, "legacy_tables", lambda family: self.legacy)
        self.patch(facts, "visitor_interfaces", lambda family: self.interfaces)


class LookTests(HostCase):
    def reason(self, commands: Recorded, *families: int) -> str:
        """Why visitors would not get to the proxy, or nothing."""
        reason: str | None = self.successResultOf(look(commands, families or (4,), PORT))
        self.assertNotIn("\n", reason or "")
        return reason or ""

    def test_interface(self) -> None:
        """The stand-in for the commands is one."""
        verifyObject(ICommands, Recorded({}))

    def test_nothing_there(self) -> None:
        """Without any firewall program, and with programs but without rules, all is well."""
        self.assertEqual(self.reason(Recorded({})), "")
        self.assertEqual(self.reason(Recorded({NFT: ""})), "")
        self.assertEqual(self.reason(Recorded({NFT: '{"nftables": [{"metainfo": {}}]}'})), "")

    def test_ufw(self) -> None:
        """Under ufw with 443 allowed visitors would be dropped; with 21443 allowed too, not."""
        self.assertIn("port 21443, where the firewall drops them: ", self.reason(recorded("ufw")))
        self.assertEqual(self.reason(recorded("ufw-with-port")), "")

    def test_ufw_without_nft(self) -> None:
        """The same without the program nft."""
        for name, policy in (("ufw", "iptables -t filter -P INPUT DROP"), ("ufw-with-port", "")):
            commands = recorded(name)
            del commands.answers[NFT]
            commands.answers["iptables -V"] = "iptables v1.8.9 (nf_tables)"
            self.assertIn(policy, self.reason(commands))
            self.assertEqual(bool(self.reason(commands)), bool(policy))

    def test_firewalld(self) -> None:
        """Under firewalld visitors get through: it lets in what was redirected before it."""
        for family in (4, 6):
            self.assertEqual(self.reason(recorded("firewalld"), family), "")

    def test_firewalld_without_that(self) -> None:
        """Were it not so, only the port added to the zone would let them in."""
        for name, open_ in (("firewalld", False), ("firewalld-with-port", True)):
            commands = recorded(name)
            objects = json.loads(commands.answers[NFT])["nftables"]  # type: ignore[arg-type]
            kept = [each for each in objects if '"status"' not in json.dumps(each)]
            self.assertLess(len(kept), len(objects))
            commands.answers[NFT] = json.dumps({"nftables": kept})
            self.assertEqual(self.reason(commands) == "", open_, name)

    def test_docker(self) -> None:
        """Docker's rules are in nobody's way."""
        self.assertEqual(self.reason(recorded("docker")), "")

    def test_not_translated(self) -> None:
        """Extensions of iptables that only iptables can show are doubt where it cannot."""
        mixed = (1, "table `filter' is incompatible, use 'nft' tool.")
        for listing in ((NOT_FOUND, ""), (3, "no such table"), mixed, "-P INPUT DROP\n"):
            commands = recorded("ufw-with-port")
            commands.answers[FILTER] = listing
            self.assertIn("of the nftables chain 'ip filter ", self.reason(commands))

    def test_legacy(self) -> None:
        """Tables of the legacy iptables are consulted, by either name of the program."""
        self.legacy = ["filter"]
        for binary in ("iptables-legacy", "iptables"):
            listing = {f"{binary} -w 5 -t filter -S": "-P INPUT DROP\n"}
            self.assertIn("iptables -t filter -P INPUT DROP", self.reason(Recorded(listing)))

    def test_legacy_not_seen(self) -> None:
        """If only the other variant is there, its warning is taken seriously."""
        self.legacy = ["filter"]
        warning = "# Warning: iptables-legacy tables present, use iptables-legacy to see them\n"
        commands = Recorded({"iptables -w 5 -t filter -S": f"-P INPUT ACCEPT\n{warning}"})
        self.assertIn("iptables-legacy is missing", self.reason(commands))

    def test_cannot_look(self) -> None:
        """If a command fails, or prints what nobody understands, that is a reason too."""
        locked = (4, "the lock\nis held")
        cases: tuple[tuple[Answers, str], ...] = (
            ({NFT: (1, "no permission")}, f"'{NFT}' failed with status 1: no permission"),
            ({"iptables -V": locked}, "'iptables -V' failed with status 4: the lock is held"),
            ({"iptables -V": "nf_tables", FILTER: locked}, f"'{FILTER}' failed with status 4"),
            ({NFT: "surprise"}, "not understood"),
            ({NFT: '{"nftables": [{"table": {}}]}'}, "not understood"),
        )
        for answers, words in cases:
            self.assertIn(words, self.reason(Recorded(answers)))

    def test_untracked(self) -> None:
        """That visitors are exempt from tracking is told as such."""
        self.legacy = ["raw"]
        listing = "-P PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 443 -j NOTRACK\n"
        reason = self.reason(Recorded({"iptables-legacy -w 5 -t raw -S": listing}))
        self.assertIn("exempt from connection tracking", reason)

    def test_both_families(self) -> None:
        """Each family is looked at; that which shows both is asked once."""
        self.legacy = ["filter"]
        commands = Recorded({NFT: "", "ip6tables-legacy -w 5 -t filter -S": "-P INPUT DROP\n"})
        self.assertEqual(self.reason(commands, 4), "")
        self.assertIn("visitors by IPv6 would", self.reason(commands, 6))
        commands.asked.clear()
        self.assertIn("visitors by IPv6 would", self.reason(commands, 4, 6))
        self.assertEqual(commands.asked.count(NFT), 1)

    def test_every_interface(self) -> None:
        """Visitors may come in by more than one interface, and each is looked at."""
        self.legacy = ["filter"]
        listing = "-P INPUT DROP\n-A INPUT -i net0 -j ACCEPT\n"
        commands = Recorded({"iptables-legacy -w 5 -t filter -S": listing})
        self.interfaces = {"net0"}
        self.assertEqual(self.reason(commands), "")
        self.interfaces = {"net0", "net1"}
        self.assertNotEqual(self.reason(commands), "")


class RefusalTests(HostCase):
    def setUp(self) -> None:
        super().setUp()
        self.patch(facts, "unnumbered_interfaces", lambda family: [])

    def test_refused(self) -> None:
        """A start is refused by name of what would drop, with the remedies, and changes nothing."""
        for may, remedy, status in (
            (True, "use --redirect sk-lookup.*--force$", os.EX_CONFIG),
            (False, "run this as root, with CAP_NET_ADMIN", os.EX_NOPERM),
        ):
            self.patch(facts, "may_administer_network", lambda may=may: may)
            attempt = IptablesRedirect(PORT, ipv6=False).prepare(recorded("ufw"))
            problem: Any = self.failureResultOf(attempt, StartError).value
            self.assertRegex(str(problem), f"'ip filter INPUT'; {remedy}")
            self.assertEqual(problem.status, status)

    def test_either_family(self) -> None:
        """One family whose visitors would not get there is enough, with either redirect."""
        self.patch(facts, "has_ipv6", lambda: True)
        accept_the_program(self)
        elsewhere = "-P PREROUTING ACCEPT\n-A PREROUTING -p tcp -j DNAT --to-destination :80\n"
        for redirect, table, rules in (
            (IptablesRedirect(PORT), "filter", "-P INPUT DROP\n"),
            (SkLookupRedirect(), "nat", elsewhere),
        ):
            self.legacy = [table]
            for family, binary in BINARIES.items():
                commands = Recorded({f"{binary}-legacy -w 5 -t {table} -S": rules})
                problem: Any = self.failureResultOf(redirect.prepare(commands), StartError).value
                self.assertIn(f"visitors by IPv{family} ", str(problem))

    def test_forced(self) -> None:
        """With --force nobody looks."""
        options = ProxyOptions()
        options.environment = {"ACME_ALPN_PROXY_DISABLEV6": "y"}
        options.parseOptions(["--force"])
        commands = recorded("ufw")
        self.successResultOf(make_redirect(options).prepare(commands))


class ElsewhereTests(HostCase):
    """Whether :443 is published by a container engine, so that sk-lookup never sees it."""

    def verdict(self, *nat: str, interface: str = "eth0") -> Verdict:
        listing = "\n".join(["-P PREROUTING ACCEPT", "-N DOCKER", *nat])
        return sends_elsewhere(Firewall(iptables=[("nat", listing)]), Visit(4, 443, interface))

    def test_published(self) -> None:
        """A port published in Docker's manner is named, one of the host's addresses alone too."""
        jump = "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER"
        to = "-j DNAT --to-destination 172.17.0.2:443"
        for rule in (
            f"-A DOCKER ! -i docker0 -p tcp -m tcp --dport 443 {to}",
            f"-A DOCKER -d 203.0.113.5/32 ! -i docker0 -p tcp -m tcp --dport 443 {to}",
        ):
            named = f"iptables -t nat {rule}".replace("!", "'!'")
            self.assertEqual(self.verdict(jump, rule), Caught(named))

    def test_not_published(self) -> None:
        """Other ports, and rules for other interfaces, are no matter."""
        jump = "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER"
        to = "-j DNAT --to-destination 172.17.0.2:443"
        for rule in (
            f"-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8443 {to}",
            f"-A DOCKER -i docker0 -p tcp -m tcp --dport 443 {to}",
            "-A DOCKER -i docker0 -j RETURN",
        ):
            self.assertEqual(self.verdict(jump, rule), Passed())

    def test_nftables(self) -> None:
        """So it is with a rule of nft's own; source translation is no matter."""
        for statement, caught in (({"dnat": {"addr": "192.0.2.1"}}, True), ({"snat": {}}, False)):
            chain = {"family": "ip", "table": "nat", "name": "PREROUTING"}
            base = {"type": "nat", "hook": "prerouting", "prio": -100, "policy": "accept"}
            rule = {"family": "ip", "table": "nat", "chain": "PREROUTING", "handle": 7}
            objects: list[dict[str, Any]] = [
                {"table": {"family": "ip", "name": "nat"}},
                {"chain": chain | base},
                {"rule": rule | {"expr": [statement]}},
            ]
            verdict = sends_elsewhere(Firewall(nftables=objects), Visit(4, 443, "eth0"))
            self.assertEqual(isinstance(verdict, Caught), caught)

    def test_sk_lookup_refuses(self) -> None:
        """sk-lookup refuses such a host and names iptables; with --force it does not look."""
        accept_the_program(self)
        rule = "-A PREROUTING -p tcp --dport 443 -j REDIRECT --to-ports 8443"
        commands = Recorded(
            {"iptables -V": "iptables v1.8.9 (nf_tables)", NAT: f"-P PREROUTING ACCEPT\n{rule}\n"}
        )
        redirect = SkLookupRedirect(ipv6=False)
        text = str(self.failureResultOf(redirect.prepare(commands), StartError).value)
        self.assertIn(f"sent elsewhere: iptables -t nat {rule}; use --redirect iptables", text)
        forced = SkLookupRedirect(ipv6=False, force=True)
        self.assertEqual(self.successResultOf(forced.prepare(commands)), ("127.0.0.1",))
