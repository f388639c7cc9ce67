"""Whether visitors would be treated differently if they were steered, judged without a kernel."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from twisted.internet.defer import succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.firewall import judgement, largetables, nfchains
from acme_alpn_proxy.firewall.judgement import NFTABLES, SK_LOOKUP, Host, Surroundings, iptables
from acme_alpn_proxy.firewall.nfchains import BaseChain
from acme_alpn_proxy.firewall.nftrules import Sets, Table
from acme_alpn_proxy.firewall.packets import Packet
from acme_alpn_proxy.firewall.reading import CannotLook, Firewall
from acme_alpn_proxy.firewall.rules import Rule
from acme_alpn_proxy.firewall.xtables import BINARIES
from acme_alpn_proxy.host import facts, routes
from acme_alpn_proxy.host.routes import Address, Route
from acme_alpn_proxy.interfaces import NOT_FOUND, ICommands
from acme_alpn_proxy.options import ProxyOptions
from acme_alpn_proxy.redirects.iptables import IptablesRedirect
from acme_alpn_proxy.redirects.sklookup import SkLookupRedirect
from acme_alpn_proxy.tap import make_redirect

from .hosts import (
    ACCEPT,
    DATA,
    DROP,
    NET0,
    NFT,
    PORT,
    REDIRECT,
    Recorded,
    accept_the_program,
    arrival,
    dport,
    printed,
    recorded,
    ruleset,
    tables,
    why_not,
)

FILTER = "iptables-nft -w 5 -t filter -S"
NAT = "iptables-nft -w 5 -t nat -S"
USUAL = """
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p icmp -j ACCEPT
"""
WEB = "-A INPUT -p tcp -m tcp --dport 443 -j ACCEPT\n"
BOTH = f"-A INPUT -p tcp -m multiport --dports 443,{PORT} -j ACCEPT\n"
DNAT = iptables(PORT, keeps_address=True)
DEFAULT_DROP = f"-P INPUT DROP\n{WEB}"


def lost(rules: str, policy: str = "ACCEPT", table: str = "filter", **how: Any) -> str:
    """Why visitors would be lost that are served today, with these rules in INPUT."""
    return why_not(tables((table, f"-P INPUT {policy}\n{rules}")), **how)


def closed(rules: str) -> bool:
    """Whether visitors are lost if INPUT accepts port 443, has these rules, and drops the rest."""
    return bool(lost(WEB + rules, "DROP"))


class SameForBothTests(SynchronousTestCase):
    """What two packets of the same visitor have in common need not be known."""

    def test_no_firewall(self) -> None:
        """Without a rule, or with none that drops, visitors get through."""
        self.assertEqual(lost(""), "")
        self.assertEqual(lost(USUAL), "")

    def test_harmless(self) -> None:
        """An earlier rule that accepts both ports treats both alike, whatever its conditions."""
        for rule in (
            "-p tcp -m tcp --tcp-flags SYN SYN -m tcpmss --mss 1:500 -j DROP",
            "-p tcp -m conntrack --ctstate NEW -m tcpmss ! --mss 536:65535 -j DROP",
            "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate NEW -j DROP",
            "-p tcp -m tcp --tcp-flags FIN,SYN,RST,PSH,ACK,URG NONE -j DROP",
            "-p tcp -m connlimit --connlimit-above 80 --connlimit-mask 32 -j REJECT",
            "-p tcp -m hashlimit --hashlimit-above 9/sec --hashlimit-name h -j DROP",
            "-m recent --rcheck --seconds 3600 --name bad --mask 255.255.255.255 -j DROP",
            "-m limit --limit 5/sec -j DROP",
            "-p tcp -m ttl --ttl-lt 5 -j DROP",
            "-p tcp -m ttl --ttl-gt 100 -j DROP",
            "-m length --length 0:39 -j DROP",
            "-m length --length 1000 -j DROP",
            "-f -j DROP",
            "-s 203.0.113.7/32 -j DROP",
            "! -s 10.0.0.0/8 -j DROP",
            "-s 10.0.0.1/10.0.0.255 -j DROP",
            "-m set --match-set banned src -j REJECT --reject-with tcp-reset",
            "-m set ! --match-set friends src,src -j DROP",
            "-m iprange --src-range 192.0.2.1-192.0.2.9 -j DROP",
            "-m geoip ! --source-country DE -j DROP",
            "-m statistic --mode random --probability 0.01 -j DROP",
            "-m time --timestart 08:00 --timestop 18:00 -j DROP",
            "-m mark --mark 0x40000/0x40000 -j DROP",
            "-m connmark --mark 0x0/0xff -j DROP",
            "-m dscp --dscp 0x08 -j DROP",
            "-m policy --dir in --pol ipsec -j DROP",
            "-m physdev --physdev-in port0 -j DROP",
            "-m mac --mac-source 00:00:5e:00:53:01 -j DROP",
            '-m string --string "! -j" --algo bm -j DROP',
            "-m rt --rt-type 0 -j DROP",
            "-m addrtype --src-type LOCAL -j DROP",
            "-m conntrack --ctstate INVALID -j DROP",
            "-m conntrack --ctstatus CONFIRMED -j DROP",
            "-m conntrack --ctorigdstport 22 -j DROP",
            "-p tcp -m tcp --sport 1:1023 -j DROP",
            "-p tcp -m tcp --sport 5000 -j DROP",
            "-d 224.0.0.0/4 -j DROP",
            "-d 192.0.2.1/32 -j DROP",
            "-p tcp -m tcp --dport 22 -m bpf --bytecode x -j DROP",
            "-j NFQUEUE --queue-num 1",
            "-p tcp -m bpf --bytecode x",
        ):
            self.assertEqual(lost(f"-A INPUT {rule}\n{BOTH}", "DROP"), "", rule)

    def test_dropped_as_before(self) -> None:
        """A rule that drops both packets makes no difference. But if all visitors are dropped, that
        is a reason to refuse."""
        rules = f"{BOTH}-A INPUT -j DROP\n"
        two = [*NET0[4], arrival("net1", "192.0.2.2")]
        self.assertEqual(lost(f"-A INPUT -i net1 -j DROP\n{rules}", ways_in=two), "")
        self.assertIn("-j DROP", lost(f"-A INPUT -j DROP\n{rules}", ways_in=two))

    def test_let_in_alike(self) -> None:
        """Port 21443 may be accepted by a rule of its own, with the same conditions as for 443."""
        for match in (
            "-s 10.0.0.0/8",
            "-m set --match-set friends src",
            "-m limit --limit 9/sec --limit-burst 5",
            "-m conntrack --ctstate NEW",
            "-m mark --mark 0x1",
        ):
            rule = f"-A INPUT {match} -p tcp -m tcp --dport {{}} -j ACCEPT\n"
            self.assertEqual(lost(USUAL + rule.format(443) + rule.format(PORT), "DROP"), "", match)
        for one, other in (("-s 10.0.0.0/8", "-s 10.0.0.0/9"), ("", "-s 10.0.0.0/8")):
            rules = "".join(
                f"-A INPUT {match} -p tcp -m tcp --dport {port} -j ACCEPT\n"
                for match, port in ((one, 443), (other, PORT))
            )
            self.assertIn("-P INPUT DROP", lost(rules, "DROP"))

    def test_chain_for_each_port(self) -> None:
        """It makes no difference if each port has a separate jump to the same chain."""
        jumps = "".join(f"-A INPUT -p tcp --dport {port} -j WEB\n" for port in (443, PORT))
        chain = "-A WEB -s 203.0.113.7/32 -j DROP\n-A WEB -m limit --limit 9/sec -j ACCEPT\n"
        self.assertEqual(lost(f"-N WEB\n{jumps}{chain}", "DROP"), "")
        self.assertIn("-A WEB -p tcp", lost(f"-N WEB\n{jumps}-A WEB -p tcp --dport {PORT} -j DROP"))


class ToldApartTests(SynchronousTestCase):
    """Rules that can tell a redirected packet from a direct one."""

    def test_default_drop(self) -> None:
        """If INPUT drops by default, a rule that accepts port 443 is not enough: port 21443 must be
        accepted."""
        self.assertTrue(closed(USUAL))
        self.assertFalse(closed(f"{USUAL}-A INPUT -p tcp -m tcp --dport {PORT} -j ACCEPT\n"))

    def test_named(self) -> None:
        """The reason names the dropping rule as the command that would make it."""
        self.assertEqual(
            lost(WEB, "DROP"),
            f"the firewall would drop the IPv4 visitors after the redirect to port {PORT}: iptables"
            " -t filter -P INPUT DROP",
        )
        two_lines = f'-A INPUT -p tcp --dport {PORT} -m comment --comment "no\nmore" -j DROP\n'
        self.assertIn("'no more'", lost(two_lines))
        closing = "-A INPUT -j REJECT --reject-with icmp6-adm-prohibited"
        self.assertIn(f"ip6tables -t filter {closing}", lost(WEB + closing, family=6))

    def test_surely_let_in(self) -> None:
        """Many forms of rules can accept port 21443."""
        for rule in (
            "-p tcp -m multiport --dports 443,21000:22000 -j ACCEPT",
            "-p tcp -m multiport --ports 21443 -j ACCEPT",
            "-p tcp -m tcp --dport 1024: -j ACCEPT",
            "-p tcp -m tcp --sport 1024:65535 --dport :65535 -j ACCEPT",
            "-p tcp -m tcp ! --dport 22 -j ACCEPT",
            "-p 6 -m conntrack --ctstate NEW,ESTABLISHED -j ACCEPT",
            "-m state --state NEW,ESTABLISHED -j ACCEPT",
            "-m conntrack --ctstate DNAT -j ACCEPT",
            "-m conntrack --ctorigdstport 443 -j ACCEPT",
            "-m conntrack --ctreplsrcport 21443 -j ACCEPT",
            "-i net0 -j ACCEPT",
            "-i ne+ -j ACCEPT",
            "-i + -j ACCEPT",
            "! -i lo -j ACCEPT",
            "-s 0.0.0.0/0 -j ACCEPT",
            "-d 198.51.100.2/32 -j ACCEPT",
            "-m addrtype --dst-type LOCAL -m pkttype --pkt-type unicast -j ACCEPT",
            "-m addrtype --src-type UNICAST -j ACCEPT",
            '-m comment --comment "! -s all --of them" -j ACCEPT',
        ):
            self.assertFalse(closed(f"-A INPUT {rule}"), rule)
        self.assertEqual(lost(f"{WEB}-A INPUT -s 2000::/3 -j ACCEPT", "DROP", family=6), "")

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

    def test_drops(self) -> None:
        """A rule that drops port 21443 but not 443, or that cannot be evaluated, is a reason to
        refuse."""
        for rule in (
            "-p tcp -m tcp --dport 1024:65535 -j DROP",
            "-p tcp -m tcp ! --dport 443 -j REJECT",
            "-p tcp -m multiport --dports 8000:9000,21443 -j TARPIT",
            "-p tcp -m multiport ! --dports 22,443 -j NFQUEUE --queue-num 1",
            "-m conntrack --ctstate DNAT -j DROP",
            "-m conntrack --ctreplsrcport 1024:65535 -j DROP",
            "-m set --match-set ports dst -j DROP",
            "-m set --match-set bans src,dst -j DROP",
            "-m bpf --bytecode x -j DROP",
            "-m u32 --u32 x -j DROP",
            "-m unheard-of -j DROP",
            "-s 203.0.113.7/32 -p tcp -m tcp --dport 21443 -j DROP",
        ):
            self.assertNotEqual(lost(f"-A INPUT {rule}"), "", rule)

    def test_ban_after_the_web_server(self) -> None:
        """A ban between the rules for the two ports hits only redirected visitors."""
        rules = f"{WEB}-A INPUT -s 203.0.113.7/32 -j DROP\n{BOTH}"
        self.assertIn("203.0.113.7", lost(rules))
        self.assertEqual(lost(f"{WEB}-A INPUT -m ttl --ttl-lt 5 -j DROP\n{BOTH}"), "")

    def test_marks(self) -> None:
        """If only one of the packets is marked, that is a difference, too."""
        mark = "-A INPUT -p tcp --dport {} -j MARK --set-xmark 0x1/0xffffffff\n"
        check = "-A INPUT -m mark ! --mark 0x1 -j DROP\n"
        self.assertIn("-m mark", lost(mark.format(443) + check))
        self.assertEqual(lost(mark.format("1:65535") + check), "")

    def test_address(self) -> None:
        """REDIRECT leads to the address of the incoming interface, which may differ from the one
        that the visitor connected to."""
        ways_in = [arrival("net0", "203.0.113.5", "198.51.100.2")]
        rule = "-A INPUT ! -d 203.0.113.5/32 -j DROP\n"
        for way, reason in ((REDIRECT, "203.0.113.5"), (DNAT, ""), (SK_LOOKUP, "")):
            self.assertIn(reason, lost(rule, way=way, ways_in=ways_in))
            self.assertEqual(bool(lost(rule, way=way, ways_in=ways_in)), bool(reason))

    def test_every_interface(self) -> None:
        """Visitors may come in by more than one interface, and each is looked at."""
        rules = f"{WEB}-A INPUT -i net0 -p tcp --dport {PORT} -j ACCEPT\n"
        self.assertEqual(lost(rules, "DROP"), "")
        reason = lost(rules, "DROP", ways_in=[*NET0[4], arrival("net1", "192.0.2.2")])
        self.assertIn("would drop the IPv4 visitors that arrive at net1", reason)

    def test_other_tables(self) -> None:
        """INPUT of other tables is passed too; PREROUTING there comes before the redirect."""
        drop = f"-p tcp --dport {PORT} -j DROP"
        rules = f"-P {{0}} ACCEPT\n-A {{0}} {drop}"
        for table in ("mangle", "security"):
            self.assertTrue(why_not(tables((table, rules.format("INPUT")))))
        for table in ("raw", "mangle"):
            self.assertFalse(why_not(tables((table, rules.format("PREROUTING")))))

    def test_goto_and_return(self) -> None:
        """A goto does not come back to the rules after it; a return does."""
        back = f"-N X\n{WEB}-A INPUT -{{}} X\n-A INPUT -j ACCEPT\n-A X {{}}\n"
        for flag, rule, expected in (
            ("g", "-j LOG", True),
            ("j", "-j LOG", False),
            ("j", "-j RETURN\n-A X -j DROP", False),
            ("j", "-m bpf --bytecode x -j RETURN\n-A X -j ACCEPT", False),
            ("j", "-s 192.0.2.1/32 -j ACCEPT", False),
            ("j", f"-p tcp --dport {PORT} -j DROP", True),
        ):
            self.assertEqual(bool(lost(back.format(flag, rule), "DROP")), expected, (flag, rule))

    def test_many_bans(self) -> None:
        """Thousands of banned addresses are one question."""
        bans = "".join(f"-A INPUT -s 203.0.{n // 256}.{n % 256}/32 -j DROP\n" for n in range(5000))
        self.assertEqual(lost(bans + BOTH, "DROP"), "")
        self.assertIn("or one of the 4999 rules after it", lost(WEB + bans + BOTH, "DROP"))


class SparedTests(SynchronousTestCase):
    """Visitors that are kept out today must not be let in."""

    def spared(self, rules: str, policy: str = "ACCEPT", way: judgement.Way = REDIRECT) -> str:
        firewall = tables(("filter", f"-P INPUT {policy}\n{rules}"))
        host = Host({4: firewall}, Surroundings(NET0))
        return self.successResultOf(host.why_spared(way, Recorded({}))) or ""

    def test_ban(self) -> None:
        """A ban from port 443 alone would not hold after a redirect; it holds for ways that keep
        the port."""
        for rule in (
            "-A INPUT -s 192.0.2.66/32 -p tcp -m tcp --dport 443 -j DROP",
            "-A INPUT -p tcp -m multiport --dports 80,443 -m set --match-set f2b src -j REJECT",
            "-A INPUT -p tcp -m tcp --dport 443 -m connlimit --connlimit-above 20 -j REJECT",
        ):
            self.assertIn(rule.replace("-A", "-t filter -A"), self.spared(rule), rule)
            self.assertEqual(self.spared(rule, way=SK_LOOKUP), "")
            self.assertEqual(self.spared(rule, way=NFTABLES), "")

    def test_same_for_both(self) -> None:
        """A visitor banned from all ports stays banned, and rules that accept visitors do not
        matter."""
        for rules in (
            "-A INPUT -s 192.0.2.66/32 -j DROP",
            f"-A INPUT -s 192.0.2.66/32 -p tcp -m multiport --dports 443,{PORT} -j DROP",
            "-A INPUT -p tcp -m tcp --dport 22 -j DROP",
            "-A INPUT -m conntrack --ctstate INVALID -j DROP",
        ):
            self.assertEqual(self.spared(rules), "", rules)
        self.assertEqual(self.spared(BOTH, "DROP"), "")

    def test_redirect_alone(self) -> None:
        """If visitors can get in only through a redirect today, none of them is banned."""
        rule = "-A INPUT -m conntrack --ctstate DNAT -j ACCEPT"
        self.assertEqual(self.spared(rule, "DROP"), "")


class AnswerTests(SynchronousTestCase):
    """Answers leave from port 21443 until they are translated back."""

    def answers_lost(self, rules: str, table: str = "filter", **how: Any) -> str:
        return why_not(tables((table, f"-P OUTPUT DROP\n-P POSTROUTING ACCEPT\n{rules}")), **how)

    def test_output(self) -> None:
        """If OUTPUT accepts only port 443, answers are lost, but only with a redirect."""
        rules = "-A OUTPUT -p tcp --sport 443 -m conntrack --ctstate ESTABLISHED -j ACCEPT\n"
        reason = self.answers_lost(rules)
        self.assertIn(
            "the firewall would drop the proxy's answers to the IPv4 visitors (their source port"
            f" is {PORT})",
            reason,
        )
        self.assertIn("iptables -t filter -P OUTPUT DROP", reason)
        for way in (SK_LOOKUP, NFTABLES):
            self.assertEqual(self.answers_lost(rules, way=way), "")
        both = rules.replace("--sport 443", f"-m multiport --sports 443,{PORT}")
        self.assertEqual(self.answers_lost(both), "")

    def test_usual(self) -> None:
        """Established connections may leave; an address that is blocked is blocked in any case."""
        rules = (
            "-A OUTPUT -d 203.0.113.0/24 -j DROP\n-A OUTPUT -m state --state ESTABLISHED -j ACCEPT"
        )
        self.assertEqual(self.answers_lost(rules), "")
        rules = "-A OUTPUT -o net0 -s 198.51.100.2/32 -p tcp -j ACCEPT"
        self.assertEqual(self.answers_lost(rules), "")

    def test_owner(self) -> None:
        """With each redirect, replies come from this program and not from the web server."""
        rules = "-A OUTPUT -m owner --uid-owner www-data -j ACCEPT\n"
        for way in (REDIRECT, SK_LOOKUP, NFTABLES):
            self.assertIn("-P OUTPUT DROP", self.answers_lost(rules, way=way))
            self.assertEqual(self.answers_lost(f"{rules}-A OUTPUT -j ACCEPT", way=way), "")
        ban = "-A OUTPUT -m owner --uid-owner 1005 -j DROP\n-A OUTPUT -j ACCEPT"
        self.assertEqual(self.answers_lost(ban), "")

    def test_after_it_is_translated_back(self) -> None:
        """POSTROUTING of mangle comes before that, and that of nat does not see answers."""
        rule = f"-A POSTROUTING -p tcp --sport {PORT} -j DROP\n-A OUTPUT -j ACCEPT"
        self.assertIn("POSTROUTING", self.answers_lost(rule, "mangle"))
        self.assertEqual(self.answers_lost(rule, "nat"), "")

    def test_routes_by_mark(self) -> None:
        """If OUTPUT marks replies from port 443 and routes depend on marks, that is a reason to
        refuse."""
        rule = (
            "-A OUTPUT -p tcp --sport 443 -j MARK --set-xmark 0x1/0xffffffff\n-A OUTPUT -j ACCEPT"
        )
        self.assertEqual(self.answers_lost(rule), "")
        self.assertIn("routing rules depend on marks", self.answers_lost(rule, by_mark=[4]))

    def test_another_route(self) -> None:
        """If replies from port 443 would leave by another route than those from the proxy, the
        reason names both routes."""

        def by_source(source: Address, port: int, destination: Address) -> Route | None:
            name = "tun0" if str(source) == "203.0.113.5" else "eth0"
            return Route(name, "", (name.encode(),))

        def by_port(source: Address, port: int, destination: Address) -> Route | None:
            return Route("eth0", "192.0.2.1", (b"",)) if port == 443 else None

        ways_in = [arrival("tun0", "203.0.113.5", "10.9.0.2", "192.0.2.77")]
        for route, way, words in (
            (
                by_source,
                REDIRECT,
                "through eth0 instead of through tun0, because they come from 10.9.0.2 port",
            ),
            (by_source, DNAT, ""),
            (
                by_port,
                REDIRECT,
                "have no route instead of leaving through eth0 (gateway 192.0.2.1)",
            ),
            (by_port, DNAT, "have no route"),
            (by_port, SK_LOOKUP, ""),
        ):
            reason = why_not(Firewall(), way, ways_in=ways_in, route=route)
            self.assertIn(words, reason)
            self.assertEqual(bool(reason), bool(words))

    def test_no_route_today(self) -> None:
        """It is no reason if a visitor gets no answer today."""
        ways_in = [arrival("net0", "198.51.100.2", "198.51.100.2", "192.0.2.77")]
        reason = why_not(Firewall(), ways_in=ways_in, route=lambda *packet: None)
        self.assertEqual(reason, "")


class NftTests(SynchronousTestCase):
    def lost(self, chain: Mapping[str, Any], *exprs: Any, **more: Any) -> str:
        commands = more.pop("commands", None)
        way = more.pop("way", REDIRECT)
        base = {"hook": "input", "prio": 0, "policy": "accept", **chain}
        return why_not(Firewall(ruleset(base, *exprs, **more)), way, commands=commands)

    def test_where(self) -> None:
        """INPUT counts, and PREROUTING after the redirect; chains before the redirect do not."""
        drop = [dport(PORT), DROP]
        for chain, expected in (
            ({"hook": "input", "prio": -300}, True),
            ({"hook": "input", "prio": 0, "type": "nat"}, True),
            ({"hook": "prerouting", "prio": 10}, True),
            ({"hook": "prerouting", "prio": 10, "type": "nat"}, False),
            ({"hook": "prerouting", "prio": -150}, False),
            ({"hook": "forward", "prio": 0}, False),
        ):
            self.assertEqual(bool(self.lost(chain, drop)), expected, chain)

    def test_policy(self) -> None:
        """A policy of drop is named with its chain; one of accept lets visitors through."""
        web = [dport(443), ACCEPT]
        reason = self.lost({"policy": "drop"}, web)
        self.assertIn("the policy 'drop' of the nftables chain 'inet t c'", reason)
        self.assertEqual(self.lost({}, web), "")

    def test_other_family(self) -> None:
        """Rules of the other family do not matter."""
        drop = [dport(PORT), DROP]
        self.assertNotEqual(self.lost({"family": "ip"}, drop), "")
        self.assertEqual(self.lost({"family": "ip6"}, drop), "")
        self.assertEqual(self.lost({"family": "bridge"}, drop), "")

    def test_ports_in_every_form(self) -> None:
        """Ports in ranges, sets, maps and concatenations are compared correctly."""
        address = {"payload": {"protocol": "ip", "field": "saddr"}}
        port = {"payload": {"protocol": "tcp", "field": "dport"}}
        pair = {"concat": [address, port]}
        masked = {"match": {"op": "==", "left": {"&": [port, 1]}, "right": 1}}
        verdicts = {"set": [[443, ACCEPT], [{"range": [1024, 65535]}, DROP]]}
        some = {"prefix": {"addr": "10.0.0.0", "len": 8}}
        both = [{"concat": [some, each]} for each in (443, PORT)]
        for rules, expected in (
            ([[dport({"range": [443, 30000]}), ACCEPT], [DROP]], False),
            ([[dport({"set": [22, 443]}), ACCEPT], [DROP]], True),
            ([[dport({"set": [22, 443]}, "!="), DROP]], True),
            ([[{"vmap": {"key": port, "data": verdicts}}]], True),
            ([[{"vmap": {"key": port, "data": {"set": [[22, DROP]]}}}]], False),
            ([[masked, DROP]], True),
            (
                [[{"match": {"op": "==", "left": pair, "right": {"set": both}}}, ACCEPT], [DROP]],
                False,
            ),
            (
                [
                    [{"match": {"op": "==", "left": pair, "right": {"set": both[:1]}}}, ACCEPT],
                    [DROP],
                ],
                True,
            ),
            ([[{"match": {"op": "==", "left": pair, "right": {"set": both[1:]}}}, DROP]], True),
        ):
            self.assertEqual(bool(self.lost({}, *rules)), expected, rules)

    def test_named_set(self) -> None:
        """A set of ports is read only if it decides; a set of addresses is not read."""
        rule = [dport("@ports"), ACCEPT]
        command = "nft -j list set inet t ports"
        for elements, expected in (([22, 443, PORT], False), ([22, 443], True), (None, True)):
            ports = {"name": "ports", "type": "inet_service", "elem": elements}
            shown = {command: printed({"set": {"family": "inet", "table": "t", **ports}})}
            commands = Recorded(shown if elements else {})
            terse = {"set": [{"name": "ports", "type": "inet_service"}]}
            reason = self.lost({"policy": "drop"}, rule, commands=commands, **terse)
            self.assertEqual(bool(reason), expected, elements)
            self.assertIn(command, commands.asked)
        address = {"payload": {"protocol": "ip", "field": "saddr"}}
        ban = [{"match": {"op": "==", "left": address, "right": "@ban"}}, DROP]
        commands = Recorded({})
        terse = {"set": [{"name": "ban", "type": "ipv4_addr"}]}
        web = [dport({"set": [443, PORT]}), ACCEPT]
        self.assertEqual(self.lost({"policy": "drop"}, ban, web, commands=commands, **terse), "")
        self.assertEqual(commands.asked, [])

    def test_named_map(self) -> None:
        """A map of verdicts for ports is read, and decides with its elements."""
        key = {"payload": {"protocol": "tcp", "field": "dport"}}
        rule = [{"vmap": {"key": key, "data": "@verdicts"}}]
        terse = {"map": [{"name": "verdicts", "type": "inet_service", "map": "verdict"}]}
        for port, expected in ((22, False), (PORT, True)):
            content = {"family": "inet", "table": "t", **terse["map"][0], "elem": [[port, DROP]]}
            shown = {"nft -j list map inet t verdicts": printed({"map": content})}
            reason = self.lost({}, rule, commands=Recorded(shown), **terse)
            self.assertEqual(bool(reason), expected)
        self.assertNotEqual(self.lost({}, rule, **terse), "")

    def test_harmless(self) -> None:
        """Common properties of both packets, and named objects, make no difference."""
        web = [dport({"set": [443, PORT]}), ACCEPT]
        flags = {"payload": {"protocol": "tcp", "field": "flags"}}
        for match in (
            [{"limit": "ping"}],
            [{"quota": "q"}],
            [{"counter": "c"}, {"limit": {"rate": 9, "per": "second", "inv": True}}],
            [{"ct count": {"val": 200, "inv": True}}],
            [{"match": {"op": "==", "left": {"meta": {"key": "mark"}}, "right": 7}}],
            [{"match": {"op": "==", "left": {"meta": {"key": "hour"}}, "right": "08:00"}}],
            [{"match": {"op": "==", "left": {"numgen": {"mode": "random", "mod": 2}}, "right": 0}}],
            [{"match": {"op": "==", "left": {"osf": {"key": "name"}}, "right": "Linux"}}],
            [{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["invalid"]}}],
            [{"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "assured"}}],
            [
                {"match": {"op": "in", "left": flags, "right": "syn"}},
                {"meter": {"stmt": {"limit": {}}}},
            ],
            [dport(22), {"unheard of": 1}],
            [{"match": {"op": "==", "left": {"payload": {"base": "ll", "offset": 0}}, "right": 1}}],
        ):
            self.assertEqual(self.lost({"policy": "drop"}, [*match, DROP], web), "", match)
        self.assertEqual(self.lost({}, [{"unheard of": 1}, ACCEPT]), "")

    def test_not_understood(self) -> None:
        """A condition that is not understood may depend on the port: before a drop, that is a
        reason."""
        for statement in (
            {"unheard of": 1},
            {"xt": None},
            {"xt": {"type": "match", "name": "u32"}},
            {"match": {"op": "==", "left": {"unheard of": {"key": 1}}, "right": 1}},
            {"match": {"op": "==", "left": {"payload": {"base": "th", "offset": 0}}, "right": 1}},
            {"match": {"op": "==", "left": {"socket": {"key": "wildcard"}}, "right": 1}},
            {"limit": {"map": {"key": dport(1)["match"]["left"], "data": {"set": []}}}},
            {"match": {"op": "=="}},
        ):
            self.assertNotEqual(self.lost({}, [statement, DROP]), "", statement)
        self.assertEqual(self.lost({}, [{"xt": {"type": "match", "name": "u32"}}, ACCEPT]), "")

    def test_connection_tracking(self) -> None:
        """The translation of a packet makes a difference, its original port does not."""
        status = {"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}}
        negated = {"match": {"op": "!", "left": {"ct": {"key": "status"}}, "right": "dnat"}}
        original = {"ct": {"key": "proto-dst", "dir": "original"}}
        reply = {"ct": {"key": "proto-src", "dir": "reply"}}
        for match, expected in (
            (status, True),
            (negated, False),
            ({"match": {"op": "!=", "left": original, "right": 443}}, False),
            ({"match": {"op": "==", "left": original, "right": PORT}}, False),
            ({"match": {"op": "!=", "left": reply, "right": PORT}}, False),
            ({"match": {"op": "==", "left": reply, "right": PORT}}, True),
        ):
            self.assertEqual(bool(self.lost({}, [match, DROP], [ACCEPT])), expected, match)
        accepted = [[status, ACCEPT], [dport(443), ACCEPT], [DROP]]
        self.assertEqual(self.lost({}, *accepted), "")


class RuleTests(SynchronousTestCase):
    def test_corpus(self) -> None:
        """For each kind of rule, it is known which visitors match, what happens to them, and
        whether the rule can tell redirected visitors from others."""
        sets: dict[str, Any] = {}
        for text in (DATA / "nft-rules.jsonl").read_text().splitlines():
            line = json.loads(text)
            if "rule" not in line:
                (content,) = line.values()
                sets[content["name"]] = content.get("elem", [])
                continue
            rules = Table("inet t", Sets(sets)).rules({"chain": "c", "handle": 1, **line})
            apart = False
            for family, (way_in,) in NET0.items():
                steered = Packet(
                    family, "net0", way_in.dialled, PORT, way_in.dialled, True, "proxy"
                )
                direct = replace(steered, port=443, translated=False, owner="server")
                read, questions = self.read(rules, steered)
                apart = apart or (read, questions) != self.read(rules, direct)
                self.assertEqual(read, line[f"ipv{family}"], (line["rule"], family))
            self.assertEqual(apart, line.get("tells_apart", False), line["rule"])

    def read(self, rules: list[Rule], packet: Packet) -> tuple[str, object]:
        """The rule that matches with the fewest unknown conditions."""
        if not rules:
            return "all continue", []
        found = [(rule.matches(packet), rule.action.value) for rule in rules]
        for questions, action in sorted(found, key=lambda each: each[0] is None or len(each[0])):
            if questions is not None:
                return f"{'some' if questions else 'all'} {action}", questions
        return f"none {found[-1][1]}", []


class TrackingTests(SynchronousTestCase):
    def exempt(self, *rules: str, hook: str = "PREROUTING") -> str:
        listing = f"-P {hook} ACCEPT\n" + "".join(f"-A {hook} {rule}\n" for rule in rules)
        return why_not(tables(("raw", listing)))

    def test_iptables(self) -> None:
        """If :443 is exempt from tracking, no visitor is redirected."""
        https = "-p tcp -m tcp --dport 443"
        self.assertTrue(self.exempt(f"{https} -j NOTRACK"))
        self.assertTrue(self.exempt(f"{https} -j CT --notrack"))
        self.assertFalse(self.exempt(f"{https} -j CT --helper ftp"))
        self.assertFalse(self.exempt("-p tcp -m tcp --dport 53 -j NOTRACK"))
        self.assertFalse(self.exempt(f"-s 192.0.2.1/32 {https} -j NOTRACK"))
        self.assertFalse(self.exempt("-j ACCEPT", f"{https} -j NOTRACK"))

    def test_answers(self) -> None:
        """If replies from port 21443 are exempt from tracking, they are not translated back: a
        reason to refuse. For replies from port 443 it is no reason."""
        self.assertIn("the answers", self.exempt("-p tcp --sport 21443 -j NOTRACK", hook="OUTPUT"))
        self.assertFalse(self.exempt("-p tcp --sport 443 -j NOTRACK", hook="OUTPUT"))

    def test_nft(self) -> None:
        """If a rule of nft, in a chain before connection tracking, exempts visitors from tracking,
        they are not redirected."""
        for priority, expected in ((-300, True), (-150, False)):
            chain = {"hook": "prerouting", "prio": priority}
            firewall = Firewall(ruleset(chain, [{"notrack": None}]))
            self.assertEqual(bool(why_not(firewall)), expected, priority)
            self.assertEqual(why_not(firewall, SK_LOOKUP), "")

    def test_drops_nobody(self) -> None:
        """An exemption from tracking does not count as a drop."""
        self.assertEqual(lost("-A INPUT -j NOTRACK"), "")


class FirstTests(SynchronousTestCase):
    """Of several translations the first one decides, across tables."""

    TAKES = (dport(443), {"redirect": {"port": 8443}})

    def chain(self, priority: int, handle: int = 5, *rule: Any) -> list[dict[str, Any]]:
        base = {"hook": "prerouting", "prio": priority, "type": "nat", "handle": handle}
        return ruleset(base, list(rule or self.TAKES))

    def own(self, handle: int, *rules: Any) -> list[dict[str, Any]]:
        base = {"family": "ip", "table": "nat", "hook": "prerouting", "prio": -100, "type": "nat"}
        objects = ruleset({**base, "handle": handle}, *rules)
        for each in objects:
            for content in each.values():
                for key in ("name", "chain"):
                    if content.get(key) == "c":
                        content[key] = "PREROUTING"
        return objects

    def test_priority(self) -> None:
        """A chain of lower priority comes before iptables' one; one of higher priority after."""
        for priority, expected in ((-110, True), (-101, True), (-100, False), (-90, False)):
            reason = why_not(Firewall(self.chain(priority)))
            self.assertEqual(bool(reason), expected, priority)
        self.assertIn(
            "a rule sends the IPv4 visitors to another port or host, before the proxy's rule: the"
            " rule with handle 0 (redirect) of the nftables chain 'inet t c'",
            why_not(Firewall(self.chain(-110))),
        )

    def test_same_priority(self) -> None:
        """Of equal priority the one that was made last comes first."""
        for handle, expected in ((4, True), (6, False)):
            firewall = Firewall([*self.chain(-100), *self.own(handle)])
            self.assertEqual(bool(why_not(firewall)), expected, handle)

    def test_legacy(self) -> None:
        """If both variants of iptables have rules, the order between them is unknown."""
        rule = "-A PREROUTING -p tcp --dport 443 -j DNAT --to-destination 172.17.0.2:443"
        legacy = tables(("nat", f"-P PREROUTING ACCEPT\n{rule}\n"), legacy=True)
        self.assertEqual(why_not(legacy), "")
        both = Firewall(self.own(4), iptables=legacy.iptables)
        self.assertIn(rule, why_not(both))
        self.assertEqual(why_not(legacy, legacy=True), "")
        foreign = Firewall(self.chain(-100), iptables=[("nat", "-P PREROUTING ACCEPT\n", True)])
        self.assertIn("'inet t c'", why_not(foreign, legacy=True))

    def test_own_chain(self) -> None:
        """Rules in the chain that gets our rule as its first one do not come first."""
        self.assertEqual(why_not(Firewall(self.own(4, list(self.TAKES)))), "")

    def test_harmless(self) -> None:
        """Other ports, visitors of one network, and the absence of translation do not matter."""
        source = {"payload": {"protocol": "ip", "field": "saddr"}}
        some = {"match": {"op": "==", "left": source, "right": "10.0.0.9"}}
        for rule in (
            (dport(8443), {"redirect": {"port": 1}}),
            (some, *self.TAKES),
            (dport(443), ACCEPT),
            (dport(443), {"masquerade": None}),
        ):
            self.assertEqual(why_not(Firewall(self.chain(-110, 5, *rule))), "", rule)

    def test_sk_lookup(self) -> None:
        """A translation in any chain takes visitors away from sk-lookup."""
        for priority in (-110, -100, 50):
            self.assertIn(
                "to another port or host: ", why_not(Firewall(self.chain(priority)), SK_LOOKUP)
            )

    def test_nftables(self) -> None:
        """A table of its own comes right before those of equal priority."""
        for priority, expected in ((-110, True), (-101, False), (-100, False)):
            reason = why_not(Firewall(self.chain(priority)), NFTABLES)
            self.assertEqual(bool(reason), expected, priority)

    def test_own_table(self) -> None:
        """The table that this program itself makes does not count; a table of another program
        does."""
        pinned = [dport(443), {"dnat": {"port": 443}}]
        for table, expected in (("acme_alpn_proxy", False), ("another", True)):
            base = {"table": table, "hook": "prerouting", "prio": -101, "type": "nat"}
            reason = why_not(Firewall(ruleset(base, pinned)), SK_LOOKUP)
            self.assertEqual(bool(reason), expected, table)

    def not_first(self, firewall: Firewall) -> str:
        return Host({4: firewall}, Surroundings(NET0)).not_first(REDIRECT) or ""

    def test_while_steering(self) -> None:
        """While the proxy steers, a rule before ours is reported. Our own rule is not."""
        ours = [dport(443), {"redirect": {"port": PORT}}]
        takes = list(self.TAKES)
        self.assertEqual(self.not_first(Firewall(self.own(4, ours, takes))), "")
        self.assertIn("rule with handle 0", self.not_first(Firewall(self.own(4, takes, ours))))
        younger = Firewall([*self.own(4, ours), *self.chain(-100, 5)])
        self.assertIn("'inet t c'", self.not_first(younger))
        older = Firewall([*self.own(6, ours), *self.chain(-100, 5)])
        self.assertEqual(self.not_first(older), "")
        listing = (
            "-P PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 443 -j {} --to-ports {}\n"
            f"-A PREROUTING -p tcp --dport 443 -j REDIRECT --to-ports {PORT}\n"
        )
        for port, expected in ((8443, True), (PORT, False)):
            own = tables(("nat", listing.format("REDIRECT", port)))
            self.assertEqual(bool(self.not_first(own)), expected)


