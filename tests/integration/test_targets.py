"""Where connections go, and with which header: real web servers, load balancers, ACME clients."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from .acme import lego, pebble
from .haproxy import haproxy
from .netns import Namespace, Node, Street, family_of, gateway, url_host
from .proxy import Proxy
from .website import PAGE, TOLD, TOLD_BY_UNIX_SOCKET, Answer, Visit, Website, website

every_redirect = pytest.mark.parametrize("redirect", ["iptables", "nftables", "sk-lookup"])
both_families = pytest.mark.parametrize("family", ["IPv4", "IPv6"])
both_versions = pytest.mark.parametrize("version", ["v1", "v2"])

VISITOR = {"IPv4": "192.0.2.7", "IPv6": "2001:db8::7"}
BALANCER = {"IPv4": "192.0.2.9", "IPv6": "2001:db8::9"}
"""Addresses besides those of the cable, both in the visitor's namespace."""


def ends(connection: socket.socket) -> tuple[str, str]:
    """Both ends of a connection, as nginx shows them."""
    names = connection.getsockname(), connection.getpeername()
    here, there = (f"{host}:{port}" for host, port, *_ in names)
    return here, there


def told(visit: Visit) -> Answer:
    """The answer of a web server that gets a PROXY header; assert that the header was true."""
    visitor, dialled = ends(visit.sock)
    answer = visit.get()
    assert answer == Answer(PAGE, visitor, dialled)
    return answer


# The PROXY protocol


@every_redirect
@both_families
@both_versions
def test_web_server_is_told(
    road: Street, site: Website, proxy: Proxy, redirect: str, family: str, version: str
) -> None:
    """With each redirect, nginx learns the address and port of the visitor, and those that it has
    connected to."""
    header = ("--fallback", TOLD, "--fallback-proxy-protocol", version)
    proxy.start("--redirect", redirect, "--linger", "1", *header)
    for _ in range(3):
        with site.visit(road.visitor.namespace, road.host.address(family)) as visit:
            told(visit)
            told(visit)
    proxy.stop()


@both_versions
def test_unix_socket(road: Street, site: Website, proxy: Proxy, version: str) -> None:
    """A web server at a Unix socket, which would see no address without a header, learns both
    addresses."""
    fallback = f"unix:{site.directory / TOLD_BY_UNIX_SOCKET}"
    proxy.start("--fallback", fallback, "--fallback-proxy-protocol", version, "--linger", "1")
    for address in (road.host.ipv4, road.host.ipv6):
        with site.visit(road.visitor.namespace, address) as visit:
            told(visit)
    proxy.stop()


@both_versions
def test_haproxy_is_told(
    road: Street, site: Website, proxy: Proxy, tmp_path: Path, version: str
) -> None:
    """HAProxy in the place of the web server understands the header, and passes it on."""
    way = ("127.0.0.1:9443 accept-proxy", f"{TOLD} send-proxy-v2")
    probe = ("127.0.0.1", 9443)
    with haproxy(road.host.namespace, tmp_path / "haproxy", way, probe=probe):
        header = ("--fallback", "127.0.0.1:9443", "--fallback-proxy-protocol", version)
        proxy.start("--linger", "1", *header)
        for address in (road.host.ipv4, road.host.ipv6):
            with site.visit(road.visitor.namespace, address) as visit:
                told(visit)
        proxy.stop()


def test_acme_client_is_told(road: Street, site: Website, proxy: Proxy) -> None:
    """With C{--alpn-proxy-protocol} the ACME client gets a header, and the web server gets none."""
    proxy.start("--alpn-proxy-protocol", "v1", "--linger", "1")
    with road.host.namespace.listen("127.0.0.1", 31443) as responder:
        with validation(road.visitor.namespace, road.host.ipv4, "site.example") as connection:
            source, _ = connection.getsockname()
            accepted, _ = responder.accept()
            with accepted:
                accepted.settimeout(5)
                first = accepted.recv(65_536)
        line, _, hello = first.partition(b"\r\n")
        assert line.startswith(f"PROXY TCP4 {source} {road.host.ipv4} ".encode())
        assert hello.startswith(b"\x16\x03")
        with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
            assert visit.get().steered
    proxy.stop()


