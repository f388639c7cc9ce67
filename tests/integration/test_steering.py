"""Who is steered where, and what start and stop leave."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from .acme import RESPONDER
from .netns import Namespace, Street, gateway, unnumbered_street
from .proxy import PORT, Proxy, ends
from .visitors import visitors
from .website import PAGE, Website, website

CORPUS = Path(__file__).resolve().parents[1] / "data" / "clienthellos.jsonl"
ETHERNET_SEGMENT = 1448  # bytes of payload in a full frame, TCP timestamps on
DNAT_RULESPEC = (
    "-p tcp --syn --dport 443 -m addrtype --dst-type LOCAL -j DNAT --to-destination :21443"
    " -m comment --comment acme-alpn-proxy"
)


def _long_acme_hellos() -> list[tuple[str, bytes]]:
    """A real ACME hello of each client whose ML-KEM key share makes it longer than one segment."""
    found: dict[str, tuple[str, bytes]] = {}
    with CORPUS.open() as corpus:
        for line in corpus:
            case = json.loads(line)
            hello = bytes.fromhex(case["hex"])
            two_segments = ETHERNET_SEGMENT < len(hello) <= 2 * ETHERNET_SEGMENT
            if case["kind"] == "real" and case["accept"] == ["acme"] and two_segments:
                found.setdefault(case["source"].split()[0], (case["id"], hello))
    return list(found.values())


def _steers(road: Street, site: Website, families: tuple[str, ...] = ("IPv4", "IPv6")) -> bool:
    """Whether a new visitor of each family goes through the proxy, and gets the page."""
    for family in families:
        with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
            answer = visit.get()
        assert answer.body == PAGE
        if not answer.steered:
            return False
    return True


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_long_acme_hello_in_two_segments(
    road: Street, site: Website, proxy: Proxy, family: str
) -> None:
    """An ACME hello with an ML-KEM key share, in two segments, reaches the responder unchanged."""
    host, port = RESPONDER.split(":")
    hellos = _long_acme_hellos()
    assert hellos
    proxy.start()
    with road.host.namespace.listen(host, int(port)) as listener:
        for name, hello in hellos:
            address = road.host.address(family)
            with road.visitor.namespace.connect(address, 443) as prober:
                prober.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                prober.sendall(hello[:ETHERNET_SEGMENT])
                # Nothing shows from outside that the proxy has read the first segment alone.
                time.sleep(0.2)
                prober.sendall(hello[ETHERNET_SEGMENT:])
                try:
                    responder, _ = listener.accept()
                except TimeoutError:
                    pytest.fail(f"{name} did not reach the responder")
                with responder:
                    responder.settimeout(5)
                    assert _receive(responder, len(hello)) == hello, name
                    responder.sendall(b"the responder's answer")
                    assert _receive(prober, 22) == b"the responder's answer", name
    proxy.stop()


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size and (part := connection.recv(size - len(received))):
        received += part
    return received


def test_forwarded_traffic_is_left_alone(tmp_path: Path) -> None:
    """What a neighbour sends through this host to another web server arrives there unchanged."""
    with (
        gateway() as way,
        website(way.host, tmp_path / "site-of-host"),
        website(way.outer.namespace, tmp_path / "site-outside") as outside,
    ):
        proxy = Proxy(way.host, tmp_path)
        proxy.start()
        for family in ("IPv4", "IPv6"):
            with outside.visit(way.inner.namespace, way.outer.address(family)) as visit:
                answer = visit.get()
            assert (answer.body, answer.seen_from) == (PAGE, way.inner.address(family))
        proxy.stop(wait=True)
        assert way.inner.ipv4 not in proxy.log
        assert way.inner.ipv6 not in proxy.log
        assert way.host.rules() == []


def test_no_rule_is_left_of_a_killed_proxy(road: Street, site: Website, proxy: Proxy) -> None:
    """Killed by SIGKILL, with its guard, then start, then stop: no rule of either is left."""
    proxy.start()
    proxy.kill_with_guard()
    assert len(road.host.namespace.rules()) == 4, "nobody is left to remove them"
    proxy.start()
    rules = road.host.namespace.rules()
    assert len(rules) == 4, f"one redirect and one keeper for each family: {rules}"
    assert _steers(road, site)
    proxy.stop(wait=True)
    assert road.host.namespace.rules() == []


def test_stop_and_start_in_one_line(road: Street, site: Website, proxy: Proxy) -> None:
    """C{stop; start} steers again, five times in a row, and no visitor notices."""
    proxy.start()
    with visitors(site, road.visitor, road.host) as crowd:
        for _ in range(5):
            before = proxy.pid
            proxy.stop_and_start("--linger", "1")
            assert proxy.pid != before
            assert _steers(road, site)
        proxy.stop(wait=True)
        report = crowd.leave()
    assert report.failed == 0, report
    assert road.host.namespace.rules() == []


def test_start_while_the_old_one_drains(road: Street, site: Website, proxy: Proxy) -> None:
    """A new one starts while the old one still serves, and does not notice the old one's end."""
    proxy.start("--linger", "1")
    old = proxy.pid
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        proxy.stop()
        proxy.start("--linger", "1")
        assert _steers(road, site)
        assert not ends(old, seconds=0)
        assert visit.get().steered
    assert ends(old)
    assert int(proxy.pid_file.read_text()) == proxy.pid != old
    assert len(road.host.namespace.rules()) == 4
    with site.visit(road.visitor.namespace, road.host.ipv6) as visit:
        assert visit.get().steered
        proxy.stop()
        assert visit.get().steered, "the old one's end took the new one's keeper"
    assert ends(proxy.pid)
    assert road.host.namespace.rules() == []


def test_redirect_that_would_reach_nobody(tmp_path: Path) -> None:
    """Visitors come in by an interface without address: start refuses, and names DNAT."""
    with unnumbered_street() as road, website(road.host.namespace, tmp_path / "site") as site:
        proxy = Proxy(road.host.namespace, tmp_path)
        refused = proxy.start("--redirect", "iptables", check=False)
        assert refused.returncode == os.EX_CONFIG
        assert "DNAT" in refused.stderr
        assert not proxy.pid_file.exists()
        _nobody_listens_or_is_redirected(road.host.namespace)
        with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
            assert not visit.get().steered


def test_rulespec_with_dnat_for_an_interface_without_address(tmp_path: Path) -> None:
    """If REDIRECT leads nowhere, a rulespec with DNAT steers all visitors."""
    with unnumbered_street() as road, website(road.host.namespace, tmp_path / "site") as site:
        proxy = Proxy(road.host.namespace, tmp_path, {"ACME_ALPN_PROXY_RULESPEC": DNAT_RULESPEC})
        proxy.start()
        assert _steers(road, site)
        proxy.stop(wait=True)
        assert road.host.namespace.rules() == []


def _nobody_listens_or_is_redirected(host: Namespace) -> None:
    assert host.rules() == []
    assert not host.accepts("127.0.0.1", PORT)
