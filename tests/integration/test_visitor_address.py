"""Which addresses the web server sees while visitors are steered."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from .apache import Apache
from .netns import Namespace, Node, Street, container, family_of, wait_until
from .proxy import Proxy, ends, kill, no_way_back_is_left, way_back
from .website import PAGE, Answer, Website, website

REDIRECTS = ("iptables", "nftables", "sk-lookup")
FAMILIES = ("IPv4", "IPv6")
all_redirects = pytest.mark.parametrize("redirect", REDIRECTS)


def start(proxy: Proxy, *options: str) -> None:
    """Start with a short linger, and only if the web server will see the visitors' addresses."""
    proxy.start("--linger", "1", "--visitor-address", "require", *options)


def visit(site: Website, visitor: Node, address: str) -> Answer:
    """Get the page as a new visitor."""
    with site.visit(visitor.namespace, address) as visit:
        answer = visit.get()
    assert answer.body == PAGE
    return answer


def is_seen(site: Website, road: Street, family: str) -> bool:
    """Whether the web server sees the address of a new visitor, who is steered."""
    answer = visit(site, road.visitor, road.host.address(family))
    assert answer.steered
    return answer.seen_from == road.visitor.address(family)


def counted(proxy: Proxy) -> tuple[int, int]:
    """How many connections the web server has seen from a visitor's address, and how many from an
    address of the host."""
    (instance,) = json.loads(proxy.run("status", "--json").stdout)["instances"]
    fallback: dict[str, Any] = instance["routes"]["fallback"]
    return fallback["from_visitor_address"], fallback["from_host_address"]


@pytest.mark.parametrize("server", [Website, Apache], ids=["nginx", "Apache"])
@all_redirects
def test_access_log(road: Street, tmp_path: Path, redirect: str, server: type[Website]) -> None:
    """The logs of nginx and of Apache have the visitors' addresses, IPv4 and IPv6, with each
    redirect and without a change of their configuration."""
    with website(road.host.namespace, tmp_path / "site", kind=server) as site:
        proxy = Proxy(road.host.namespace, tmp_path)
        start(proxy, "--redirect", redirect)
        for family in FAMILIES:
            with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
                assert visit.ask("/").read() == PAGE
        assert counted(proxy) == (2, 0)
        log = site.directory / "access.log"
        wait_until(lambda: log.read_text().count("\n") == 2, "both visits are in the log")
        assert [line.split()[0] for line in log.read_text().splitlines()] == [
            road.visitor.address(family) for family in FAMILIES
        ]
        proxy.stop(wait=True)
        no_way_back_is_left(road.host.namespace)


@all_redirects
def test_ban_of_the_web_server(road: Street, site: Website, proxy: Proxy, redirect: str) -> None:
    """A visitor that nginx bans by address (C{deny}) is banned, steered or not, and others
    are not."""
    visitor = road.visitor.namespace
    visitor.ip("address add 10.88.0.3/24 dev net0")
    visitor.ip("address add fd88::3/64 dev net0 nodad")
    others = {"IPv4": "10.88.0.3", "IPv6": "fd88::3"}

    def status(source: str, address: str) -> int:
        connection = visitor.new_socket(family_of(address))
        connection.settimeout(10)
        connection.bind((source, 0))
        connection.connect((address, 443))
        with closing(site.visit_on(connection)) as visit:
            return visit.request_of("/banned/").status

    def judged() -> list[tuple[int, int]]:
        return [
            (
                status(road.visitor.address(family), road.host.address(family)),
                status(others[family], road.host.address(family)),
            )
            for family in FAMILIES
        ]

    assert judged() == [(403, 200)] * 2
    start(proxy, "--redirect", redirect)
    assert judged() == [(403, 200)] * 2
    assert counted(proxy) == (4, 0)
    proxy.stop(wait=True)


@pytest.mark.parametrize("filtering", [0, 1, 2])
def test_reverse_path_filter(road: Street, site: Website, proxy: Proxy, filtering: int) -> None:
    """The answers pass with each setting of the reverse path filter."""
    for name in ("all", "default", "net0", "lo"):
        setting = f"net.ipv4.conf.{name}.rp_filter={filtering}"
        road.host.namespace.run("sysctl", "-qw", setting)
    start(proxy)
    assert all(is_seen(site, road, family) for family in FAMILIES)
    proxy.stop(wait=True)