def test_header_beyond_the_responder(
    road: Street, site: Website, proxy: Proxy, tmp_path: Path
) -> None:
    """The responder needs no header; an ACME client that is asked after it gets one. If no client
    listens, the CA still gets the refusal."""
    control = ("--control", str(tmp_path / "control"))
    proxy.start("--alpn-proxy-protocol", "v2", *control, "--linger", "1")
    namespace, address = road.visitor.namespace, road.host.ipv4
    with validation(namespace, address, "site.example") as connection:
        assert connection.recv(9) == b"\x15\x03\x03\0\x02\x02\x70", "unrecognized_name"
    with (
        road.host.namespace.listen("127.0.0.1", 31443) as client,
        validation(namespace, address, "site.example"),
    ):
        accepted, _ = client.accept()
        with accepted:
            assert accepted.recv(16).startswith(b"\r\n\r\n\0\r\nQUIT\n!\x11")
    proxy.stop()


@contextmanager
def validation(
    namespace: Namespace, address: str, name: str, source: str = ""
) -> Iterator[socket.socket]:
    """A connection that has sent the hello of a CA for C{name}."""
    import ssl

    context = ssl.create_default_context()
    context.set_alpn_protocols(["acme-tls/1"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    with closing(dial(namespace, address, 443, source)) as connection:
        connection.sendall(outgoing.read())
        yield connection


def dial(namespace: Namespace, address: str, port: int, source: str = "") -> socket.socket:
    """A connection, from this address of the namespace if one is given."""
    connection = namespace.new_socket(family_of(address))
    connection.settimeout(10)
    if source:
        connection.bind((source, 0))
    connection.connect((address, port))
    return connection


# Behind a load balancer


@contextmanager
def balancer(road: Street, directory: Path, send: str) -> Iterator[None]:
    """HAProxy in the visitor's namespace as a load balancer of the host."""
    namespace = road.visitor.namespace
    for address in (*VISITOR.values(), *BALANCER.values()):
        namespace.ip(f"address add {address} dev lo{' nodad' if ':' in address else ''}")
    ways = [
        (f"{url_host(BALANCER[family])}:443", f"{url_host(road.host.address(family))}:443 {send}")
        for family in ("IPv4", "IPv6")
    ]
    with haproxy(namespace, directory, *ways, probe=(BALANCER["IPv4"], 443)):
        yield


@every_redirect
@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2"])
def test_behind_a_load_balancer(
    road: Street, site: Website, proxy: Proxy, tmp_path: Path, redirect: str, send: str
) -> None:
    """Behind a load balancer, the web server gets the visitor's address, and the log has it."""
    header = ("--fallback", TOLD, "--fallback-proxy-protocol", "v2")
    balancers = f"{road.visitor.ipv4},{road.visitor.ipv6}"
    proxy.start(
        *("--redirect", redirect, "--linger", "1", "--log-level", "debug"),
        *("--proxy-protocol-from", balancers, *header),
    )
    with balancer(road, tmp_path / "haproxy", send):
        for family in ("IPv4", "IPv6"):
            connection = dial(road.visitor.namespace, BALANCER[family], 443, source=VISITOR[family])
            visitor = f"{url_host(VISITOR[family])}:{connection.getsockname()[1]}"
            with closing(site.visit_on(connection)) as visit:
                told(visit)
            assert f"Routed {visitor} to fallback" in proxy.log
    proxy.stop()


def test_headers_of_a_load_balancer(road: Street, site: Website, proxy: Proxy) -> None:
    """A header that arrives byte by byte is accepted. After other bytes, half a header, or no
    header in time, the connection is reset. A visitor that does not come through the load balancer
    needs no header."""
    proxy.start("--proxy-protocol-from", road.visitor.ipv4, "--linger", "1", "--hello-timeout", "1")
    namespace, address = road.visitor.namespace, road.host.ipv4
    with closing(dial(namespace, address, 443)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"PROXY TCP4 192.0.2.7 198.51.100.1 50000 443\r\n":
            connection.sendall(bytes([byte]))
            time.sleep(0.002)
        with closing(site.visit_on(connection)) as visit:
            assert visit.get().body == PAGE
    for first in (b"\x16\x03\x01\x02\x00\x01", b"PROXY TCP9 a b c d\r\n", b"PROXY TCP4 192", b""):
        with closing(dial(namespace, address, 443)) as connection:
            connection.sendall(first)
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
    assert proxy.log.count("it did not begin with a header of the PROXY protocol") == 1
    with site.visit(namespace, road.host.ipv6) as visit:
        assert visit.get().steered
    proxy.stop()


# The address that the visitor connected to


@contextmanager
def two_sites(host: Namespace, directory: Path, *hosts: tuple[str, str]) -> Iterator[list[Website]]:
    """A web server for each pair of addresses; each has a page of its own."""
    with ExitStack() as running:
        sites = []
        for number, pair in enumerate(hosts):
            site = running.enter_context(website(host, directory / f"site{number}", (), pair))
            (site.directory / "pages" / "index.html").write_text(f"site {number}")
            sites.append(site)
        yield sites


@every_redirect
def test_original(road: Street, tmp_path: Path, redirect: str) -> None:
    """Two web servers, each at its own addresses, get their own visitors. A visitor of an address
    without a web server is reset, and the log names that address."""
    host, visitor = road.host.namespace, road.visitor.namespace
    more = ("10.88.0.3", "fd88::3")
    host.ip("address add 10.88.0.3/24 dev net0")
    host.ip("address add 10.88.0.4/24 dev net0")
    host.ip("address add fd88::3/64 dev net0 nodad")
    addresses = ((road.host.ipv4, road.host.ipv6), more)
    with two_sites(host, tmp_path, *addresses) as sites:
        proxy = Proxy(host, tmp_path)
        proxy.start("--fallback", "original", "--redirect", redirect, "--linger", "1")
        for number, (site, pair) in enumerate(zip(sites, addresses, strict=True)):
            for address in pair:
                with site.visit(visitor, address) as visit:
                    answer = visit.get()
                assert answer.body == f"site {number}".encode()
                assert answer.seen_from == address, "from the address that was dialled"
        with pytest.raises(ConnectionResetError), sites[0].visit(visitor, "10.88.0.4"):
            pass
        proxy.stop()
    assert "No web server answers on port 443 of 10.88.0.4: " in proxy.log
    assert "came back" not in proxy.log


@every_redirect
def test_original_in_a_local_network(
    road: Street, site: Website, proxy: Proxy, redirect: str
) -> None:
    """An address that belongs to this host only by a local route is served like any other."""
    visitor = road.visitor.namespace
    for network, via in (("192.0.2.0/24", road.host.ipv4), ("2001:db8::/64", road.host.ipv6)):
        road.host.namespace.ip(f"route add local {network} dev lo")
        visitor.ip(f"route add {network} via {via}")
    proxy.start("--fallback", "original", "--redirect", redirect, "--linger", "1")
    for address in ("192.0.2.5", "2001:db8::5", road.host.ipv4, road.host.ipv6):
        with site.visit(visitor, address) as visit:
            answer = visit.get()
            assert (answer.body, answer.seen_from) == (PAGE, address)
    proxy.stop()
    assert "came back" not in proxy.log


def test_probe(road: Street, tmp_path: Path) -> None:
    """C{check --probe} tests the targets as they will be used: with a header if one is to be sent,
    and through an address that has a web server, because the probe's own addresses have none."""
    proxy = Proxy(road.host.namespace, tmp_path)
    with website(road.host.namespace, tmp_path / "site"):
        fallback = ("--fallback", TOLD, "--fallback-proxy-protocol", "v2")
        assert "failed" not in proxy.run("check", "--probe", *fallback).stdout
        wrong = proxy.run("check", "--fallback", TOLD, check=False)
        assert f"{TOLD} does not answer TLS" in wrong.stdout
    with website(road.host.namespace, tmp_path / "one", (), (road.host.ipv4,)):
        found = proxy.run("check", "--probe", "--fallback", "original").stdout
    assert "failed" not in found
    assert f"no web server answers on port 443 of {road.host.ipv6}" in found


def test_original_without_a_web_server(road: Street, tmp_path: Path) -> None:
    """If no address has a web server, C{start} refuses."""
    proxy = Proxy(road.host.namespace, tmp_path)
    done = proxy.start("--fallback", "original", check=False)
    assert done.returncode == 78
    assert "no web server answers on port 443 at any address of this host" in done.stderr
    assert road.host.namespace.rules() == []


def test_own_port_with_original(road: Street, site: Website, proxy: Proxy) -> None:
    """A visitor that connects to port 21443 gets the web server on port 443 of that address; there
    is no loop."""
    proxy.start("--fallback", "original", "--linger", "1")
    for address in (road.host.ipv4, road.host.ipv6):
        with closing(site.visit_on(dial(road.visitor.namespace, address, 21443))) as visit:
            answer = visit.get()
            assert (answer.body, answer.seen_from) == (PAGE, address)
    proxy.stop()


# ACME clients


def test_two_clients_at_once(road: Street, site: Website, proxy: Proxy, tmp_path: Path) -> None:
    """Two ACME clients, each with a separate responder, get certificates at the same time; one of
    them serves all names of a wildcard."""
    proxy.start("--alpn-for", "*.Shop.Example=127.0.0.1:31444", "--linger", "1")
    with (
        pebble(road.visitor, road.host, tmp_path / "ca") as ca,
        ThreadPoolExecutor(2) as clients,
    ):
        host = road.host.namespace
        one = clients.submit(lego, host, ca, tmp_path / "one", "site.example")
        names = ("a.shop.example", "b.shop.example")
        other = clients.submit(
            lego, host, ca, tmp_path / "other", *names, responder="127.0.0.1:31444"
        )
        assert one.result().names == ["site.example"]
        assert other.result().names == list(names)
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
    rows = [re.split("  +", line.strip()) for line in proxy.run("status").stdout.splitlines()]
    assert ["acme for *.shop.example", "127.0.0.1:31444", "0", "6", "0"] in [
        row[:5] for row in rows
    ]
    assert ["acme", "127.0.0.1:31443", "0", "3", "0"] in [row[:5] for row in rows]
    proxy.stop()


def test_address_as_identifier(road: Street, site: Website, proxy: Proxy) -> None:
    """A validation of an IP address asks for its reverse name, and goes to the ACME client of that
    address."""
    ipv4, ipv6 = road.host.ipv4, road.host.ipv6
    proxy.start(
        *("--alpn-for", f"{ipv4}=127.0.0.1:31444", "--alpn-for", f"{ipv6}=127.0.0.1:31445"),
        *("--linger", "1"),
    )
    for port, name in (
        (31444, "1.0.88.10.in-addr.arpa"),
        (31445, f"1.{'0.' * 27}8.8.d.f.ip6.arpa"),
        (31443, "2.0.88.10.in-addr.arpa"),
    ):
        with (
            road.host.namespace.listen("127.0.0.1", port) as responder,
            validation(road.visitor.namespace, ipv4, name),
        ):
            accepted, _ = responder.accept()
            accepted.close()
    proxy.stop()


def test_client_on_another_host(tmp_path: Path) -> None:
    """A host can send validations to an ACME client on another host, which gets its certificate."""
    with (
        gateway() as way,
        website(way.host, tmp_path / "site"),
        pebble(way.outer, Node(way.host, "10.88.2.1", "fd88:2::1"), tmp_path / "ca") as ca,
    ):
        proxy = Proxy(way.host, tmp_path / "proxy")
        responder = f"{way.inner.ipv4}:31443"
        proxy.start("--alpn", responder, "--linger", "1")
        issued = lego(
            way.inner.namespace, ca, tmp_path / "lego", "site.example", responder=responder
        )
        assert issued.names == ["site.example"]
        assert f"to acme target {responder}" in proxy.log
        proxy.stop()
