"""What is particular to C{--redirect nftables}; the rows that all redirects share are in
test_promises.py."""

from __future__ import annotations

import hashlib
import os
import re
import select
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from .netns import (
    LINK,
    Namespace,
    Street,
    bridged_street,
    unnumbered_street,
    wait_until,
)
from .proxy import Proxy, ends
from .visitors import visitors
from .website import PAGE, Website, website

TABLE = "inet acme_alpn_proxy"
FAMILIES = ("IPv4", "IPv6")
FAMILY_NUMBERS = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}
WAY = ("--redirect", "nftables", "--linger", "1")
KILLS = 16

both_families = pytest.mark.parametrize("family", FAMILIES)


def start(proxy: Proxy, *options: str) -> None:
    proxy.start(*WAY, *options)


def steered(site: Website, road: Street, family: str) -> bool:
    """Get the page as a new visitor; whether it came through the proxy."""
    with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
        answer = visit.get()
    assert answer.body == PAGE
    return answer.steered


def tables(host: Namespace) -> list[str]:
    """The tables of nftables, as in C{inet filter}."""
    lines = host.run("nft", "list", "tables").stdout.splitlines()
    return [line.removeprefix("table ") for line in lines]


def refusal(proxy: Proxy, *options: str) -> tuple[int, str]:
    """Exit status and the one line of a start that is refused, and leaves nothing."""
    before = tables(proxy.namespace)
    refused = proxy.start(*WAY, *options, check=False)
    (line,) = refused.stderr.splitlines()
    assert not proxy.pid_file.exists()
    assert tables(proxy.namespace) == before
    return refused.returncode, line


def test_table(road: Street, site: Website, proxy: Proxy) -> None:
    """While it steers, a table shows what it does; after the stop there is none."""
    start(proxy)
    shown = road.host.namespace.run("nft", "list", "ruleset").stdout
    assert "flags owner" in shown
    for family, listener in (("ip", "127.0.0.1"), ("ip6", "[::1]")):
        assert re.search(rf"tproxy {family} to {re.escape(listener)}:[0-9]+\b", shown)
    assert shown.count("chain") == 1
    proxy.stop(wait=True)
    assert tables(road.host.namespace) == []


@both_families
def test_download_older_than_the_table(
    road: Street, site: Website, proxy: Proxy, family: str
) -> None:
    """A download that began before the start arrives whole, from the web server directly."""
    with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
        response = visit.ask("/slow/big")
        digest = hashlib.sha256(response.read(1024 * 1024))
        start(proxy)
        assert steered(site, road, family)
        digest.update(response.read(2 * 1024 * 1024))
        proxy.stop(wait=True)
        while part := response.read(65536):
            digest.update(part)
        assert digest.hexdigest() == site.big_file_sha256
        assert not visit.get().steered


@both_families
def test_steered_download_at_stop(road: Street, site: Website, proxy: Proxy, family: str) -> None:
    """A steered download that runs at stop arrives whole, though the table has gone."""
    start(proxy)
    with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
        response = visit.ask("/slow/big")
        digest = hashlib.sha256(response.read(1024 * 1024))
        proxy.stop()
        assert tables(road.host.namespace) == []
        wait_until(lambda: "Waiting for the open" in proxy.log, "the listener is closed")
        while part := response.read(65536):
            digest.update(part)
        assert digest.hexdigest() == site.big_file_sha256
        assert visit.get().steered
    assert ends(proxy.pid)


@contextmanager
def lost(visitor: Namespace, direction: str, flags: str) -> Iterator[None]:
    """Inside the block, packets with these flags from or to port 443 are dropped."""
    port = "sport" if direction == "input" else "dport"
    visitor.run(
        "nft",
        f"table inet lost {{ chain c {{ type filter hook {direction} priority 0;"
        f" tcp {port} 443 tcp flags & (syn | ack) == {flags} drop; }}; }}",
    )
    try:
        yield
    finally:
        visitor.run("nft", "delete", "table", "inet", "lost")


def half_open(host: Namespace) -> bool:
    return bool(host.run("ss", "-Htn", "state", "syn-recv", "sport = :443").stdout.strip())


@contextmanager
def answer_lost(road: Street, family: str, connection: socket.socket) -> Iterator[None]:
    """A visitor's SYN has arrived, and no SYN-ACK gets to the visitor while this lasts."""
    with lost(road.visitor.namespace, "input", "(syn | ack)"):
        connection.setblocking(False)
        connection.connect_ex((road.host.address(family), 443))
        wait_until(lambda: half_open(road.host.namespace), "the host answers the SYN")
        yield


def page_after_all(site: Website, connection: socket.socket) -> bool:
    """Let the handshake go on by retransmission; whether the page came through the proxy."""
    assert select.select([], [connection], [], 10)[1], "no answer to the SYN"
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    connection.settimeout(10)
    with closing(site.visit_on(connection)) as visit:
        answer = visit.get()
    assert answer.body == PAGE
    return answer.steered