def test_vpn_with_rules(road: Street, site: Website, proxy: Proxy) -> None:
    """Rules such as wg-quick's, with a VPN that takes the default route, make no difference."""
    host = road.host.namespace
    host.ip("tuntap add dev wg0 mode tun")
    host.ip("address add 10.9.0.2/32 dev wg0")
    host.ip("address add fd99::2/128 dev wg0 nodad")
    host.ip("link set wg0 up")
    for family in ("-4", "-6"):
        host.ip(f"{family} route add default dev wg0 table 51820")
        host.ip(f"{family} rule add not fwmark 51820 table 51820")
        host.ip(f"{family} rule add table main suppress_prefixlength 0")
    before = host.ip("rule show"), host.ip("-6 rule show")
    start(proxy)
    assert all(is_seen(site, road, family) for family in FAMILIES)
    proxy.stop(wait=True)
    assert (host.ip("rule show"), host.ip("-6 rule show")) == before


def test_masqueraded_network(road: Street, site: Website, proxy: Proxy) -> None:
    """If NAT masquerades a connection from a visitor's address, as with visitors from containers,
    the proxy connects from the host's address after 0.3 s, and the next time at once. Other
    visitors are not affected."""
    host = road.host.namespace
    with container(host) as inside:
        host.run("iptables", "-t", "nat", "-F", "PREROUTING")  # it publishes nothing
        rule = "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE"
        host.run("iptables", "-t", "nat", *rule.split())
        start(proxy, "--redirect", "nftables")
        seconds = []
        for _ in range(2):
            began = time.monotonic()
            answer = visit(site, inside, "172.17.0.1")
            assert (answer.steered, answer.seen_from) == (True, "127.0.0.1")
            seconds.append(time.monotonic() - began)
        assert seconds[0] >= 0.3 > seconds[1], seconds
        assert is_seen(site, road, "IPv4")
        assert counted(proxy) == (1, 2)
        assert "The web server's answer to 172.17.0.2 does not reach the proxy" in proxy.log
        proxy.stop(wait=True)
        no_way_back_is_left(host)


