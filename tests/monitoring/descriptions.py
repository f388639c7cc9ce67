"""Proxies, described."""

from __future__ import annotations

from acme_alpn_proxy import __version__
from acme_alpn_proxy.monitoring.status import DaemonStatus, InstanceStatus, ProxyStatus
from acme_alpn_proxy.proxy.clienthello import NOT_TLS, ClientHello
from acme_alpn_proxy.proxy.protocols import END_OF_FILE, NO_HELLO_IN_TIME, TOO_MANY_HELLOS
from acme_alpn_proxy.proxy.routing import Route, Routing
from acme_alpn_proxy.proxy.statistics import Statistics

ROUTING = Routing(Route("acme", "127.0.0.1:31443"), Route("fallback", "127.0.0.1:443"))
OPTIONS = {"--linger": "15", "--drain-timeout": "180"}
DOUBTS = (NOT_TLS, NO_HELLO_IN_TIME, END_OF_FILE, TOO_MANY_HELLOS)


def statistics() -> Statistics:
    """New ones, at 1,000 s since the epoch."""
    return Statistics(ROUTING, DOUBTS, lambda: 1_000.0)


def describe() -> DaemonStatus:
    """A proxy that has seen a visitor and a validation."""
    numbers = statistics()
    numbers.enter("running")
    numbers.visitor_seen()
    numbers.ended(numbers.visitor(ClientHello()), 10, 20)
    numbers.validation(ROUTING.acme, "192.0.2.7:50000", "site.example")
    return daemon_status(numbers.status("none", 2))


def daemon_status(about: ProxyStatus) -> DaemonStatus:
    """The status of a daemon that has no pending identifier and is otherwise as C{about} says."""
    return {**about, "on_demand": False, "pending": [], "pending_count": 0}


def answer_of(about: ProxyStatus) -> InstanceStatus:
    """The answer of an instance with that proxy."""
    head = {"version": 1, "program": __version__, "pid": 7, "holders": 0, "options": dict(OPTIONS)}
    return {**head, **daemon_status(about)}  # type: ignore[typeddict-item]
