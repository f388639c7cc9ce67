"""Connections through the proxy on real loopback sockets: what each side sees."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import resource
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from ipaddress import ip_network
from typing import Any

from twisted.internet import reactor as global_reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from acme_alpn_proxy.addresses import parse_address
from acme_alpn_proxy.interfaces import INetwork
from acme_alpn_proxy.proxy.balancer import Balancers
from acme_alpn_proxy.proxy.header import encode_v1, encode_v2
from acme_alpn_proxy.proxy.listener import listening_socket
from acme_alpn_proxy.proxy.protocols import Limits, ProxyServerFactory
from acme_alpn_proxy.proxy.routing import Route, Routing
from acme_alpn_proxy.proxy.targets import HeadedTarget
from acme_alpn_proxy.transports.hangup import hangup_watch
from acme_alpn_proxy.transports.network import LeanNetwork, TwistedNetwork
from acme_alpn_proxy.transports.sockets import NEAR_BUFFER, UNSENT

from .. import hellos
from ..hellos import ACME_HELLO, WEB_HELLO
from ..loopback import WAIT, read_exactly, reset, was_reset
from ..memory import log_of

reactor: Any = global_reactor


def in_thread(test: Callable[[Any], None]) -> Callable[[Any], Deferred[None]]:
    """Run a test that blocks beside the reactor."""

    @functools.wraps(test)
    def run(self: Any) -> Deferred[None]:
        return deferToThread(test, self)

    return run


class Target:
    """A listening socket in the place of a web server or a responder."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.listener.settimeout(WAIT)

    @property
    def address(self) -> str:
        host, port = self.listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(WAIT)
        return connection


def unreached() -> None:
    """Called at the limit of connections, which no test here reaches."""
    raise AssertionError("too many connections")


class ConnectionTests(TestCase):
    """A proxy on a loopback port, with a responder and a web server as its targets."""

    timeout = 60
    network: Callable[[Any], INetwork] = LeanNetwork
    hello_timeout = 30.0
    connect_timeout = 30.0

    def setUp(self) -> None:
        self.responder = Target(socket.create_server(("127.0.0.1", 0)))
        self.website = Target(socket.create_server(("127.0.0.1", 0), backlog=4_096))
        self.addCleanup(self.responder.listener.close)
        self.addCleanup(self.website.listener.close)
        self.lines = log_of(self)

    def start(self, fallback: str | None = None) -> None:
        """Start the proxy (in the reactor's thread)."""
        acme = Route("acme", self.responder.address)
        web = Route("fallback", fallback or self.website.address)
        self.transports = self.network(reactor)
        self.transports.open()
        self.factory = ProxyServerFactory(
            Routing(acme, web),
            {
                way: self.transports.target(parse_address(way.target), self.connect_timeout)
                for way in (acme, web)
            },
            reactor,
            hello_timeout=self.hello_timeout,
        )
        self.factory.open(hangup_watch(reactor), Limits(10_000, 10_000), unreached, unreached)
        self.listener = listening_socket("127.0.0.1", 0)
        self.port = self.transports.listen(self.listener, self.factory)
        self.addCleanup(self.end)

    @inlineCallbacks
    def end(self) -> Any:
        """Stop it; every connection must leave the live set."""
        yield self.port.stopListening()
        self.listener.close()
        self.factory.live.abort_all()
        yield self.factory.live.drained(reactor, 5)
        self.assertEqual(self.factory.held, 0)
        self.assertFalse(self.factory.pipe.lent)
        self.factory.close()
        self.transports.close()

    def visit(self, hello: bytes = b"") -> socket.socket:
        """Connect, from the test's thread, and send C{hello}."""
        connection = socket.create_connection(("127.0.0.1", self.listener.getsockname()[1]), WAIT)
        connection.sendall(hello)
        return connection

    def connect(self, hello: bytes = WEB_HELLO) -> tuple[socket.socket, socket.socket]:
        """A visitor and the web server's end, the hello read off it."""
        visitor = self.visit(hello)
        server = self.website.accept()
        self.assertEqual(read_exactly(server, len(hello)), hello)
        return visitor, server