@pytest.mark.parametrize("end", ["stop", "SIGKILL"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_instances(road: Street, site: Website, proxy: Proxy, family: str, end: str) -> None:
    """While one instance drains, another one steers; the end of one does not affect the other."""
    address = road.host.address(family)
    start(proxy)
    old = proxy.pid
    with site.visit(road.visitor.namespace, address) as older:
        assert older.get().steered
        proxy.stop()
        start(proxy)
        with site.visit(road.visitor.namespace, address) as younger:
            assert younger.get().seen_from == road.visitor.address(family)
            if end == "stop":
                proxy.stop()
                younger.close()
                assert ends(proxy.pid)
                assert older.get().seen_from == road.visitor.address(family)
            else:
                kill(old)
                assert younger.get().seen_from == road.visitor.address(family)
                assert is_seen(site, road, family)
                proxy.stop()
    assert ends(old)
    assert ends(proxy.pid)
    no_way_back_is_left(road.host.namespace)


@pytest.mark.parametrize("command", ["start", "stop", "check"])
def test_rule_of_a_killed_instance(road: Street, site: Website, proxy: Proxy, command: str) -> None:
    """If the proxy is killed together with its sweeper, a routing rule with an empty table is left.
    C{check} shows it, and the next C{start} or C{stop} removes it. Rules of others stay."""
    host = road.host.namespace
    host.ip("rule add pref 1 from 198.51.100.9 lookup 7")
    start(proxy, "--redirect", "sk-lookup")
    assert len(way_back(host)) == 5, "a device, a rule, its route, and two routes by IPv6"
    kill(proxy.sweeper)
    proxy.kill()
    wait_until(lambda: len(way_back(host)) == 1, "device and routes are gone", 1)
    (rule,) = way_back(host)
    table = rule.rpartition(" ")[2]
    assert host.run("ip", "route", "show", "table", table, check=False).stdout == ""
    assert [visit(site, road.visitor, road.host.ipv4).steered] == [False]
    if command == "start":
        start(proxy, "--redirect", "sk-lookup")
        assert is_seen(site, road, "IPv4")
        proxy.stop(wait=True)
    elif command == "stop":
        assert "removed 1 rule of a killed instance" in proxy.run("stop").stderr
    else:
        told = proxy.run("check", "--logfile", str(proxy.log_file)).stdout
        assert "a killed instance has left 1 rule" in told
        proxy.run("stop")
    no_way_back_is_left(host)
    assert "198.51.100.9" in host.ip("rule show")


def _translated_to_loopback(host: Namespace) -> None:
    host.run("sysctl", "-qw", "net.ipv4.conf.net0.route_localnet=1")
    rule = "-A PREROUTING -i net0 -p tcp --dport 8443 -j DNAT --to-destination 127.0.0.1:443"
    host.run("iptables", "-t", "nat", *rule.split())


def _dropped(host: Namespace) -> None:
    host.run("iptables", "-A", "INPUT", "-i", "lo", "!", "-s", "127.0.0.0/8", "-j", "DROP")


WITHOUT_TUN = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh")
WITHOUT_ADMIN = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")


@pytest.mark.parametrize(
    ("prepare", "wrapper", "options", "status", "cause"),
    [
        (None, (), ["--fallback", "10.88.0.1:443"], os.EX_CONFIG, "no numeric loopback address"),
        (None, (), ["--fallback", "localhost:443"], os.EX_CONFIG, "no numeric loopback address"),
        (_translated_to_loopback, (), [], os.EX_CONFIG, "net.ipv4.conf.net0.route_localnet is on"),
        (
            _dropped,
            (),
            [],
            os.EX_CONFIG,
            "its answer to the test address 192.0.2.1 does not reach the proxy",
        ),
        (None, WITHOUT_TUN, [], os.EX_UNAVAILABLE, "/dev/net/tun does not exist"),
        (None, WITHOUT_ADMIN, ["--redirect", "none"], os.EX_NOPERM, "no permission"),
    ],
    ids=["other address", "name", "translated", "dropped", "no TUN", "no CAP_NET_ADMIN"],
)
def test_where_it_cannot_be(
    road: Street,
    site: Website,
    proxy: Proxy,
    prepare: Any,
    wrapper: tuple[str, ...],
    options: list[str],
    status: int,
    cause: str,
) -> None:
    """With C{--visitor-address require} the start is refused in one line, and nothing is left.
    Otherwise the proxy starts, and the log says why the web server does not see the visitors."""
    if prepare is not None:
        prepare(road.host.namespace)
    rules = road.host.namespace.rules()
    proxy.wrapper = wrapper
    refused = proxy.start("--visitor-address", "require", *options, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (status, 1), refused.stderr
    assert cause in refused.stderr
    assert "start without --visitor-address require" in refused.stderr
    assert not proxy.pid_file.exists()
    assert way_back(road.host.namespace) == []
    assert road.host.namespace.rules() == rules
    proxy.start("--linger", "0", *options)
    assert cause in proxy.log
    assert way_back(road.host.namespace) == []
    if "none" not in options:
        answer = visit(site, road.visitor, road.host.ipv4)
        assert answer.seen_from in ("127.0.0.1", "::1", "10.88.0.1")
        assert counted(proxy) == (0, 1)
    proxy.wrapper = ()
    proxy.stop(wait=True)


def test_off(road: Street, site: Website, proxy: Proxy) -> None:
    """With C{--visitor-address off} the web server sees the host's address, and no device and no
    rule is made for the way back."""
    proxy.start("--linger", "0", "--visitor-address", "off")
    assert way_back(road.host.namespace) == []
    for family in FAMILIES:
        answer = visit(site, road.visitor, road.host.address(family))
        assert (answer.steered, answer.seen_from) == (True, "127.0.0.1")
    assert counted(proxy) == (0, 2)
    proxy.stop(wait=True)
