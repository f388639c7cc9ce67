"""Visitors never notice: not at start, not while steered, not at stop."""

from __future__ import annotations

import hashlib
import select
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from .netns import Namespace, Street, family_of, wait_until
from .proxy import PORT, Proxy, ends
from .visitors import visitors
from .website import PAGE, Website

both_families = pytest.mark.parametrize("family", ["IPv4", "IPv6"])


def test_ten_cycles_under_load(road: Street, site: Website, proxy: Proxy) -> None:
    """Ten times start and stop, and not one of the connections opened all along fails."""
    with visitors(site, road.visitor, road.host) as crowd:
        for cycle in range(10):
            proxy.start(*([] if cycle in (0, 1, 9) else ["--linger", "1"]))
            crowd.wait_for(10, steered=True)
            proxy.stop(wait=cycle % 2 == 0)
            crowd.wait_for(10)
        assert ends(proxy.pid)
        crowd.wait_for(10)
        report = crowd.leave()

    assert report.failed == 0, report
    assert all(tally.steered >= 100 for tally in report.families.values()), report
    assert road.host.namespace.rules() == []


@both_families
def test_connection_older_than_connection_tracking(
    road: Street, site: Website, proxy: Proxy, family: str
) -> None:
    """A connection opened before there was any conntrack rule goes on through start and stop."""
    with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
        assert visit.get().body == PAGE
        proxy.start("--linger", "1")
        for _ in range(3):
            answer = visit.get()
            assert (answer.body, answer.steered) == (PAGE, False)
        proxy.stop()
        assert visit.get().body == PAGE
        _ends_and_leaves_no_rule(road, proxy)
        assert visit.get().body == PAGE


@both_families
def test_steered_connection_survives_the_stop(
    road: Street, site: Website, proxy: Proxy, family: str
) -> None:
    """If nothing else tracks connections, a steered one survives the stop, until its own end."""
    proxy.start("--linger", "1")
    with site.visit(road.visitor.namespace, road.host.address(family), timeout=5) as visit:
        assert visit.get().steered
        proxy.stop()
        assert not proxy.pid_file.exists()
        for _ in range(3):
            answer = visit.get()
            assert (answer.body, answer.steered) == (PAGE, True)
        assert len(road.host.namespace.rules()) == 2, "a keeper for each family, no redirect"
        assert not ends(proxy.pid, seconds=2), "the process went before its connection"
        assert visit.get().steered
    _ends_and_leaves_no_rule(road, proxy)


@both_families
@pytest.mark.parametrize("share", [0, 0.5], ids=["silent", "half a hello"])
def test_hello_to_come_at_stop(
    road: Street, site: Website, proxy: Proxy, family: str, share: float
) -> None:
    """A visitor who connected before the stop, and has sent only a part of the hello or nothing,
    gets the page after the stop."""
    proxy.start("--linger", "0.2")
    with road.visitor.namespace.connect(road.host.address(family), 443) as connection:
        client = site.slow_client(connection)
        client.say_hello(share)
        _wait_until_steered(road.host.namespace, connection)
        _stop_listening(proxy)
        assert client.get() == PAGE
    _ends_and_leaves_no_rule(road, proxy)


@both_families
def test_tcp_handshake_open_at_stop(road: Street, site: Website, proxy: Proxy, family: str) -> None:
    """A SYN that was redirected, but answered only after the stop, leads to the page."""
    visitor, address = road.visitor.namespace, road.host.address(family)
    proxy.start()
    with visitor.new_socket(family_of(address)) as connection:
        with _answers_lost(visitor):
            connection.setblocking(False)
            connection.connect_ex((address, 443))
            wait_until(lambda: _half_open(road.host.namespace), "the host answers the SYN")
            proxy.stop()
        # From here on the kernels' retransmissions get through, the first a second after the SYN.
        assert select.select([], [connection], [], 10)[1], "no answer to the SYN"
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        connection.settimeout(10)
        with closing(site.visit_on(connection)) as visit:
            answer = visit.get()
    assert (answer.body, answer.steered) == (PAGE, True)
    _ends_and_leaves_no_rule(road, proxy)


@both_families
def test_download_running_at_stop(road: Street, site: Website, proxy: Proxy, family: str) -> None:
    """A download that runs at stop arrives whole."""
    proxy.start("--linger", "0.2")
    with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
        response = visit.ask("/slow/big")
        digest = hashlib.sha256(response.read(1024 * 1024))
        _stop_listening(proxy)
        while part := response.read(65536):
            digest.update(part)
    assert digest.hexdigest() == site.big_file_sha256
    _ends_and_leaves_no_rule(road, proxy)


def _stop_listening(proxy: Proxy) -> None:
    """Stop, and wait until the listener is closed: the drain is all there is now."""
    proxy.stop()
    wait_until(lambda: "Waiting for the open" in proxy.log, "it drains")


def _ends_and_leaves_no_rule(road: Street, proxy: Proxy) -> None:
    assert ends(proxy.pid), "still running"
    assert road.host.namespace.rules() == []


def _wait_until_steered(host: Namespace, connection: socket.socket) -> None:
    """Wait until the host has C{connection} on the proxy's port."""
    port = connection.getsockname()[1]
    query = ["ss", "-Htn", "state", "established", f"sport = :{PORT} and dport = :{port}"]
    wait_until(lambda: bool(host.run(*query).stdout.strip()), "the proxy has the connection")


def _half_open(host: Namespace) -> bool:
    """Whether a SYN to the proxy's port waits for the end of its handshake."""
    return bool(host.run("ss", "-Htn", "state", "syn-recv", f"sport = :{PORT}").stdout.strip())


@contextmanager
def _answers_lost(visitor: Namespace) -> Iterator[None]:
    """While this lasts, no SYN-ACK reaches the visitor."""
    rule = ["INPUT", "-p", "tcp", "--sport", "443", "--tcp-flags", "SYN,ACK", "SYN,ACK"]
    rule += ["-j", "DROP"]
    for command in ("iptables", "ip6tables"):
        visitor.run(command, "-A", *rule)
    try:
        yield
    finally:
        for command in ("iptables", "ip6tables"):
            visitor.run(command, "-D", *rule)