class ElsewhereTests(SynchronousTestCase):
    """Whether :443 is published by a container engine, so that sk-lookup never sees it."""

    def verdict(self, *nat: str) -> str:
        listing = "\n".join(["-P PREROUTING ACCEPT", "-N DOCKER", *nat])
        return why_not(tables(("nat", listing)), SK_LOOKUP)

    def test_published(self) -> None:
        """A port published as Docker does it is named, also if only for one of the host's
        addresses."""
        jump = "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER"
        to = "-j DNAT --to-destination 172.17.0.2:443"
        for rule in (
            f"-A DOCKER ! -i docker0 -p tcp -m tcp --dport 443 {to}",
            f"-A DOCKER -d 198.51.100.2/32 ! -i docker0 -p tcp -m tcp --dport 443 {to}",
        ):
            named = f"iptables -t nat {rule}".replace("!", "'!'")
            self.assertTrue(self.verdict(jump, rule).endswith(named))

    def test_not_published(self) -> None:
        """Other ports, addresses that are not here, and other interfaces do not matter."""
        jump = "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER"
        to = "-j DNAT --to-destination 172.17.0.2:443"
        for rule in (
            f"-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8443 {to}",
            f"-A DOCKER -d 203.0.113.5/32 -p tcp -m tcp --dport 443 {to}",
            f"-A DOCKER -i docker0 -p tcp -m tcp --dport 443 {to}",
            "-A DOCKER -i docker0 -j RETURN",
        ):
            self.assertEqual(self.verdict(jump, rule), "")