@both_families
def test_handshake_half_way_at_start(
    road: Street, site: Website, proxy: Proxy, family: str
) -> None:
    """A visitor whose SYN arrived before the start gets the page from the web server."""
    with road.visitor.namespace.new_socket(FAMILY_NUMBERS[family]) as connection:
        with answer_lost(road, family, connection):
            start(proxy)
        assert not page_after_all(site, connection)
    assert steered(site, road, family)
    proxy.stop(wait=True)


@both_families
def test_handshake_half_way_at_stop(road: Street, site: Website, proxy: Proxy, family: str) -> None:
    """A visitor whose SYN was steered before the stop gets the page through the proxy."""
    proxy.start("--redirect", "nftables")
    with road.visitor.namespace.new_socket(FAMILY_NUMBERS[family]) as connection:
        with answer_lost(road, family, connection):
            proxy.stop()
            assert tables(road.host.namespace) == []
        assert page_after_all(site, connection)
    assert ends(proxy.pid)


@pytest.mark.parametrize("redirect", ["iptables", "nftables", "sk-lookup"])
class TestLastPacketOfAHandshake:
    """A visitor has the SYN-ACK, but the next packet is lost until something has changed."""

    @pytest.fixture(params=[1, 2], ids=["some cookies", "cookies alone"], autouse=True)
    def syn_cookies(self, road: Street, site: Website, request: pytest.FixtureRequest) -> None:
        """The kernel sends SYN cookies in a flood, or always."""
        setting = f"net.ipv4.tcp_syncookies={request.param}"
        road.host.namespace.run("sysctl", "-qw", setting)

    @both_families
    def test_start(
        self, road: Street, site: Website, proxy: Proxy, family: str, redirect: str
    ) -> None:
        """Begun before the start, the handshake ends well, and the visitor gets the page."""
        with lost(road.visitor.namespace, "output", "ack"):
            connection = road.visitor.namespace.connect(road.host.address(family), 443)
            proxy.start("--redirect", redirect, "--linger", "1")
        with closing(site.visit_on(connection)) as visit:
            assert visit.get().body == PAGE
        proxy.stop(wait=True)

    @both_families
    def test_stop(
        self, road: Street, site: Website, proxy: Proxy, family: str, redirect: str
    ) -> None:
        """Begun before the stop, the handshake ends well, and the visitor gets the page."""
        proxy.start("--redirect", redirect, "--linger", "5")
        with lost(road.visitor.namespace, "output", "ack"):
            connection = road.visitor.namespace.connect(road.host.address(family), 443)
            proxy.stop()
        with closing(site.visit_on(connection)) as visit:
            assert visit.get().body == PAGE
        assert ends(proxy.pid)


@pytest.mark.parametrize("reverse_path_filter", [0, 1])
def test_service_address_on_lo(tmp_path: Path, reverse_path_filter: int) -> None:
    """Visitors to an address on lo are steered, also with a strict reverse path filter."""
    with unnumbered_street() as road, website(road.host.namespace, tmp_path / "site") as site:
        for interface in ("all", LINK):
            setting = f"net.ipv4.conf.{interface}.rp_filter={reverse_path_filter}"
            road.host.namespace.run("sysctl", "-qw", setting)
        proxy = Proxy(road.host.namespace, tmp_path)
        with visitors(site, road.visitor, road.host) as crowd:
            start(proxy)
            crowd.wait_for(10, steered=True)
            proxy.stop(wait=True)
            report = crowd.leave()
        assert report.failed == 0, report


