"""Firewalls without a rule for port 21443, and what the kernel really does with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .firewalls import Firewalld, Ufw
from .netns import Namespace, Street, wait_until
from .proxy import PORT, Proxy, ends
from .website import PAGE, Website

QUICK = ("--linger", "0")

USUAL = """
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p icmp -j ACCEPT
-A INPUT -p ipv6-icmp -j ACCEPT
"""
WEB = "-A INPUT -p tcp -m multiport --dports 80,443 -j ACCEPT\n"
PROXY = f"-A INPUT -p tcp -m tcp --dport {PORT} -j ACCEPT\n"
IPTABLES = ("--redirect", "iptables")
DEFAULT_DROP = f"*filter\n:INPUT DROP [0:0]\n{USUAL}{WEB}COMMIT\n"
UNTRACKED = "*raw\n-A PREROUTING -p tcp -m tcp --dport 443 -j CT --notrack\nCOMMIT\n"

NFT_USUAL = """
ct state vmap { established : accept, related : accept, invalid : drop }
iif lo accept
meta l4proto { icmp, ipv6-icmp } accept
"""
NFT_WEB = "tcp dport { 22, 80, 443 } accept"


def _nft(rules: str, policy: str = "drop", chains: str = "") -> str:
    return (
        f"table inet firewall {{\n{chains}\nchain input {{\n"
        f"type filter hook input priority 0; policy {policy};\n{rules}\n}}\n}}\n"
    )


DROPPING = {
    "a policy": _nft(NFT_USUAL + NFT_WEB),
    "a closing drop": _nft(f"{NFT_USUAL}{NFT_WEB}\ndrop", "accept"),
    "a closing reject": _nft(f"{NFT_USUAL}{NFT_WEB}\nreject with icmpx admin-prohibited", "accept"),
    "a range": _nft(f"{NFT_USUAL}{NFT_WEB}\ntcp dport 1024-65535 reject with tcp reset", "accept"),
    "all but a port": _nft(f"{NFT_USUAL}tcp dport != {{ 22, 443 }} drop", "accept"),
    "a map": _nft(
        f"{NFT_USUAL}tcp dport vmap {{ 22 : accept, 443 : accept, 1024-65535 : jump rest }}",
        "accept",
        "chain rest {\nct state new drop\n}",
    ),
    "behind the redirect": (
        "table inet firewall {\nchain pre {\n"
        "type filter hook prerouting priority 0; policy accept;\n"
        f"iif != lo tcp dport {PORT} drop\n}}\n}}\n"
    ),
}

PASSING = {
    "no drop": _nft(NFT_USUAL + NFT_WEB, "accept"),
    "the port": _nft(f"{NFT_USUAL}tcp dport {{ 443, {PORT} }} accept"),
    "a range": _nft(f"{NFT_USUAL}tcp dport 443-30000 accept"),
    "a named set": _nft(
        f"{NFT_USUAL}tcp dport @ports accept",
        chains=f"set ports {{ type inet_service; elements = {{ 443, {PORT} }}; }}",
    ),
    "what was redirected": _nft(f"{NFT_USUAL}ct status dnat accept"),
    "a blacklist": _nft("ip saddr 203.0.113.7 drop\nip6 saddr 2001:db8:7::/48 drop", "accept"),
    "a set of banned": _nft(
        "tcp dport 443 ip saddr @banned drop",
        "accept",
        "set banned { type ipv4_addr; elements = { 203.0.113.7 }; }",
    ),
    "nonsense dropped": _nft(
        "ct state invalid drop\ntcp flags & (fin|syn) == (fin|syn) drop\n"
        "tcp flags & (fin|syn|rst|ack) != syn ct state new drop",
        "accept",
    ),
}


def _load_nft(host: Namespace, ruleset: str, directory: Path) -> None:
    rules = directory / "ruleset"
    rules.write_text(ruleset)
    host.run("nft", *(["-j"] if ruleset.startswith("{") else []), "-f", rules)


def _load_iptables(host: Namespace, rules: str, directory: Path, suffix: str = "") -> None:
    saved = directory / "rules"
    saved.write_text(rules)
    for binary in ("iptables", "ip6tables"):
        host.run(f"{binary}{suffix}-restore", saved)


def _refused(road: Street, site: Website, proxy: Proxy, *words: str) -> None:
    """Start is refused by these words, nothing has changed, and visitors are served as before."""
    host = road.host.namespace
    ruleset = ["nft", "--stateless", "list", "ruleset"]  # without the counters
    before = host.rules(), host.run(*ruleset).stdout
    refused = proxy.start(*IPTABLES, check=False)
    assert refused.returncode == os.EX_CONFIG, refused
    for word in (*words, "--force"):
        assert word in refused.stderr
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert (host.rules(), host.run(*ruleset).stdout) == before
    assert not proxy.pid_file.exists()
    assert not _steered(road, site)
    _steered_in_another_way(road, site, proxy)


def _steered_in_another_way(road: Street, site: Website, proxy: Proxy) -> None:
    """By default another way is taken, and start gives the reason."""
    done = proxy.start(*QUICK)
    assert "Steering with nftables: iptables cannot be used, because " in done.stderr
    assert _steered(road, site)
    proxy.stop(wait=True)
    assert not _steered(road, site)


def _steered(road: Street, site: Website) -> bool:
    """Whether visitors of both families, who all get the page, come through the proxy."""
    steered = set()
    for family in ("IPv4", "IPv6"):
        with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
            answer = visit.get()
        assert answer.body == PAGE
        steered.add(answer.steered)
    (same,) = steered
    return same


def _lost(road: Street) -> bool:
    """Whether visitors of both families cannot connect."""
    for family in ("IPv4", "IPv6"):
        try:
            road.visitor.namespace.connect(road.host.address(family), 443, timeout=1.5).close()
        except OSError:
            continue
        return False
    return True


@pytest.mark.parametrize("suffix", ["", "-legacy"])
def test_iptables_dropping_by_default(
    road: Street, site: Website, proxy: Proxy, tmp_path: Path, suffix: str
) -> None:
    """If INPUT accepts only port 443, C{start} refuses. A forced start loses visitors and stops by
    itself. If INPUT also accepts port 21443, visitors are steered."""
    host = road.host.namespace
    _load_iptables(host, DEFAULT_DROP, tmp_path, suffix)
    _refused(road, site, proxy, "INPUT", "sk-lookup")
    proxy.start("--force", *IPTABLES, *QUICK)
    assert _lost(road)
    wait_until(lambda: not _lost(road), "it has let go")
    assert not _steered(road, site)
    assert ends(proxy.pid)
    for binary in ("iptables", "ip6tables"):
        host.run(f"{binary}{suffix}", *PROXY.split())
    proxy.start(*IPTABLES, *QUICK)
    assert _steered(road, site)
    proxy.stop(wait=True)


@pytest.mark.parametrize("name", DROPPING)
def test_nftables_dropping(
    road: Street, site: Website, proxy: Proxy, tmp_path: Path, name: str
) -> None:
    """If rules of nftables drop redirected packets, C{start} refuses; a forced start loses
    visitors."""
    _load_nft(road.host.namespace, DROPPING[name], tmp_path)
    _refused(road, site, proxy, "inet firewall")
    proxy.start("--force", *IPTABLES, *QUICK)
    assert _lost(road)
    proxy.stop(wait=True)


@pytest.mark.parametrize("name", PASSING)
def test_nftables_passing(
    road: Street, site: Website, proxy: Proxy, tmp_path: Path, name: str
) -> None:
    """Rules of nftables that let visitors through, or drop a few: start goes well."""
    _load_nft(road.host.namespace, PASSING[name], tmp_path)
    proxy.start(*QUICK)
    assert _steered(road, site)
    proxy.stop(wait=True)


def test_exempt_from_tracking(road: Street, site: Website, proxy: Proxy, tmp_path: Path) -> None:
    """If :443 is exempt from tracking, start refuses: if forced, it would steer no visitor."""
    _load_iptables(road.host.namespace, UNTRACKED, tmp_path)
    _refused(road, site, proxy, "from connection tracking, so iptables cannot")
    proxy.start("--force", *IPTABLES, *QUICK)
    assert not _steered(road, site)
    proxy.stop(wait=True)


def test_ufw(road: Street, site: Website, proxy: Proxy, tmp_path: Path) -> None:
    """Under ufw that allows 443 start refuses, and rightly so, until 21443 is allowed, too."""
    ufw = Ufw(road.host.namespace, tmp_path)
    ufw.run("allow", "443/tcp")
    ufw.run("--force", "enable")
    _refused(road, site, proxy, "INPUT")
    proxy.start("--force", *IPTABLES, *QUICK)
    assert _lost(road)
    proxy.stop(wait=True)
    ufw.run("allow", f"{PORT}/tcp")
    proxy.start(*IPTABLES, *QUICK)
    assert _steered(road, site)
    proxy.stop(wait=True)


def test_firewalld(road: Street, site: Website, proxy: Proxy, tmp_path: Path) -> None:
    """With firewalld and only https in its zone, visitors are served, since it accepts what was
    redirected; that 21443 itself is closed does not matter."""
    firewalld = Firewalld(road.host.namespace, tmp_path)
    with firewalld.running():
        firewalld.run("--add-service", "https")
        proxy.start(*QUICK)
        assert not road.visitor.namespace.accepts(road.host.ipv4, PORT)
        assert _steered(road, site)
        proxy.stop(wait=True)
        firewalld.run("--add-port", f"{PORT}/tcp")
        proxy.start(*QUICK)
        assert _steered(road, site)
        proxy.stop(wait=True)