class HostCase(SynchronousTestCase):
    """A host that is described only by the output of its commands."""

    def setUp(self) -> None:
        self.legacy: list[str] = []
        self.chains: list[BaseChain] = []
        self.patch(facts, "legacy_tables", lambda family: self.legacy)
        self.patch(facts, "unnumbered_interfaces", lambda family: [])
        self.patch(nfchains, "base_chains", lambda: self.chains)
        self.patch(judgement, "arrivals", lambda family: NET0[family])
        self.patch(routes, "route", lambda *packet: None)
        self.patch(routes, "routes_by_mark", lambda family: False)


class LookTests(HostCase):
    def reason(self, commands: Recorded, *families: int) -> str:
        """Why visitors would not get to the proxy, or nothing."""
        host: Host = self.successResultOf(judgement.look(commands, families or (4,)))
        return self.successResultOf(host.why_not(REDIRECT, commands)) or ""

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
        self.assertIn("after the redirect to port 21443: ", self.reason(recorded("ufw")))
        self.assertEqual(self.reason(recorded("ufw-with-port")), "")

    def test_ufw_without_nft(self) -> None:
        """The verdicts on ufw are the same without the program nft."""
        self.chains = [BaseChain("ip", "filter", "INPUT", "filter", "input", 0)]
        for name, policy in (("ufw", "iptables -t filter -P INPUT DROP"), ("ufw-with-port", "")):
            commands = recorded(name)
            del commands.answers[NFT]
            self.assertIn(policy, self.reason(commands))
            self.assertEqual(bool(self.reason(commands)), bool(policy))

    def test_firewalld(self) -> None:
        """With firewalld, visitors get through: it accepts what was redirected before."""
        for family in (4, 6):
            self.assertEqual(self.reason(recorded("firewalld"), family), "")

    def test_firewalld_without_that(self) -> None:
        """Without this rule of firewalld, visitors get in only if the port is added to the zone."""
        for name, open_ in (("firewalld", False), ("firewalld-with-port", True)):
            commands = recorded(name)
            objects = json.loads(commands.answers[NFT])["nftables"]  # type: ignore[arg-type]
            kept = [each for each in objects if '"status"' not in json.dumps(each)]
            self.assertLess(len(kept), len(objects))
            commands.answers[NFT] = json.dumps({"nftables": kept})
            self.assertEqual(self.reason(commands) == "", open_, name)

    def test_docker(self) -> None:
        """Docker's rules do no harm."""
        self.assertEqual(self.reason(recorded("docker")), "")

    def test_not_translated(self) -> None:
        """If iptables cannot show its own extensions, their conditions count as unknown."""
        mixed = (1, "table `filter' is incompatible, use 'nft' tool.")
        for listing in ((NOT_FOUND, ""), (3, "no such table"), mixed, "-P INPUT DROP\n"):
            commands = recorded("ufw-with-port")
            commands.answers[FILTER] = listing
            self.assertIn("of the nftables chain 'ip filter ", self.reason(commands))

    def test_legacy(self) -> None:
        """The tables of the legacy iptables are read, whether the program is called iptables or
        iptables-legacy."""
        self.legacy = ["filter"]
        for binary in ("iptables-legacy", "iptables"):
            listing = {f"{binary} -w 5 -t filter -S": DEFAULT_DROP}
            self.assertIn("iptables -t filter -P INPUT DROP", self.reason(Recorded(listing)))

    def test_legacy_not_seen(self) -> None:
        """If only iptables-nft is installed and warns of legacy tables, the reason to refuse is
        that iptables-legacy is missing."""
        self.legacy = ["filter"]
        warning = "# Warning: iptables-legacy tables present, use iptables-legacy to see them\n"
        commands = Recorded({"iptables -w 5 -t filter -S": f"-P INPUT ACCEPT\n{warning}"})
        self.assertIn("iptables-legacy is missing", self.reason(commands))

    def test_untracked(self) -> None:
        """If visitors are exempt from tracking, the reason says so."""
        self.legacy = ["raw"]
        listing = "-P PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 443 -j NOTRACK\n"
        reason = self.reason(Recorded({"iptables-legacy -w 5 -t raw -S": listing}))
        self.assertIn("from connection tracking", reason)

    def test_both_families(self) -> None:
        """Each family is checked; a command that shows both families is run once."""
        self.legacy = ["filter"]
        commands = Recorded(
            {
                NFT: "",
                "iptables-legacy -w 5 -t filter -S": "-P INPUT ACCEPT\n",
                "ip6tables-legacy -w 5 -t filter -S": DEFAULT_DROP,
            }
        )
        self.assertEqual(self.reason(commands, 4), "")
        self.assertIn("would drop the IPv6 visitors", self.reason(commands, 6))
        commands.asked.clear()
        self.assertIn("would drop the IPv6 visitors", self.reason(commands, 4, 6))
        self.assertEqual(commands.asked.count(NFT), 1)

    def test_set_of_both_families(self) -> None:
        """A set that decides for both families is read once."""
        terse = {"set": [{"name": "ports", "type": "inet_service"}]}
        base = {"hook": "input", "prio": 0, "policy": "drop"}
        rules = ruleset(base, [dport("@ports"), ACCEPT], **terse)
        content = {"family": "inet", "table": "t", "name": "ports", "elem": [443, PORT]}
        shown = "nft -j list set inet t ports"
        commands = Recorded({NFT: printed(*rules), shown: printed({"set": content})})
        self.assertEqual(self.reason(commands, 6, 4), "")
        self.assertEqual(commands.asked.count(shown), 1)

    def test_family_that_nobody_uses(self) -> None:
        """If a firewall drops all visitors of one family, those of the other are steered."""
        self.legacy = ["filter"]
        commands = Recorded(
            {
                "iptables-legacy -w 5 -t filter -S": "-P INPUT ACCEPT\n",
                "ip6tables-legacy -w 5 -t filter -S": "-P INPUT DROP\n",
            }
        )
        self.assertEqual(self.reason(commands, 6, 4), "")
        self.assertIn("would drop the IPv6 visitors", self.reason(commands, 6))