class RouteTests(ConnectionTests):
    """Where connections go."""

    def setUp(self) -> None:
        super().setUp()
        self.start()

    @in_thread
    def test_acme(self) -> None:
        """A hello that offers acme-tls/1 reaches the responder byte for byte, with all bytes after
        it."""
        sent = ACME_HELLO + b"and more"
        with self.visit(sent), self.responder.accept() as responder:
            self.assertEqual(read_exactly(responder, len(sent)), sent)
        (line,) = [e for e in self.lines if e.get("route") == "acme"]
        self.assertEqual(line["server_name"], "site.example")
        self.assertTrue(line["peer"].startswith("127.0.0.1:"))

    @in_thread
    def test_visitor(self) -> None:
        """Any other hello reaches the web server, and the answer comes back."""
        visitor, server = self.connect()
        with visitor, server:
            server.sendall(b"answer")
            self.assertEqual(read_exactly(visitor, 6), b"answer")
            visitor.sendall(b"again")
            self.assertEqual(read_exactly(server, 5), b"again")

    @in_thread
    def test_not_tls(self) -> None:
        """Bytes that are not TLS go to the web server at once, which knows best how to answer."""
        visitor, server = self.connect(b"GET / HTTP/1.0\r\n\r\n")
        visitor.close()
        server.close()

    @in_thread
    def test_pieces(self) -> None:
        """A hello that comes in two segments is put together before the decision."""
        visitor = self.visit()
        visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        visitor.sendall(ACME_HELLO[:100])
        while self.factory.held != 200:  # each byte twice
            time.sleep(0.001)
        visitor.sendall(ACME_HELLO[100:])
        with visitor, self.responder.accept() as responder:
            self.assertEqual(read_exactly(responder, len(ACME_HELLO)), ACME_HELLO)

    @in_thread
    def test_largest_hello(self) -> None:
        """A hello of the largest size in the most records comes through whole."""
        handshake = hellos.padded_message(65_536, hellos.alpn_extension(b"acme-tls/1"))
        sent = hellos.records(handshake[:2_044], 1) + hellos.records(handshake[2_044:])
        with self.visit() as visitor:
            sender = threading.Thread(target=visitor.sendall, args=(sent,))
            sender.start()
            with self.responder.accept() as responder:
                self.assertEqual(read_exactly(responder, len(sent)), sent)
            sender.join()

    @in_thread
    def test_too_large_hello(self) -> None:
        """A hello over the limit reaches the web server, every byte of it."""
        handshake = hellos.padded_message(65_536, hellos.alpn_extension(b"acme-tls/1"))
        sent = hellos.records(handshake, 1)
        with self.visit() as visitor:
            sender = threading.Thread(target=visitor.sendall, args=(sent,))
            sender.start()
            with self.website.accept() as server:
                self.assertEqual(read_exactly(server, len(sent)), sent)
            sender.join()

    @in_thread
    def test_end_before_the_hello(self) -> None:
        """An end-of-file before the verdict goes to the web server at once, after the bytes."""
        for sent in (b"", WEB_HELLO[:50]):
            with self.visit(sent) as visitor:
                visitor.shutdown(socket.SHUT_WR)
                with self.website.accept() as server:
                    self.assertEqual(read_exactly(server, 1_000), sent)
                    server.sendall(b"alert")
                self.assertEqual(read_exactly(visitor, 1_000), b"alert")


class SilenceTests(ConnectionTests):
    """The hello deadline."""

    hello_timeout = 0.1

    def setUp(self) -> None:
        super().setUp()
        self.start()

    @in_thread
    def test_silence_and_half_hellos(self) -> None:
        """Silence and half a hello go to the web server after the deadline, and go on there."""
        for sent in (b"", ACME_HELLO[:60]):
            visitor, server = self.connect(sent)
            with visitor, server:
                visitor.sendall(b"late")
                self.assertEqual(read_exactly(server, 4), b"late")


