"""The promises of docs/steering.md about all redirects, each a row of its table."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from acme_alpn_proxy.options import WAYS

from .netns import Namespace, Street, container, gateway, street, terminate, wait_until
from .proxy import NET_RAW, NOBODY, PORT, Proxy, ends, is_powerless, kill, no_way_back_is_left
from .visitors import visitors
from .website import PAGE, Visit, Website, website

REDIRECTS = ("iptables", "nftables", "sk-lookup")
FAMILIES = ("IPv4", "IPv6")
DEFAULT = ",".join(WAYS)
all_redirects = pytest.mark.parametrize("redirect", REDIRECTS)
by_loopback = pytest.mark.parametrize("redirect", ["nftables", "sk-lookup"])


def start(proxy: Proxy, redirect: str, *options: str) -> None:
    """Start with a short linger."""
    proxy.start("--redirect", redirect, "--linger", "1", *options)


def visit(site: Website, road: Street, family: str) -> bool:
    """Get the page as a new visitor; whether it came through the proxy."""
    with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
        answer = visit.get()
    assert answer.body == PAGE
    return answer.steered


def nothing_is_left(proxy: Proxy) -> None:
    """No rule, no table, no program, no device, no process of the proxy's."""
    assert ends(proxy.pid)
    no_way_back_is_left(proxy.namespace)
    assert "acme_alpn_proxy" not in proxy.namespace.run("nft", "list", "tables").stdout
    wait_until(lambda: proxy.namespace.rules() == [], "the rules are gone", 1)


@all_redirects
def test_both_families(road: Street, site: Website, proxy: Proxy, redirect: str) -> None:
    """Visitors by IPv4 and by IPv6 go through the proxy while it steers, and only then."""
    assert [visit(site, road, family) for family in FAMILIES] == [False, False]
    start(proxy, redirect)
    assert [visit(site, road, family) for family in FAMILIES] == [True, True]
    proxy.stop()
    assert [visit(site, road, family) for family in FAMILIES] == [False, False]
    nothing_is_left(proxy)


@all_redirects
def test_ipv6_left_alone(road: Street, site: Website, tmp_path: Path, redirect: str) -> None:
    """With ACME_ALPN_PROXY_DISABLEV6=y only IPv4 is steered."""
    proxy = Proxy(road.host.namespace, tmp_path, {"ACME_ALPN_PROXY_DISABLEV6": "y"})
    start(proxy, redirect)
    assert [visit(site, road, family) for family in FAMILIES] == [True, False]
    proxy.stop(wait=True)
    nothing_is_left(proxy)