class ReadingTests(HostCase):
    """Reading the firewall never fails for a harmless reason."""

    AGENT = BaseChain("inet", "agent", "input", "filter", "input", 0)

    def look(self, answers: Mapping[str, Any], way: judgement.Way = REDIRECT) -> str:
        self.commands = Recorded(answers)
        host: Host = self.successResultOf(judgement.look(self.commands, (4,)))
        return self.successResultOf(host.why_not(way, self.commands)) or ""

    def test_old_nft(self) -> None:
        """An nft without the terse listing is asked for the full one."""
        rules = ruleset({"hook": "input", "prio": 0}, [dport(PORT), DROP])
        answers = {NFT: (1, "invalid option -- 't'"), "nft -j list ruleset": printed(*rules)}
        self.assertIn("'inet t c'", self.look(answers))

    def test_no_nft(self) -> None:
        """If no program can show some rules of nftables, a redirect that these rules could affect
        is refused, and other redirects are not."""
        self.chains = [self.AGENT]
        reason = self.look({})
        self.assertIn(
            "this is assumed, because the rules of the chain 'inet agent input' cannot be read: ",
            reason,
        )
        self.assertIn(
            "nft: not found on PATH", self.look({NFT: (NOT_FOUND, "nft: not found on PATH")})
        )
        self.assertEqual(self.look({}, SK_LOOKUP), "")
        self.chains = [BaseChain("inet", "agent", "forward", "filter", "forward", 0)]
        self.assertEqual(self.look({}), "")

    def test_table_that_cannot_be_read(self) -> None:
        """A table with a broken listing is named; the others are read one by one."""
        other = BaseChain("inet", "t", "c", "filter", "input", 0)
        self.chains = [self.AGENT, other]
        rules = ruleset({"hook": "input", "prio": 0}, [dport(PORT), DROP])
        answers: dict[str, Any] = {
            NFT: '{"nftables": [{"table": {"fam"',
            "nft -j -t list table inet t": printed(*rules),
        }
        self.assertIn("inet", self.look(answers))
        answers["nft -j -t list table inet agent"] = printed()
        self.assertIn("chain 'inet t c'", self.look(answers))
        answers["nft -j -t list table inet t"] = printed()
        self.assertEqual(self.look(answers), "")
        for broken in (
            "surprise",
            '{"nftables": [{"table": {}}]}',
            "[]",
            (1, "unknown expression"),
        ):
            answers["nft -j -t list table inet agent"] = broken
            self.assertIn("'inet agent input' cannot be read", self.look(answers))
        self.chains = []
        self.assertEqual(self.look({NFT: "surprise"}), "")

    def test_large_table(self) -> None:
        """A large table that treats all packets of a visitor alike is not listed, others are."""
        large = replace(self.AGENT, rules=40_000)
        small = BaseChain("inet", "t", "c", "filter", "input", 0, 1)
        self.chains = [large, small]
        self.patch(largetables, "_generation", lambda: 1)
        rules = ruleset({"hook": "input", "prio": 0}, [dport(PORT), DROP])
        shown = {NFT: printed(*rules), "nft -j -t list table inet t": printed(*rules)}
        for apart, hook, asked in (
            (False, "input", "nft -j -t list table inet t"),
            (True, "input", NFT),
            (False, "output", NFT),
        ):
            self.chains[0] = replace(large, hook=hook)
            self.patch(largetables, "_is_alike", lambda table, apart=apart: not apart)
            self.assertIn("'inet t c'", self.look(shown))
            self.assertEqual(self.commands.asked[0], asked)

    def test_not_permitted(self) -> None:
        """If neither nft nor the kernel may be asked, the error says so."""

        def refuse() -> list[BaseChain]:
            raise PermissionError

        self.patch(nfchains, "base_chains", refuse)
        looked = judgement.look(Recorded({NFT: (1, "no permission")}), (4,))
        problem = self.failureResultOf(looked, CannotLook).value
        self.assertIn(f"'{NFT}' failed with status 1: no permission", str(problem))
        self.assertEqual(self.look({}), "")

    def test_no_netlink(self) -> None:
        """If the kernel does not report the ways in, the error says so."""

        def refuse(family: int) -> None:
            raise OSError(97, "Address family not supported by protocol")

        self.patch(judgement, "arrivals", refuse)
        problem = self.failureResultOf(judgement.look(Recorded({}), (4,)), CannotLook).value
        self.assertIn(
            "addresses and routes from the kernel: Address family not supported", str(problem)
        )

    def test_comment_in_latin_1(self) -> None:
        """Bytes that are not UTF-8 break nothing, and are escaped in the output."""
        comment = b"B\xfcro".decode("utf-8", "surrogateescape")
        rule = f'-A INPUT -p tcp --dport {PORT} -m comment --comment "{comment}" -j DROP\n'
        self.assertIn("B\\xfcro", lost(rule))
        rules = ruleset({"hook": "input", "prio": 0}, [dport(22), ACCEPT])
        for each in rules:
            if "rule" in each:
                each["rule"]["comment"] = comment
        text = json.dumps({"nftables": rules}, ensure_ascii=False)
        self.assertEqual(self.look({NFT: text}), "")

    def test_iptables_that_fails(self) -> None:
        """If a table of iptables cannot be listed, its rules count as unknown."""
        self.legacy = ["filter"]
        locked = {"iptables-legacy -w 5 -t filter -S": (4, "the lock\nis held")}
        reason = self.look(locked)
        self.assertIn("-t filter -S' failed with status 4: the lock is held", reason)
        self.assertEqual(self.look(locked, SK_LOOKUP), "")
        self.legacy = ["nat"]
        locked = {"iptables-legacy -w 5 -t nat -S": (4, "the lock\nis held")}
        self.assertIn("status 4", self.look(locked, SK_LOOKUP))


