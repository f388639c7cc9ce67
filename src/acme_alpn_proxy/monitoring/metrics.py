"""The numbers of C{status} for Prometheus, over HTTP. Needs prometheus_client."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IReactorTime, IStreamServerEndpoint
from twisted.internet.protocol import connectionDone
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from ..errors import StartError
from .status import ProxyStatus, RouteStatus

MOST_CONNECTIONS: Final = 8
"""Connections at a time; their descriptors are reserved, so visitors cannot use them."""

DEADLINE: Final = 10.0
"""Seconds that a connection may last."""

_TOO_LARGE: Final = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\n\r\n"


class Collector:
    """A collector for C{CollectorRegistry}: at each scrape it gets the numbers from the proxy."""

    def __init__(self, describe: Callable[[], ProxyStatus]) -> None:
        self._describe = describe

    def describe(self) -> list[Any]:
        """Return no metrics. The registry calls this when the collector is registered, to find
        duplicate names."""
        return []

    def collect(self) -> Iterator[Any]:
        about = self._describe()
        fallback = about["routes"]["fallback"]
        routes: dict[str, RouteStatus] = {"acme": about["routes"]["acme"], "fallback": fallback}
        for name, route in about["routes"]["acme_for"].items():
            routes[f"acme for {name}"] = route
        running = GaugeMetricFamily(
            "acme_alpn_proxy_running", "1 while new connections to :443 are steered here."
        )
        running.add_metric([], about["state"] == "running")
        yield running
        live = GaugeMetricFamily(
            "acme_alpn_proxy_live_connections", "Connections now.", labels=["route"]
        )
        live.add_metric(["undecided"], about["undecided"])
        total = CounterMetricFamily(
            "acme_alpn_proxy_connections", "Connections that were routed.", labels=["route"]
        )
        failures = CounterMetricFamily(
            "acme_alpn_proxy_target_failures", "Targets not reached.", labels=["route"]
        )
        moved = CounterMetricFamily(
            "acme_alpn_proxy_bytes",
            "Bytes passed on by connections that have ended.",
            labels=["route", "direction"],
        )
        for name, route in routes.items():
            live.add_metric([name], route["live"])
            total.add_metric([name], route["total"])
            failures.add_metric([name], route["failures"])
            moved.add_metric([name, "from_visitors"], route["bytes_from_visitors"])
            moved.add_metric([name, "to_visitors"], route["bytes_to_visitors"])
        yield from (live, total, failures, moved)
        reasons = CounterMetricFamily(
            "acme_alpn_proxy_fallback_reasons",
            "Connections sent to the web server, by reason.",
            labels=["reason"],
        )
        for reason, count in fallback["reasons"].items():
            reasons.add_metric([reason], count)
        yield reasons
        seen = CounterMetricFamily(
            "acme_alpn_proxy_fallback_sources",
            "Connections to the web server, by source address: the visitor's or this host's.",
            labels=["source"],
        )
        seen.add_metric(["visitor"], fallback["from_visitor_address"])
        seen.add_metric(["host"], fallback["from_host_address"])
        yield seen
        cut_short = CounterMetricFamily(
            "acme_alpn_proxy_validations_cut_short",
            "Validations that were reset: they took too long, or were too many.",
        )
        cut_short.add_metric([], about["routes"]["acme"]["cut_short"])
        yield cut_short
        last = GaugeMetricFamily(
            "acme_alpn_proxy_last_validation_timestamp_seconds",
            "When the last validation was routed; 0 if there was none.",
        )
        last.add_metric([], about["last_validation"]["at"] if about["last_validation"] else 0)
        yield last


class _Page(Resource):
    isLeaf = True

    def __init__(self, registry: Any) -> None:
        super().__init__()
        self._registry = registry

    def render_GET(self, request: Request) -> bytes:
        request.setHeader(b"content-type", CONTENT_TYPE_LATEST.encode())
        page: bytes = generate_latest(self._registry)
        return page

    def render_HEAD(self, request: Request) -> bytes:
        request.setHeader(b"content-length", b"%d" % len(self.render_GET(request)))
        return b""  # otherwise each HEAD request would log a warning


class _Request(Request):
    """The only request of its connection, without a body: a request with a body is refused before
    any of the body is stored."""

    def process(self) -> None:
        self.setHeader(b"connection", b"close")
        channel: Any = self.channel
        channel.persistent = False  # one connection must not keep the proxy busy
        super().process()

    def gotLength(self, length: int | None) -> None:
        super().gotLength(0)
        if length != 0:
            channel: Any = self.channel
            channel.transport.write(_TOO_LARGE)
            channel.loseConnection()

    def handleContentChunk(self, data: bytes) -> None:
        """Store nothing."""


class _Site(Site):
    noisy = False

    def log(self, request: Any) -> None:
        """Log nothing: there would be a line for each request."""


class _Deadline(ProtocolWrapper):
    """Closes a connection after L{DEADLINE}, whatever happens on it."""

    def makeConnection(self, transport: Any) -> None:
        self._end = self.factory.clock.callLater(DEADLINE, transport.abortConnection)
        super().makeConnection(transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._end.active():
            self._end.cancel()
        super().connectionLost(reason)


class _Bounded(WrappingFactory):
    """Accepts L{MOST_CONNECTIONS} at a time; any further connection is closed at once."""

    noisy = False
    protocol = _Deadline

    def __init__(self, site: Site, clock: IReactorTime) -> None:
        super().__init__(site)
        self.clock = clock

    def buildProtocol(self, addr: IAddress | None) -> Any:
        if len(self.protocols) >= MOST_CONNECTIONS:
            return None
        return super().buildProtocol(addr)


class MetricsService(Service):
    """Listens while the proxy steers. Not longer: its successor may need the same port."""

    def __init__(
        self,
        clock: IReactorTime,
        endpoint: IStreamServerEndpoint,
        text: str,
        describe: Callable[[], ProxyStatus],
    ) -> None:
        """
        @param text: the endpoint as a string.
        @param describe: returns the numbers, as L{acme_alpn_proxy.service.ProxyService.status}
            does.
        """
        registry = CollectorRegistry()
        registry.register(Collector(describe))
        # No timeout of Twisted's own, which would use the global reactor.
        site = _Site(_Page(registry), requestFactory=_Request, timeout=None)
        self._site = _Bounded(site, clock)
        self._endpoint = endpoint
        self._text = text
        self._listening: Deferred[Any] | None = None

    def privilegedStartService(self) -> None:
        """Listen, while the process still has its privileges; raises L{StartError}."""
        self._open()

    def startService(self) -> None:
        super().startService()
        self._open()

    def stopService(self) -> Deferred[Any] | None:
        super().stopService()
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.addCallback(lambda port: port.stopListening())
        return listening

    def _open(self) -> None:
        if self._listening is not None:
            return
        problems: list[Failure] = []
        listening: Deferred[Any] = self._endpoint.listen(self._site)
        listening.addErrback(problems.append)
        if problems:
            why = problems[0].getErrorMessage().rstrip(".")
            raise StartError(
                f"--metrics {self._text}: {why}; choose another one, or free it", os.EX_UNAVAILABLE
            )
        self._listening = listening