class EndTests(ConnectionTests):
    """An end on one side is the same end on the other."""

    def setUp(self) -> None:
        super().setUp()
        self.start()

    @in_thread
    def test_visitor_half_closes(self) -> None:
        """A visitor's FIN reaches the web server, and its answer still comes through."""
        visitor, server = self.connect()
        with visitor, server:
            visitor.shutdown(socket.SHUT_WR)
            self.assertEqual(server.recv(1), b"")
            server.sendall(b"answer")
            server.close()
            self.assertEqual(read_exactly(visitor, 1_000), b"answer")

    @in_thread
    def test_server_half_closes(self) -> None:
        """The web server's FIN reaches the visitor, and the visitor can still send."""
        visitor, server = self.connect()
        with visitor, server:
            server.shutdown(socket.SHUT_WR)
            self.assertEqual(visitor.recv(1), b"")
            visitor.sendall(b"more")
            visitor.close()
            self.assertEqual(read_exactly(server, 1_000), b"more")

    @in_thread
    def test_visitor_resets(self) -> None:
        """A visitor's reset reaches the web server as a reset."""
        visitor, server = self.connect()
        with server:
            reset(visitor)
            self.assertTrue(was_reset(server))

    @in_thread
    def test_server_resets(self) -> None:
        """The web server's reset reaches the visitor as a reset."""
        visitor, server = self.connect()
        with visitor:
            reset(server)
            self.assertTrue(was_reset(visitor))

    @in_thread
    def test_reset_after_half_close(self) -> None:
        """A reset is passed on at once even when its side had sent its FIN already."""
        visitor, server = self.connect()
        with server:
            visitor.shutdown(socket.SHUT_WR)
            self.assertEqual(server.recv(1), b"")
            reset(visitor)
            self.assertTrue(was_reset(server))
        visitor, server = self.connect()
        with visitor:
            server.shutdown(socket.SHUT_WR)
            self.assertEqual(visitor.recv(1), b"")
            reset(server)
            self.assertTrue(was_reset(visitor))

    @in_thread
    def test_reset_under_back_pressure(self) -> None:
        """A reset is passed on at once, even while the side that sends it is not read."""
        visitor, server = self.connect()
        with server:
            fill(visitor)
            reset(visitor)
            self.assertTrue(was_reset(server))

    @in_thread
    def test_bytes_before_a_reset(self) -> None:
        """What the web server wrote before its reset still reaches the visitor."""
        visitor, server = self.connect()
        with visitor:
            visitor.sendall(b"unread")
            self.assertTrue(select.select([server], [], [], WAIT)[0])
            server.sendall(b"last words")
            self.assertEqual(read_exactly(visitor, 10), b"last words")
            server.sendall(b"!")
            server.close()  # with bytes unread the kernel resets
            self.assertTrue(was_reset(visitor))

    @in_thread
    def test_all_ends_are_seen(self) -> None:
        """After any kind of end no connection is left in the live set."""
        for end in (socket.socket.close, reset):
            visitor, server = self.connect()
            end(visitor)
            server.close()
            visitor, server = self.connect()
            end(server)
            visitor.close()
        with self.visit(WEB_HELLO[:5]) as visitor:
            reset(visitor)
        deadline = time.monotonic() + WAIT
        while len(self.factory.live) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.assertEqual(len(self.factory.live), 0)

    @in_thread
    def test_drain_deadline(self) -> None:
        """Aborted, a connection is reset on both sides."""
        visitor, server = self.connect()
        with visitor, server:
            reactor.callFromThread(self.factory.live.abort_all)
            self.assertTrue(was_reset(visitor))
            self.assertTrue(was_reset(server))


def fill(connection: socket.socket) -> int:
    """Send until the peer takes nothing for a while; return the number of bytes that were sent."""
    connection.setblocking(False)
    total = 0
    while select.select([], [connection], [], 0.3)[1]:
        total += connection.send(bytes(65_536))
    return total


def queued(connection: socket.socket) -> tuple[int, int]:
    """Bytes of kernel memory for data received and not read, and for data to be sent (SO_MEMINFO,
    <linux/sock_diag.h>)."""
    received, _, _, _, _, to_send = struct.unpack(
        "6I", connection.getsockopt(socket.SOL_SOCKET, 55, 24)
    )
    return received, to_send