class RefusalTests(HostCase):
    def test_refused(self) -> None:
        """A refused start names the rule that would drop visitors and the remedy, and changes
        nothing."""
        for may, remedy, status in (
            (True, "accept connections to port 21443, too \\(--force skips", os.EX_CONFIG),
            (False, "run this as root \\(in a container: with CAP_NET_ADMIN", os.EX_NOPERM),
        ):
            self.patch(facts, "may_administer_network", lambda may=may: may)
            attempt = IptablesRedirect(PORT, ipv6=False).prepare(recorded("ufw"))
            problem: Any = self.failureResultOf(attempt, StartError).value
            self.assertRegex(str(problem), f"'ip filter INPUT'.*; {remedy}")
            self.assertEqual(problem.status, status)

    def test_either_family(self) -> None:
        """Lost visitors of one family are enough for a refusal, with either redirect."""
        self.patch(facts, "has_ipv6", lambda: True)
        accept_the_program(self)
        elsewhere = "-P PREROUTING ACCEPT\n-A PREROUTING -p tcp -j DNAT --to-destination :80\n"
        for redirect, table, rules in (
            (IptablesRedirect(PORT), "filter", DEFAULT_DROP),
            (SkLookupRedirect(), "nat", elsewhere),
        ):
            self.legacy = [table]
            for family, binary in BINARIES.items():
                each = f"{{}}-legacy -w 5 -t {table} -S"
                harmless = {each.format(other): "-P INPUT ACCEPT\n" for other in BINARIES.values()}
                commands = Recorded({**harmless, each.format(binary): rules})
                problem: Any = self.failureResultOf(redirect.prepare(commands), StartError).value
                self.assertIn(f"IPv{family} visitors ", str(problem))

    def test_forced(self) -> None:
        """With --force, nothing is read."""
        options = ProxyOptions()
        options.environment = {"ACME_ALPN_PROXY_DISABLEV6": "y"}
        options.parseOptions(["--force"])
        commands = recorded("ufw")
        self.successResultOf(make_redirect(options).prepare(commands))

    def test_sk_lookup_refuses(self) -> None:
        """sk-lookup refuses where :443 is sent elsewhere; with --force it does not look."""
        accept_the_program(self)
        self.chains = [BaseChain("ip", "nat", "PREROUTING", "nat", "prerouting", -100)]
        rule = "-A PREROUTING -p tcp --dport 443 -j REDIRECT --to-ports 8443"
        commands = Recorded({"iptables -V": "nf_tables", NAT: f"-P PREROUTING ACCEPT\n{rule}\n"})
        redirect = SkLookupRedirect(ipv6=False)
        text = str(self.failureResultOf(redirect.prepare(commands), StartError).value)
        self.assertIn(f"another port or host: iptables -t nat {rule}; remove that rule", text)
        forced = SkLookupRedirect(ipv6=False, force=True)
        self.assertEqual(self.successResultOf(forced.prepare(commands)), ("127.0.0.1:0",))

    def test_keeping_the_address(self) -> None:
        """If only the address of the answers is wrong, the remedy is the rule that keeps it."""
        ways_in = [arrival("tun0", "203.0.113.5", "10.9.0.2", "192.0.2.77")]

        def by_source(source: Address, port: int, destination: Address) -> Route:
            return Route("tun0", "", (str(source).encode(),))

        around = Surroundings({4: ways_in}, route=by_source)
        host = Host({4: Firewall()}, around)
        self.patch(judgement, "look", lambda commands, families: succeed(host))
        attempt = IptablesRedirect(PORT, ipv6=False).prepare(Recorded({}))
        text = str(self.failureResultOf(attempt, StartError).value)
        self.assertRegex(
            text, "; set ACME_ALPN_PROXY_RULESPEC='.*--to-destination :21443.*'.*--force"
        )
