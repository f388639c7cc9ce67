"""Attacks, and the visitors that come during them, each as a separate process in a namespace.

Run as C{python -m bench.attackers NAME ADDRESS [SECONDS]}. Each attack has a fixed rate and a limit
on its connections, and continues until its process is ended.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from tests.hellos import alpn_extension, extension, message, padded_message, records, vector

METRICS_PORT = 9443
PAGE_END = b"</p>\n"

_VISITORS = 2
_PAUSE = 0.02
_DESCRIPTORS = 12_000
_WEB = records(message(alpn_extension(b"h2", b"http/1.1")))
_ACME = records(message(alpn_extension(b"acme-tls/1")))


def visits(address: str, seconds: float) -> None:
    """Print how many seconds each visit took, from connect(2) to the end of the page, and why some
    failed."""
    took: list[float] = []
    failures: list[str] = []
    end = time.monotonic() + seconds
    tls = _tls()

    def visit() -> None:
        connection = socket.create_connection((address, 443), 10)
        with tls.wrap_socket(connection, server_hostname="site.example") as stream:
            stream.sendall(b"GET / HTTP/1.0\r\n\r\n")
            page = b""
            while piece := stream.recv(65_536):
                page += piece
        if not page.endswith(PAGE_END):
            raise EOFError("a page that is not whole")

    def come_again_and_again() -> None:
        while time.monotonic() < end:
            began = time.perf_counter()
            try:
                visit()
            except (OSError, EOFError) as problem:
                failures.append(str(problem))
            took.append(time.perf_counter() - began)
            time.sleep(_PAUSE)

    threads = [threading.Thread(target=come_again_and_again) for _ in range(_VISITORS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"took": took, "failures": failures}))


def tiny_records(address: str) -> None:
    """100 hellos a second of 126 KB for the ACME client, in records of one byte."""
    _send_tiny_records(address, b"acme-tls/1")


def tiny_records_to_the_site(address: str) -> None:
    """100 hellos a second of 126 KB for the web server, which has to read them, too."""
    _send_tiny_records(address, b"h2")


def half_hellos(address: str) -> None:
    """500 connections a second that send half a hello and then nothing, 2,000 at a time."""
    _hold(address, 443, _WEB[: len(_WEB) // 2], 500, 2_000)


def trickled_hellos(address: str) -> None:
    """300 connections that send their hello byte by byte, 3,000 bytes a second in all."""
    connections = [_opened(address, 443, b"") for _ in range(300)]
    said = [0] * len(connections)
    for number in _paced(3_000):
        at = number % len(connections)
        try:
            connections[at].send(_WEB[said[at] : said[at] + 1])
            said[at] = (said[at] + 1) % len(_WEB)
        except OSError:
            connections[at].close()
            connections[at], said[at] = _opened(address, 443, b""), 0


def resets(address: str) -> None:
    """500 connections a second that send a hello and are reset at once."""
    for _ in _paced(500):
        with suppress(OSError), _opened(address, 443, _WEB) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def syns(address: str) -> None:
    """5,000 SYNs a second from forged addresses on the visitors' network, and no other packet."""
    network = address.rpartition(".")[0]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for number in _paced(5_000):
            source = socket.inet_aton(f"{network}.{3 + number % 250}")
            packet = _syn(source, socket.inet_aton(address), 1_024 + number // 250 % 60_000)
            with suppress(OSError):
                raw.sendto(packet, (address, 0))


def stalled_downloads(address: str) -> None:
    """100 downloads of 20 MB that nobody reads."""
    tls, held = _tls(), []
    for _ in range(100):
        connection = socket.create_connection((address, 443), 10)
        stream = tls.wrap_socket(connection, server_hostname="site.example")
        stream.sendall(b"GET /big HTTP/1.0\r\n\r\n")
        held.append(stream)
    _wait()


def long_names(address: str) -> None:
    """100 hellos a second for the ACME client, with a server name of 60,000 bytes."""
    name = extension(0, vector(2, b"\0" + vector(2, b"\1" * 60_000)))
    hello = records(message(name, alpn_extension(b"acme-tls/1")))
    for _ in _paced(100):
        with suppress(OSError), socket.create_connection((address, 443), 5) as connection:
            connection.sendall(hello)


def endless_validations(address: str) -> None:
    """200 connections a second for the ACME client that stay open, 5,000 at a time."""
    _hold(address, 443, _ACME, 200, 5_000)


def idle_metrics(address: str) -> None:
    """1,080 silent connections to the port of C{--metrics}, opened again when they are closed."""
    _hold("127.0.0.1", METRICS_PORT, b"", 500, 1_080)


ATTACKS: dict[str, Callable[[str], None]] = {
    each.__name__: each
    for each in (
        tiny_records,
        tiny_records_to_the_site,
        half_hellos,
        trickled_hellos,
        resets,
        syns,
        stalled_downloads,
        long_names,
        endless_validations,
        idle_metrics,
    )
}


def _send_tiny_records(address: str, name: bytes) -> None:
    hello = records(padded_message(21_000, alpn_extension(name)), 1)
    for _ in _paced(100):
        with suppress(OSError), socket.create_connection((address, 443), 5) as connection:
            connection.sendall(hello)


def _paced(rate: float) -> Iterator[int]:
    """Yield numbers, C{rate} a second; a caller that is late does not catch up."""
    due = time.monotonic()
    for number in itertools.count():
        yield number
        now = time.monotonic()
        due = max(due + 1 / rate, now - 0.05)
        time.sleep(max(0, due - now))


def _hold(address: str, port: int, said: bytes, rate: float, most: int) -> None:
    """Keep the newest C{most} connections open, after each has sent these bytes."""
    held: list[socket.socket | None] = [None] * most
    for number in _paced(rate):
        at = number % most
        before = held[at]
        if before is not None:
            before.close()
        held[at] = _opened(address, port, said)


def _opened(address: str, port: int, said: bytes) -> socket.socket:
    """A connection that has sent these bytes; the peer may have refused it."""
    connection = socket.socket()
    connection.settimeout(1)
    with suppress(OSError):
        connection.connect((address, port))
        connection.sendall(said)
    return connection


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _syn(source: bytes, destination: bytes, port: int) -> bytes:
    """An IPv4 packet with a TCP header (RFC 9293 section 3.1); the kernel adds IP's checksum."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, 6, 0, source, destination)
    fields = [port, 443, int.from_bytes(os.urandom(4), "big"), 0, 0x5002, 64_240]
    pseudo = source + destination + struct.pack("!HH", 6, 20)
    words = struct.unpack("!16H", pseudo + struct.pack("!HHIIHHHH", *fields, 0, 0))
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return ip + struct.pack("!HHIIHHHH", *fields, checksum, 0)


def _wait() -> None:
    threading.Event().wait()


if __name__ == "__main__":
    _, name, address, *seconds = sys.argv
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, max(hard, _DESCRIPTORS)))
    if seconds:
        visits(address, float(seconds[0]))
    else:
        ATTACKS[name](address)