def test_killed_again_and_again(
    road: Street, site: Website, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed by SIGKILL, 16 times: the web server serves within 100 ms, and nothing is left."""
    seconds = []
    for _ in range(KILLS):
        start(proxy)
        assert steered(site, road, "IPv6")
        began = time.monotonic()
        proxy.kill()
        for family in FAMILIES:
            assert not steered(site, road, family)
        seconds.append(time.monotonic() - began)
        assert tables(road.host.namespace) == []
    with capsys.disabled():
        told = ", ".join(
            f"{1000 * each:.1f}" for each in (min(seconds), statistics.median(seconds))
        )
        print(
            f"\nSIGKILL to served again by both families, {KILLS} times: minimum and median"
            f" {told}, maximum {1000 * max(seconds):.1f} ms"
        )
    assert statistics.median(seconds) <= 0.1


def test_nobody_else_changes_it(road: Street, site: Website, proxy: Proxy) -> None:
    """Commands that wipe the rules of a host do not touch the table."""
    start(proxy)
    host = road.host.namespace
    before = host.run("nft", "list", "table", *TABLE.split()).stdout
    for command in (
        "flush ruleset",
        f"delete table {TABLE}",
        f"flush table {TABLE}",
        f"add rule {TABLE} steer drop",
    ):
        done = host.run("nft", *command.split(), check=False)
        assert done.returncode == (command != "flush ruleset"), command
    host.run("iptables", "-F")
    assert host.run("nft", "list", "table", *TABLE.split()).stdout == before
    assert [steered(site, road, family) for family in FAMILIES] == [True, True]
    proxy.stop(wait=True)


def test_saved_rules(road: Street, site: Website, proxy: Proxy, tmp_path: Path) -> None:
    """Rules that were saved while it steers do not steer when they are loaded later. While it
    steers, loading them is refused as a whole, and the host's rules do not change."""
    host = road.host.namespace
    host.run("nft", "table inet filter { chain input { type filter hook input priority 0; }; }")
    saved = tmp_path / "saved"
    start(proxy)
    saved.write_text("flush ruleset\n" + host.run("nft", "list", "ruleset").stdout)
    refused = host.run("nft", "-f", saved, check=False)
    assert refused.returncode == 1
    assert "Operation not permitted" in refused.stderr
    assert tables(host) == ["inet filter", TABLE]
    proxy.stop(wait=True)
    host.run("nft", "-f", saved)
    wait_until(lambda: tables(host) == ["inet filter"], "the table has gone with nft's process")
    assert not steered(site, road, "IPv4")


def test_rules_saved_without_the_table(
    road: Street, site: Website, proxy: Proxy, tmp_path: Path
) -> None:
    """The command of docs/steering.md leaves the table out, so that the file can be loaded at any
    time."""
    host = road.host.namespace
    host.run("nft", "table inet filter { chain input { type filter hook input priority 0; }; }")
    document = (Path(__file__).resolve().parents[2] / "docs" / "steering.md").read_text()
    (command,) = re.findall(r"^(nft list tables .*(?:\n.*)*?> file)$", document, re.MULTILINE)
    start(proxy)
    host.run("sh", "-c", command.replace("> file", f"> {tmp_path}/saved"))
    text = (tmp_path / "saved").read_text()
    assert "filter" in text
    assert "acme" not in text
    host.run("nft", "-f", tmp_path / "saved")
    proxy.stop(wait=True)


def test_another_instance(road: Street, site: Website, proxy: Proxy, tmp_path: Path) -> None:
    """A second instance is refused while the first steers, and may be tried again."""
    start(proxy)
    other = Proxy(road.host.namespace, tmp_path / "other")
    refused = other.start(*WAY, check=False)
    assert refused.returncode == os.EX_TEMPFAIL
    assert re.search(
        "another instance already steers with nftables; stop that instance first", refused.stderr
    )
    assert steered(site, road, "IPv4")
    proxy.stop(wait=True)
    start(other)
    assert steered(site, road, "IPv4")
    other.stop(wait=True)


def test_foreign_table(road: Street, site: Website, proxy: Proxy) -> None:
    """A table of that name that another program has made is a reason to refuse, and stays."""
    host = road.host.namespace
    host.run("nft", "add", "table", *TABLE.split())
    status, line = refusal(proxy)
    assert status == os.EX_CONFIG
    assert re.search(f"'{TABLE}' already, .*; .* or remove it .nft delete table {TABLE}.", line)
    assert tables(host) == [TABLE]


def test_not_permitted(road: Street, site: Website, proxy: Proxy) -> None:
    """Without CAP_NET_ADMIN start says so in one line, with the remedy."""
    proxy.wrapper = ("setpriv", "--bounding-set", "-net_admin")
    status, line = refusal(proxy)
    assert status == os.EX_NOPERM
    assert re.search("no permission to use nftables; run this as root .*CAP_NET_ADMIN", line)


def test_bridge(tmp_path: Path) -> None:
    """Visitors over a bridge are not steered if its packets pass the firewall while bridged: it
    refuses, for either family, also if only one bridge has that setting."""
    with bridged_street() as road, website(road.host.namespace, tmp_path / "site") as site:
        host = road.host.namespace
        proxy = Proxy(host, tmp_path)
        switches = [f"net.bridge.bridge-nf-call-{each}tables" for each in ("ip", "ip6")]
        host.run("sysctl", "-qw", *(f"{switch}=0" for switch in switches))
        for switch in switches:
            host.run("sysctl", "-qw", f"{switch}=1")
            status, line = refusal(proxy)
            assert status == os.EX_CONFIG
            assert re.search(
                "through the bridge br0, .*tables=1.*; use --redirect iptables or --redirect"
                " sk-lookup, or set net.bridge.bridge",
                line,
            )
            start(proxy, "--force")
            assert not all(steered(site, road, family) for family in FAMILIES)
            proxy.stop(wait=True)
            host.run("sysctl", "-qw", f"{switch}=0")
        host.ip("link set br0 type bridge nf_call_iptables 1")
        assert refusal(proxy)[0] == os.EX_CONFIG