@all_redirects
def test_killed_under_load(
    road: Street,
    site: Website,
    proxy: Proxy,
    redirect: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After SIGKILL the connections under way are cut, and new ones are served."""
    start(proxy, redirect)
    with visitors(site, road.visitor, road.host) as crowd:
        crowd.wait_for(20, steered=True)
        proxy.kill()
        killed = time.monotonic()
        wait_until(lambda: _served(site, road), "the site serves again", 1)
        seconds = time.monotonic() - killed
        time.sleep(0.5)  # until the last visitors of the killed proxy have noticed
        before = crowd.report()
        crowd.wait_for(50)
        report = crowd.leave()
    with capsys.disabled():
        print(f"\n{redirect}: SIGKILL to served again {seconds * 1000:.1f} ms")
    assert report.failed == before.failed, report
    nothing_is_left(proxy)


def _served(site: Website, road: Street) -> bool:
    try:
        return not any(visit(site, road, family) for family in FAMILIES)
    except OSError:
        return False


def test_guard(road: Street, site: Website, proxy: Proxy) -> None:
    """The guard is small, leads its own session, ignores SIGTERM and SIGINT, and holds no other
    file."""
    start(proxy, "iptables")
    guard = proxy.guard
    assert os.getsid(guard) == guard
    private = re.findall(r"Private_\w+: +(\d+) kB", Path(f"/proc/{guard}/smaps_rollup").read_text())
    assert sum(map(int, private)) < 8 * 1024
    assert sorted(os.listdir(f"/proc/{guard}/fd")) == ["0", "1", "2", "3"]
    os.kill(guard, 15)
    os.kill(guard, 2)
    assert not ends(guard, 0.2)
    proxy.kill()
    assert ends(guard, 1)
    nothing_is_left(proxy)


def test_guard_killed(road: Street, site: Website, proxy: Proxy) -> None:
    """If the guard is killed, another one takes over, and the stop is in order."""
    start(proxy, "iptables")
    kill(proxy.guard)
    wait_until(lambda: "the proxy starts a new one" in proxy.log, "the proxy notices")
    assert visit(site, road, "IPv4")
    assert proxy.guard
    proxy.stop(wait=True)
    nothing_is_left(proxy)


@all_redirects
def test_privileges_dropped(road: Street, site: Website, tmp_path: Path, redirect: str) -> None:
    """With C{--uid} the proxy steers as the user nobody, keeps only CAP_NET_RAW, and can get no
    other capability; other processes of nobody cannot inspect it. C{stop} works as usual."""
    proxy = Proxy(road.host.namespace, tmp_path)
    start(proxy, redirect, "--uid", "nobody")
    assert [visit(site, road, family) for family in FAMILIES] == [True, True]
    for thread in Path(f"/proc/{proxy.pid}/task").iterdir():
        status = (thread / "status").read_text()
        assert re.search(r"Uid:\t65534\t65534\t65534\t65534", status)
        assert re.search(r"Gid:\t65534\t65534\t65534\t65534", status)
        assert is_powerless(status, NET_RAW)
    for name in ("mem", "environ", "fd/0"):
        done = proxy.namespace.run(*NOBODY, "head", f"/proc/{proxy.pid}/{name}", check=False)
        assert "Permission denied" in done.stderr
    proxy.stop()
    assert not proxy.pid_file.exists()
    assert [visit(site, road, family) for family in FAMILIES] == [False, False]
    nothing_is_left(proxy)


def _bans(host: Namespace, address: str) -> None:
    binary = "ip6tables" if ":" in address else "iptables"
    host.run(
        *(binary, "-A", "INPUT", "-p", "tcp", "--dport", "443", "-s", address),
        *("-j", "REJECT", "--reject-with", "tcp-reset"),
    )


@pytest.mark.parametrize("redirect", ["nftables", "sk-lookup", DEFAULT])
def test_ban_stays_a_ban(road: Street, site: Website, proxy: Proxy, redirect: str) -> None:
    """A visitor whom INPUT bans from port 443 stays banned, except with iptables."""
    for address in (road.visitor.ipv4, road.visitor.ipv6):
        _bans(road.host.namespace, address)
    start(proxy, redirect)
    for family in FAMILIES:
        with pytest.raises(ConnectionRefusedError):
            visit(site, road, family)
    proxy.stop(wait=True)


@by_loopback
def test_listener_is_on_loopback_alone(
    road: Street, site: Website, proxy: Proxy, redirect: str
) -> None:
    """No client outside reaches the listener on its own port, except with iptables."""
    start(proxy, redirect)
    for family in FAMILIES:
        assert not road.visitor.namespace.accepts(road.host.address(family), PORT)
    assert visit(site, road, "IPv4")
    proxy.stop(wait=True)


@all_redirects
def test_connection_tracking_stays_idle(
    road: Street, site: Website, proxy: Proxy, redirect: str
) -> None:
    """If nothing tracks connections, steering with iptables begins to; other redirects do not."""
    start(proxy, redirect)
    assert visit(site, road, "IPv4")
    tracked = road.host.namespace.run("conntrack", "-C").stdout.strip()
    assert (tracked == "0") is (redirect != "iptables")
    proxy.stop(wait=True)
    nothing_is_left(proxy)


@pytest.mark.parametrize("redirect", ["iptables", "nftables"])
def test_two_published_containers(road: Street, tmp_path: Path, redirect: str) -> None:
    """If a container has :443, connections from before the start and connections steered at the
    stop go on; visitors of another container, on another port, are never steered."""
    host = road.host.namespace
    proxy = Proxy(host, tmp_path)
    with (
        container(host) as box,
        container(host, 1, 8443) as other,
        website(box.namespace, tmp_path / "site") as site,
        website(other.namespace, tmp_path / "other-site") as other_site,
    ):

        def visit_to_the_other() -> Visit:
            return other_site.visit_on(road.visitor.namespace.connect(road.host.ipv4, 8443))

        rules = host.rules()
        with (
            closing(visit_to_the_other()) as beside,
            site.visit(road.visitor.namespace, road.host.ipv4) as older,
        ):
            assert older.get().seen_from == road.visitor.ipv4
            assert beside.get().seen_from == road.visitor.ipv4
            start(proxy, redirect, "-fallback", f"{box.ipv4}:443")
            with site.visit(road.visitor.namespace, road.host.ipv4) as younger:
                assert younger.get().seen_from == "172.17.0.1", "not by way of the proxy"
                assert older.get().seen_from == road.visitor.ipv4
                with closing(visit_to_the_other()) as meanwhile:
                    assert meanwhile.get().seen_from == road.visitor.ipv4
                proxy.stop()
                assert younger.get().seen_from == "172.17.0.1"
            assert older.get().seen_from == road.visitor.ipv4
            assert beside.get().seen_from == road.visitor.ipv4
        assert ends(proxy.pid)
        assert host.rules() == rules


@all_redirects
def test_forwarded_traffic(tmp_path: Path, redirect: str) -> None:
    """What a neighbour sends through this host to another web server arrives there unchanged."""
    with (
        gateway() as way,
        website(way.host, tmp_path / "site-of-host"),
        website(way.outer.namespace, tmp_path / "site-outside") as outside,
    ):
        proxy = Proxy(way.host, tmp_path)
        start(proxy, redirect)
        for family in FAMILIES:
            with outside.visit(way.inner.namespace, way.outer.address(family)) as visit:
                answer = visit.get()
            assert (answer.body, answer.seen_from) == (PAGE, way.inner.address(family))
        proxy.stop(wait=True)
        nothing_is_left(proxy)


@all_redirects
def test_two_network_namespaces(tmp_path: Path, redirect: str) -> None:
    """Two proxies in two network namespaces of one machine do not affect each other."""
    with (
        street() as one,
        street() as other,
        website(one.host.namespace, tmp_path / "site-one") as site_one,
        website(other.host.namespace, tmp_path / "site-other") as site_other,
    ):
        first = Proxy(one.host.namespace, tmp_path / "one")
        second = Proxy(other.host.namespace, tmp_path / "other")
        start(first, redirect)
        start(second, redirect)
        assert visit(site_one, one, "IPv4")
        assert visit(site_other, other, "IPv4")
        first.kill()
        assert visit(site_other, other, "IPv6")
        second.stop(wait=True)
        nothing_is_left(first)
        nothing_is_left(second)


@pytest.mark.parametrize("wipe", ["iptables -t nat -F", "nft flush ruleset"])
def test_rules_wiped(road: Street, site: Website, proxy: Proxy, wipe: str) -> None:
    """Rules that another program removes are back within five seconds, and that is logged."""
    start(proxy, "iptables")
    before = sorted(road.host.namespace.rules())
    road.host.namespace.run(*wipe.split())
    assert sorted(road.host.namespace.rules()) != before
    wait_until(lambda: sorted(road.host.namespace.rules()) == before, "the rules are back", 5)
    wait_until(lambda: "has inserted them again" in proxy.log, "it is logged")
    assert [visit(site, road, family) for family in FAMILIES] == [True, True]
    proxy.stop(wait=True)
    nothing_is_left(proxy)


def test_nothing_to_wipe(road: Street, site: Website, proxy: Proxy) -> None:
    """With sk-lookup there is nothing to wipe."""
    start(proxy, "sk-lookup")
    assert road.host.namespace.rules() == []
    road.host.namespace.run("nft", "flush", "ruleset")
    assert [visit(site, road, family) for family in FAMILIES] == [True, True]
    proxy.stop(wait=True)


@all_redirects
def test_rules_saved_and_restored(
    road: Street, site: Website, proxy: Proxy, tmp_path: Path, redirect: str
) -> None:
    """Rules that were saved while it steered, and are loaded again after the stop: those of
    iptables end by themselves, and stop removes them at once; the others have left none."""
    host = road.host.namespace
    start(proxy, redirect)
    saved = {}
    for binary in ("iptables", "ip6tables"):
        saved[binary] = tmp_path / binary
        saved[binary].write_text(host.run(f"{binary}-save").stdout)
    proxy.stop(wait=True)
    for binary, path in saved.items():
        host.run(f"{binary}-restore", path)
    redirects = [rule for rule in host.rules() if "REDIRECT" in rule]
    assert len(redirects) == (2 if redirect == "iptables" else 0)
    assert all("--datestop" in rule for rule in redirects)
    if redirects:
        proxy.run("stop")
    assert [visit(site, road, family) for family in FAMILIES] == [False, False]
    nothing_is_left(proxy)


@all_redirects
def test_own_connections_are_left_alone(
    road: Street, site: Website, proxy: Proxy, redirect: str
) -> None:
    """What the host itself sends to its own :443 goes to the web server, for every address."""
    start(proxy, redirect)
    _host_reaches_its_own_web_server(road, site)
    proxy.stop(wait=True)


def _host_reaches_its_own_web_server(road: Street, site: Website) -> None:
    """By each of its addresses, and not by way of the proxy."""
    for address in ("127.0.0.1", "::1", road.host.ipv4, road.host.ipv6):
        with site.visit(road.host.namespace, address) as visit:
            assert visit.get().body == PAGE
            port = str(visit.sock.getsockname()[1])
            query = ["ss", "-Htnp", "state", "established", f"sport = :443 and dport = :{port}"]
            assert '"nginx"' in road.host.namespace.run(*query).stdout


@all_redirects
def test_web_server_by_an_address_of_the_host(
    road: Street, site: Website, proxy: Proxy, redirect: str
) -> None:
    """A fallback at the host's outer address is no loop: the proxy's own connections are not
    steered."""
    start(proxy, redirect, "-fallback", f"{road.host.ipv4}:443")
    for family in FAMILIES:
        with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
            assert visit.get().seen_from == road.host.ipv4
    proxy.stop(wait=True)


@by_loopback
def test_address_that_was_dialled(road: Street, site: Website, proxy: Proxy, redirect: str) -> None:
    """The proxy's end of a visitor's connection has port 443, except with iptables."""
    start(proxy, redirect)
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        query = ["ss", "-Htnp", "state", "established", "sport = :443"]
        assert f"pid={proxy.pid}," in road.host.namespace.run(*query).stdout
    proxy.stop(wait=True)


@all_redirects
def test_syn_cookies(road: Street, site: Website, proxy: Proxy, redirect: str) -> None:
    """If the kernel uses SYN cookies for every handshake, visitors are steered, and none fails."""
    road.host.namespace.run("sysctl", "-qw", "net.ipv4.tcp_syncookies=2")
    start(proxy, redirect)
    with visitors(site, road.visitor, road.host) as crowd:
        crowd.wait_for(20, steered=True)
        report = crowd.leave()
    assert report.failed == 0, report
    proxy.stop(wait=True)


@contextmanager
def _another_program(namespace: Namespace, log: Path) -> Iterator[None]:
    """Another sk_lookup program, which gives new connections to a listener that does not accept."""
    code = """if True:
        import socket, time
        from acme_alpn_proxy.host.processes import BlockingCommands
        from acme_alpn_proxy.redirects.sklookup import SkLookupRedirect
        listener = socket.create_server(("127.0.0.1", 40443))
        redirect = SkLookupRedirect(ipv6=False)
        redirect.apply(BlockingCommands(), [listener])
        print("attached", flush=True)
        time.sleep(60)
    """
    process = namespace.popen(sys.executable, "-c", code, log=log)
    try:
        wait_until(lambda: "attached" in log.read_text(), "the other one is attached")
        yield
    finally:
        terminate(process)


def test_another_program(road: Street, site: Website, proxy: Proxy, tmp_path: Path) -> None:
    """If another sk_lookup program is attached, C{start} says so, and the last one wins."""
    with _another_program(road.host.namespace, tmp_path / "other.log"):
        started = proxy.start("--redirect", "sk-lookup", "--linger", "1")
        assert "Another sk_lookup program" in started.stderr
        assert visit(site, road, "IPv4")
        proxy.stop(wait=True)


def test_bpf_not_permitted(road: Street, proxy: Proxy) -> None:
    """Without the capability for BPF start says so in one line, with the remedy, and is undone."""
    proxy.wrapper = ("setpriv", "--bounding-set", "-sys_admin,-bpf")
    refused = proxy.start("--redirect", "sk-lookup", check=False)
    assert refused.returncode == os.EX_NOPERM
    assert re.fullmatch(
        "acme-alpn-proxy: no permission to use BPF; use --redirect iptables or --redirect nftables,"
        " or run this as root.*\n",
        refused.stderr,
    )
    assert not proxy.pid_file.exists()
    assert not road.host.namespace.accepts("127.0.0.1", PORT)
