"""From options to the service. Composes, decides nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from twisted.application.service import IService, MultiService

from .errors import StartError
from .interfaces import IPIDFile, IRedirect
from .transports.network import network_for
from .options import PORT, RULESPEC_VARIABLE
from .options import ProxyOptions as Options
from .program import Program
from .proxy.protocols import ProxyServerFactory
from .redirects.auto import AutoRedirect
from .redirects.iptables import IptablesRedirect
from .redirects.none import NoRedirect
from .redirects.sklookup import SkLookupRedirect
from .proxy.routing import Route, Routing
from .service import ProxyService
from .monitoring.statussocket import StatusService

__all__ = ["Options", "makeService", "make_program", "make_proxy"]


def make_redirect(options: Options) -> IRedirect:
    """The redirect that C{--redirect} names."""
    rulespec, how = options["rulespec"], {name: bool(options[name]) for name in ("ipv6", "force")}

    def iptables() -> IRedirect:
        return IptablesRedirect(PORT, rulespec, **how)

    def sk_lookup() -> IRedirect:
        return SkLookupRedirect(**how)

    def auto() -> IRedirect:
        reason = f"{RULESPEC_VARIABLE} is set" if rulespec else None
        return AutoRedirect(sk_lookup(), iptables(), reason)

    makers = {"iptables": iptables, "sk-lookup": sk_lookup, "auto": auto, "none": NoRedirect}
    redirect: IRedirect = makers[options["redirect"]]()
    return redirect


def make_proxy(
    options: Options,
    reactor: Any,
    pidfile: IPIDFile | None = None,
    factory: Callable[..., ProxyServerFactory] = ProxyServerFactory,
) -> ProxyService:
    """The proxy that the options describe, to be given to an application.

    @param factory: makes what takes the visitors.
    """
    acme = Route("acme", options["alpn"].text)
    fallback = Route("fallback", options["fallback"].text)
    patience = options["connect-timeout"]
    network = network_for(reactor)
    visitors = factory(
        Routing(acme, fallback),
        {
            acme: network.target(options["alpn"], patience),
            fallback: network.target(options["fallback"], patience),
        },
        reactor,
        hello_timeout=options["hello-timeout"],
        log_visitors=options.get("log-level") == "debug",
    )
    return ProxyService(
        reactor,
        visitors,
        make_redirect(options),
        pidfile,
        network=network,
        port=PORT,
        max_connections=options["max-connections"],
        idle_timeout=options["idle-timeout"],
        linger=options["linger"],
        drain_timeout=options["drain-timeout"],
    )


def make_metrics(options: Options, reactor: Any, proxy: ProxyService) -> list[IService]:
    """The service for C{--metrics}, if that was given."""
    text = options["metrics"]
    if text is None:
        return []
    from twisted.internet.endpoints import serverFromString

    from .monitoring.metrics import MetricsService

    return [MetricsService(serverFromString(reactor, text), text, proxy.as_json)]


def make_program(options: Options, reactor: Any, pidfile: IPIDFile | None = None) -> Program:
    """The proxy as the whole program of this process: it takes the signals."""
    proxy = make_proxy(options, reactor, pidfile)
    program = Program(reactor, proxy, *make_metrics(options, reactor, proxy))
    if pidfile is not None:
        StatusService(reactor, options["pidfile"], proxy.as_json).setServiceParent(program)
    return program


def exit_with_line(problem: StartError) -> NoReturn:
    """For C{twistd -n}, which would print a traceback.

    In the background the error must be raised instead: twistd's parent process waits for one to
    tell, and for ever if none comes.
    """
    print(f"acme-alpn-proxy: {problem}", file=sys.__stderr__)
    raise SystemExit(problem.status)


def makeService(options: Options) -> IService:
    """What twistd runs for C{twistd acme-alpn-proxy}; in an application of your own it works too.

    @param options: parsed L{Options}. Parsed by twistd they have it as their parent, and the
        service takes the signals; without a parent it leaves them to the application.
    """
    from twisted.internet import reactor

    twistd: Any = getattr(options, "parent", None)
    if twistd is None:
        proxy = make_proxy(options, reactor)
        metrics = make_metrics(options, reactor, proxy)
        if not metrics:
            return proxy
        both = MultiService()
        for service in (*metrics, proxy):
            service.setServiceParent(both)
        return both
    program = make_program(options, reactor)
    if twistd.get("nodaemon"):
        program.on_refusal = exit_with_line
    return program
