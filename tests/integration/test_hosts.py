"""Hosts as people have them: few ports, tracking that comes and goes, a proxy that hangs."""

from __future__ import annotations

import os
import signal
import socket
import struct
from contextlib import ExitStack

import pytest

from .netns import Street, wait_until
from .proxy import AT_ONCE, PORT, Proxy, ends
from .website import Website, steers

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@pytest.mark.parametrize("whether", ["require", "off"])
def test_local_ports_run_out(road: Street, site: Website, proxy: Proxy, whether: str) -> None:
    """More visitors than the host has ports to reach its web server from, or than there are for
    connections from one visitor's address: all are served."""
    host = road.host.namespace
    host.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=50000 50009")
    proxy.start(*AT_ONCE, "--visitor-address", whether)
    seen = []
    with ExitStack() as visits:
        for _ in range(40):
            visit = site.visit(road.visitor.namespace, road.host.ipv4)
            seen.append(visits.enter_context(visit).get().seen_from)
    own = seen.count(road.visitor.ipv4)
    assert own == (0 if whether == "off" else 10)
    assert all(address.startswith("127.0.0.") for address in seen[own:]), seen
    proxy.stop(wait=True)


@pytest.mark.parametrize("redirect", ["iptables", "nftables", "sk-lookup"])
def test_connection_that_began_meanwhile(
    road: Street, site: Website, proxy: Proxy, redirect: str
) -> None:
    """A visitor connects through the proxy, then, from the same port, without it. When the proxy
    starts again, the second connection continues."""

    def dialled() -> socket.socket:
        connection = road.visitor.namespace.new_socket(socket.AF_INET)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        connection.bind((road.visitor.ipv4, 50_000))
        connection.settimeout(10)
        connection.connect((road.host.ipv4, 443))
        return connection

    proxy.start("--redirect", redirect, *AT_ONCE)
    first = site.visit_on(dialled())
    assert first.get().steered
    first.close()
    proxy.stop(wait=True)
    second = site.visit_on(dialled())
    try:
        assert not second.get().steered
        proxy.start("--redirect", redirect, *AT_ONCE)
        assert not second.get().steered
    finally:
        second.close()
    assert steers(road, site)
    proxy.stop(wait=True)


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_own_connections_come_back(road: Street, site: Website, proxy: Proxy, family: str) -> None:
    """If a rule of another program sends the proxy's connections to the web server back to the
    proxy, it closes them and logs one line: there is no endless loop."""
    proxy.start(*AT_ONCE)
    command, loopback = {"IPv4": ("iptables", "127.0.0.1"), "IPv6": ("ip6tables", "::1")}[family]
    rule = ["-p", "tcp", "-d", loopback, "--dport", "443", "-j", "REDIRECT"]
    rule += ["--to-ports", str(PORT)]
    road.host.namespace.run(command, "-t", "nat", "-I", "OUTPUT", *rule)
    for _ in range(3):
        with road.visitor.namespace.connect(road.host.address(family), 443) as visitor:
            visitor.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with pytest.raises(ConnectionResetError):
                visitor.recv(1)
    assert proxy.log.count("The proxy connected to itself") == 1
    assert len(os.listdir(f"/proc/{proxy.pid}/fd")) < 40
    proxy.stop(wait=True)


def test_proxy_hangs(road: Street, site: Website, proxy: Proxy) -> None:
    """If the proxy is suspended (SIGSTOP) while a visitor waits, the guard removes the redirect."""
    proxy.start(*AT_ONCE)
    guarded = len(road.host.namespace.rules())
    os.kill(proxy.pid, signal.SIGSTOP)
    try:
        with road.visitor.namespace.connect(road.host.ipv4, 443):
            host = road.host.namespace
            wait_until(lambda: len(host.rules()) < guarded, "the guard has let go", 20)
            wait_until(lambda: not any("REDIRECT" in rule for rule in host.rules()), "all of it")
            assert not steers(road, site)
    finally:
        os.kill(proxy.pid, signal.SIGCONT)
    proxy.stop(wait=True)
    assert ends(proxy.pid)
    assert road.host.namespace.rules() == []