class BulkTests(ConnectionTests):
    """Many bytes, many connections."""

    most_held = 65_536
    most_to_send: float = 2 * UNSENT

    def setUp(self) -> None:
        super().setUp()
        self.start()

    def held(self, transport: Any) -> int:
        return len(transport.waiting)

    def sock(self, transport: Any) -> Any:
        return transport._socket

    @in_thread
    def test_back_pressure(self) -> None:
        """Bytes that a side does not take are not read from the other: memory stays bounded, and
        nothing is lost."""
        visitor, server = self.connect()
        with visitor, server:
            for sender, receiver in ((visitor, server), (server, visitor)):
                sent = fill(sender)
                (connection,) = self.factory.live
                relay = connection.relay  # type: ignore[attr-defined]
                for sink in (relay._front, relay._back):
                    self.assertLessEqual(self.held(sink), self.most_held)
                receiver.settimeout(WAIT)
                self.assertEqual(len(read_exactly(receiver, sent)), sent)

    @in_thread
    def test_visitor_that_stops_reading(self) -> None:
        """A visitor that stops reading does not fill the host's memory for TCP: less than a
        megabyte from the web server waits in the proxy's sockets."""
        visitor, server = self.connect()
        with visitor, server:
            fill(server)
            (connection,) = self.factory.live
            relay = connection.relay  # type: ignore[attr-defined]
            received, _ = queued(self.sock(relay._back))
            _, to_send = queued(self.sock(relay._front))
            self.assertLessEqual(received, 2 * NEAR_BUFFER + 65_536)
            self.assertLessEqual(to_send, self.most_to_send)

    @in_thread
    def test_both_ways_at_once(self) -> None:
        """20 MB each way at the same time come out as they went in."""
        content = os.urandom(20_000_000)
        visitor, server = self.connect()
        digests = {}

        def send(connection: socket.socket) -> None:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)

        def receive(name: str, connection: socket.socket) -> None:
            digest = hashlib.sha256()
            while piece := connection.recv(1_000_000):
                digest.update(piece)
            digests[name] = digest.digest()

        threads = [threading.Thread(target=send, args=(end,)) for end in (visitor, server)]
        threads += [
            threading.Thread(target=receive, args=pair)
            for pair in (("visitor", visitor), ("server", server))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        visitor.close()
        server.close()
        expected = hashlib.sha256(content).digest()
        self.assertEqual(digests, {"visitor": expected, "server": expected})

    @in_thread
    def test_two_thousand_silent_connections(self) -> None:
        """2,000 silent connections keep no visitor waiting, and none of them is lost."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        silent = [self.visit() for _ in range(2_000)]
        try:
            visitor, server = self.connect()
            visitor.close()
            server.close()
            silent[-1].sendall(b"not silent any more")
            with self.website.accept() as server:
                self.assertEqual(server.recv(3), b"not")
            self.assertGreaterEqual(len(self.factory.live), 1_999)
        finally:
            for connection in silent:
                reset(connection)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class TargetTests(ConnectionTests):
    """Targets of other kinds, and targets that are not there."""

    connect_timeout = 0.2

    def unreachable_lines(self) -> list[tuple[str, str, str]]:
        return [(e["route"], e["target"], e["why"]) for e in self.lines if "why" in e]

    def refusal(self) -> Deferred[None]:
        def visit() -> None:
            with self.visit(WEB_HELLO) as visitor:
                self.assertTrue(was_reset(visitor))

        return deferToThread(visit)

    @inlineCallbacks
    def test_refused(self) -> Any:
        """When the target refuses, the visitor is reset, and one line says which and why."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            target = Target(closed).address
        self.start(target)
        yield self.refusal()
        ((route, where, why),) = self.unreachable_lines()
        self.assertEqual((route, where), ("fallback", target))
        self.assertIn("refused", why)

    @inlineCallbacks
    def test_no_answer(self) -> Any:
        """If the target does not answer in time, the visitor is reset, and one log line says so."""
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
            waiting = []
            for _ in range(3):  # a full accept queue drops SYNs
                connection = socket.socket()
                connection.setblocking(False)
                connection.connect_ex(full.getsockname())
                waiting.append(connection)
            self.start(Target(full).address)
            yield self.refusal()
            for connection in waiting:
                connection.close()
        ((_, _, why),) = self.unreachable_lines()
        self.assertEqual(why, "no answer within 0.2 s")

    @inlineCallbacks
    def test_visitor_leaves_meanwhile(self) -> Any:
        """If a visitor leaves while the target is being connected, the connection ends, without a
        log line."""
        self.connect_timeout = 30.0
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
            waiting = []
            for _ in range(3):
                connection = socket.socket()
                connection.setblocking(False)
                connection.connect_ex(full.getsockname())
                waiting.append(connection)
            self.start(Target(full).address)

            def leave() -> None:
                visitor = self.visit(WEB_HELLO)
                while not any(c._connecting for c in list(self.factory.live)):  # type: ignore[attr-defined]
                    time.sleep(0.001)
                reset(visitor)

            yield deferToThread(leave)
            yield self.factory.live.drained(reactor, 5)
            for connection in waiting:
                connection.close()
        self.assertEqual(self.unreachable_lines(), [])

    @inlineCallbacks
    def test_unix_socket(self) -> Any:
        """A Unix socket can be the target, by endpoint string; half-close passes through."""
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/web")
            listener.listen()
            listener.settimeout(WAIT)
            self.start(f"unix:{folder}/web")

            def visit() -> None:
                with self.visit(WEB_HELLO) as visitor:
                    server, _ = listener.accept()
                    with server:
                        server.settimeout(WAIT)
                        self.assertEqual(read_exactly(server, len(WEB_HELLO)), WEB_HELLO)
                        visitor.shutdown(socket.SHUT_WR)
                        self.assertEqual(server.recv(1), b"")
                        sender = threading.Thread(target=server.sendall, args=(bytes(1_000_000),))
                        sender.start()
                        received = read_exactly(visitor, 1_000_000)
                        sender.join()
                    received += read_exactly(visitor, 1_000_000)
                    self.assertEqual(len(received), 1_000_000)

            yield deferToThread(visit)

    @inlineCallbacks
    def test_ipv6_and_host_names(self) -> Any:
        """IPv6 targets and host names work."""
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            listener.settimeout(WAIT)
            self.start(Target(listener).address)
            self.connect_timeout = 10.0
            yield deferToThread(self.visit_and_greet, listener)

    def visit_and_greet(self, listener: socket.socket) -> None:
        with self.visit(WEB_HELLO):
            server, _ = listener.accept()
            with server:
                server.settimeout(WAIT)
                self.assertEqual(read_exactly(server, len(WEB_HELLO)), WEB_HELLO)

    @inlineCallbacks
    def test_host_name(self) -> Any:
        """A host name is looked up."""
        self.connect_timeout = 10.0
        self.start(f"localhost:{self.website.listener.getsockname()[1]}")
        yield deferToThread(self.visit_and_greet, self.website.listener)


class TwistedRouteTests(RouteTests):
    """The same over Twisted's transports."""

    network = TwistedNetwork


class TwistedSilenceTests(SilenceTests):
    """The same over Twisted's transports."""

    network = TwistedNetwork


class TwistedEndTests(EndTests):
    """The same over Twisted's transports."""

    network = TwistedNetwork

    @inlineCallbacks
    def test_reset_told_as_an_end(self) -> Any:
        """While the kernel processes a reset, the reactor may take it for an end-of-file; it still
        reaches the visitor as a reset."""
        visitor, server = yield deferToThread(self.connect)
        with visitor:
            (connection,) = self.factory.live._live
            back = connection.relay._back  # type: ignore[attr-defined]
            reset(server)
            poll = select.poll()
            poll.register(back.fileno(), 0)
            self.assertTrue(poll.poll(WAIT * 1000))
            back.readConnectionLost(Failure(CONNECTION_DONE))
            yield deferToThread(self.assertRaises, ConnectionResetError, visitor.recv, 1)


class TwistedBulkTests(BulkTests):
    """The same over Twisted's transports."""

    network = TwistedNetwork
    most_held = 131_072
    most_to_send = math.inf
    """What the kernel takes by itself, 4 MiB as a rule, as from the web server without a proxy."""

    def held(self, transport: Any) -> int:
        return len(transport.dataBuffer) + transport._tempDataLen  # type: ignore[no-any-return]

    def sock(self, transport: Any) -> Any:
        return transport.getHandle()


class TwistedTargetTests(TargetTests):
    """The same over Twisted's transports."""

    network = TwistedNetwork


class HeaderTests(ConnectionTests):
    """Connections from a load balancer, to a web server that gets a PROXY header."""

    def setUp(self) -> None:
        super().setUp()
        self.start()
        self.factory.new_server = Balancers([ip_network("127.0.0.0/8")]).new_server
        plain = self.factory._targets
        self.factory._targets = {way: HeadedTarget(plain[way], "v2") for way in plain}

    @in_thread
    def test_both_ways(self) -> None:
        """The header for the target, the hello and all that follows arrive, and so do the answers;
        from the load balancer it may come byte by byte."""
        came = encode_v1(("192.0.2.7", 50_000), ("198.51.100.1", 443))
        goes = encode_v2(("192.0.2.7", 50_000), ("198.51.100.1", 443))
        body = os.urandom(1_000_000)
        with self.visit() as visitor:
            visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in came:
                visitor.sendall(bytes([byte]))
            visitor.sendall(WEB_HELLO)
            with self.website.accept() as server:
                first = server.recv(65_536)
                self.assertEqual(first, goes + WEB_HELLO)
                for sender, receiver in ((visitor, server), (server, visitor)):
                    sending = threading.Thread(target=sender.sendall, args=(body,))
                    sending.start()
                    self.assertEqual(read_exactly(receiver, len(body)), body)
                    sending.join()
                server.shutdown(socket.SHUT_WR)
                self.assertEqual(visitor.recv(1), b"")

    @in_thread
    def test_no_header(self) -> None:
        """Without one it is a reset, and no target is connected."""
        with self.visit(WEB_HELLO) as visitor:
            self.assertTrue(was_reset(visitor))
        self.website.listener.settimeout(0)
        self.assertRaises(BlockingIOError, self.website.accept)


class TwistedHeaderTests(HeaderTests):
    """The same over Twisted's own transports."""

    network = TwistedNetwork
