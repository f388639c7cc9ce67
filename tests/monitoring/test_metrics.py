"""The numbers for Prometheus."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.main import CONNECTION_DONE
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.test.requesthelper import DummyRequest
from zope.interface import implementer

from acme_alpn_proxy import tap
from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.monitoring.metrics import DEADLINE, MOST_CONNECTIONS, MetricsService
from acme_alpn_proxy.monitoring.status import ProxyStatus
from acme_alpn_proxy.options import ConsoleOptions, ProxyOptions
from acme_alpn_proxy.service import ProxyService

from ..memory import MemoryReactor
from ..test_options import console, refusal
from .descriptions import describe, statistics


@implementer(IStreamServerEndpoint)
class Endpoint:
    """Can be listened at, or not."""

    def __init__(self, problem: Exception | None = None) -> None:
        self._problem = problem
        self.story: list[str] = []

    def listen(self, protocolFactory: Any) -> Deferred[Any]:
        if self._problem is not None:
            return fail(self._problem)
        self.story.append("listen")
        self.site = protocolFactory
        return succeed(self)

    def stopListening(self) -> Deferred[None]:
        self.story.append("stop")
        return succeed(None)


class MetricsTests(SynchronousTestCase):
    def page(self, about: ProxyStatus) -> list[str]:
        """The page that Prometheus reads."""
        endpoint = Endpoint()
        service = MetricsService(Clock(), endpoint, "tcp:9", lambda: about)
        service.privilegedStartService()
        request = DummyRequest([b""])
        site = endpoint.site.wrappedFactory
        page: bytes = site.resource.render(request)
        (kind,) = request.responseHeaders.getRawHeaders("content-type") or ()
        self.assertIn("text/plain", kind)
        site.log(request)
        return page.decode().splitlines()

    def test_numbers(self) -> None:
        """Each number of C{status} is a metric."""
        lines = self.page(describe())
        for line in (
            "acme_alpn_proxy_running 1.0",
            'acme_alpn_proxy_live_connections{route="acme"} 1.0',
            'acme_alpn_proxy_live_connections{route="undecided"} 2.0',
            'acme_alpn_proxy_connections_total{route="fallback"} 1.0',
            'acme_alpn_proxy_target_failures_total{route="acme"} 0.0',
            'acme_alpn_proxy_bytes_total{direction="to_visitors",route="fallback"} 20.0',
            'acme_alpn_proxy_fallback_reasons_total{reason="no_acme_alpn"} 1.0',
            "acme_alpn_proxy_validations_cut_short_total 0.0",
            "acme_alpn_proxy_last_validation_timestamp_seconds 1000.0",
        ):
            self.assertIn(line, lines)

    def test_nothing_yet(self) -> None:
        """Before anything has happened, all numbers are 0."""
        lines = self.page(statistics().status("none", 0))
        self.assertIn("acme_alpn_proxy_running 0.0", lines)
        self.assertIn("acme_alpn_proxy_last_validation_timestamp_seconds 0.0", lines)

    def serve(self) -> tuple[Any, Clock]:
        """The factory that listens, and its clock."""
        endpoint, clock = Endpoint(), Clock()
        MetricsService(clock, endpoint, "tcp:9", describe).privilegedStartService()
        return endpoint.site, clock

    def connect(self, factory: Any) -> tuple[Any, StringTransport] | None:
        protocol = factory.buildProtocol(IPv4Address("TCP", "127.0.0.1", 1))
        if protocol is None:
            return None
        transport = StringTransport()
        protocol.makeConnection(transport)
        return protocol, transport

    def test_bodies(self) -> None:
        """A request with a body is refused before any of that is read; one without is answered."""
        factory, _ = self.serve()
        for head in (b"Content-Length: 300000000", b"Transfer-Encoding: chunked"):
            connected = self.connect(factory)
            assert connected is not None
            protocol, transport = connected
            protocol.dataReceived(b"POST / HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
            self.assertTrue(transport.value().startswith(b"HTTP/1.1 413 "))
            self.assertTrue(transport.disconnecting)
        connected = self.connect(factory)
        assert connected is not None
        protocol, transport = connected
        protocol.dataReceived(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertIn(b" 200 ", transport.value().partition(b"\r\n")[0])

    def test_one_request(self) -> None:
        """A connection serves one request: the rest of a thousand in a row is ignored."""
        for method, body in ((b"GET", b"acme_alpn_proxy_running"), (b"HEAD", b"")):
            factory, _ = self.serve()
            connected = self.connect(factory)
            assert connected is not None
            protocol, transport = connected
            with capturedLogs() as events:
                protocol.dataReceived((method + b" / HTTP/1.1\r\nHost: x\r\n\r\n") * 1_000)
            self.assertEqual(events, [])
            answer = transport.value()
            self.assertEqual(answer.count(b"HTTP/1.1 "), 1)
            self.assertIn(b"Connection: close\r\n", answer)
            head, _, page = answer.partition(b"\r\n\r\n")
            self.assertEqual(bool(page), bool(body))
            self.assertIn(body, page)
            length = re.search(rb"(?i)content-length: ([0-9]+)", head)
            assert length is not None
            self.assertGreater(int(length[1]), 1_000)
            self.assertTrue(transport.disconnecting)

    def test_methods(self) -> None:
        """Nothing but GET and HEAD is answered with the numbers."""
        for method in (b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"FOO"):
            factory, _ = self.serve()
            connected = self.connect(factory)
            assert connected is not None
            protocol, transport = connected
            protocol.dataReceived(method + b" / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertRegex(transport.value(), b"^HTTP/1.1 (405|501) ")
            self.assertNotIn(b"acme_alpn_proxy_running", transport.value())

    def test_idle_connections(self) -> None:
        """There are at most eight connections at a time, and each ends after ten seconds in any
        case."""
        factory, clock = self.serve()
        connected = [self.connect(factory) for _ in range(MOST_CONNECTIONS)]
        self.assertIsNone(self.connect(factory))
        clock.advance(DEADLINE)
        for each in connected:
            assert each is not None
            protocol, transport = each
            self.assertTrue(transport.disconnected)
            protocol.connectionLost(Failure(CONNECTION_DONE))
        self.assertIsNotNone(self.connect(factory))

    def test_life(self) -> None:
        """It listens once, from the start to the stop, and again."""
        endpoint = Endpoint()
        service = MetricsService(Clock(), endpoint, "tcp:9", describe)
        self.assertIsNone(service.stopService())
        for _ in range(2):
            service.privilegedStartService()
            service.startService()
            stopped = service.stopService()
            assert stopped is not None
            self.successResultOf(stopped)
        self.assertEqual(endpoint.story, ["listen", "stop"] * 2)

    def test_port_taken(self) -> None:
        """If the service cannot listen, the start is refused, and the error names the option."""
        taken = CannotListenError("127.0.0.1", 9, OSError(98, "Address already in use"))
        service = MetricsService(Clock(), Endpoint(taken), "tcp:9", describe)
        with self.assertRaisesRegex(StartError, r"--metrics tcp:9: .*in use.*; choose another"):
            service.privilegedStartService()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("9443", "tcp:9443:interface=127.0.0.1"),
        ("tcp:9443", "tcp:9443:interface=127.0.0.1"),
        ("tcp:9443:interface=0.0.0.0", "tcp:9443:interface=0.0.0.0"),
        ("unix:/run/metrics.sock", "unix:/run/metrics.sock"),
    ],
)
def test_option(given: str, taken: str) -> None:
    """A port without a host is one of this host's loopback."""
    assert console("start", "--metrics", given)["metrics"] == taken


def test_bad_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is no endpoint is refused. Without prometheus_client the option is refused, with
    a remedy."""
    assert "--metrics 'no': a port or a server endpoint" in refusal("start", "--metrics", "no")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal("start", "--metrics", "9443") == (
        "--metrics needs prometheus_client; pip install 'acme-alpn-proxy[metrics]', or apt install"
        " python3-prometheus-client"
    )


def test_order() -> None:
    """Metrics run beside the proxy, in the program and in any other application."""
    options = ConsoleOptions()
    options.environment = {}
    options.parseOptions(["--redirect=none", "--metrics=9443", "start"])
    (proxy,) = tap.make_program(options, MemoryReactor())
    library = ProxyOptions()
    library.environment = {}
    library.parseOptions(["--redirect=none", "--metrics=9443"])
    for made in (proxy, tap.makeService(library)):
        assert isinstance(made, ProxyService)
        assert "MetricsService" in [type(service).__name__ for service in made]
