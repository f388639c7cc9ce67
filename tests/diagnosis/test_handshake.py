"""The TLS handshake that tests a target, in memory."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.addresses import parse_address
from acme_alpn_proxy.diagnosis.handshake import (
    HANDSHAKE_DEADLINE,
    Handshake,
    OnlyAlert,
    handshake,
)

from ..integration.pki import Authority
from ..memory import MemoryReactor
from .folders import folder_for


class HandshakeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.transport = StringTransport()

    def client(self, *alpn: str) -> Handshake:
        client = Handshake("site.example", *alpn)
        client.makeConnection(self.transport)
        return client

    def serve(self, client: Handshake, *protocols: str) -> None:
        """Play the server until neither side has anything more to send."""
        folder = folder_for(self)
        pair = Authority(folder).issue("site", "site.example")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        context.set_alpn_protocols(protocols)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = context.wrap_bio(incoming, outgoing, server_side=True)
        while self.transport.value():
            incoming.write(self.transport.value())
            self.transport.clear()
            with contextlib.suppress(ssl.SSLWantReadError):
                server.do_handshake()
            client.dataReceived(outgoing.read())

    def test_done(self) -> None:
        """It ends with the agreed protocol, and closes; how the other end closes does not
        matter."""
        client = self.client("acme-tls/1")
        self.serve(client, "acme-tls/1")
        self.assertEqual(self.successResultOf(client.done), "acme-tls/1")
        self.assertTrue(self.transport.disconnected)
        client.connectionLost()

    def test_header(self) -> None:
        """A header for the target goes in one write with the hello."""
        writes: list[bytes] = []
        self.patch(self.transport, "write", writes.append)
        client = Handshake("site.example", header=b"PROXY UNKNOWN\r\n")
        client.makeConnection(self.transport)
        (sent,) = writes
        self.assertTrue(sent.startswith(b"PROXY UNKNOWN\r\n\x16\x03"), sent)

    def test_no_tls(self) -> None:
        """Another protocol's answer is an error."""
        client = self.client()
        client.dataReceived(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        self.failureResultOf(client.done, ssl.SSLError)

    def test_alert(self) -> None:
        """An alert and bytes that are not TLS are different results."""
        client = self.client()
        client.dataReceived(b"\x15\x03\x03\x00\x02\x02\x70")
        self.failureResultOf(client.done, OnlyAlert)

    def test_closed(self) -> None:
        """A connection that is closed midway is an error."""
        client = self.client()
        client.connectionLost()
        self.failureResultOf(client.done, ConnectionResetError)

    def test_silence(self) -> None:
        """If the target does not answer in time, the connection is closed."""
        clock = MemoryReactor()
        client = self.client()
        transport = self.transport

        class Endpoint:
            def connect(self, factory: Any) -> Deferred[Any]:
                protocol = factory.buildProtocol(None)
                protocol.makeConnection(transport)
                return succeed(protocol)

        self.patch(type(parse_address("h:1")), "endpoint", lambda *arguments: Endpoint())
        waiting = handshake(clock, parse_address("127.0.0.1:443"), 1.0)
        self.assertNoResult(waiting)
        clock.advance(HANDSHAKE_DEADLINE)
        problem: Any = self.failureResultOf(waiting, TimeoutError).value
        self.assertEqual(problem.strerror, "no answer within 10 s")
        self.assertTrue(transport.disconnected)
        self.assertNoResult(client.done)
