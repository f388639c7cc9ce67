"""From options to the service. Composes, decides nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, cast

from twisted.application.service import IService

from .errors import StartError
from .interfaces import IPIDFile, IRedirect, Reactor
from .monitoring.status import ProxyStatus
from .monitoring.statussocket import StatusService
from .options import PORT, RULESPEC_VARIABLE, WAYS
from .options import ProxyOptions as Options
from .program import Program
from .proxy.protocols import ProxyServerFactory
from .proxy.routing import Route, Routing
from .proxy.webserver import require_web_server
from .redirects.choice import ChosenRedirect
from .redirects.iptables import IptablesRedirect
from .redirects.nftables import NftablesRedirect
from .redirects.none import NoRedirect
from .redirects.sklookup import SkLookupRedirect
from .service import ProxyService
from .transports.network import network_for

__all__ = ["Options", "makeService", "make_program", "make_proxy", "make_redirect"]


def make_redirect(options: Mapping[str, Any]) -> IRedirect:
    """The redirect that C{--redirect} names, or the choice from its list."""
    names = options["redirect"].split(",")
    if len(names) == 1:
        return make_way(names[0], options)
    by_default = names == list(WAYS)
    if options["rulespec"] and "iptables" in names:
        why = f"{RULESPEC_VARIABLE} is set"
        return ChosenRedirect([make_way("iptables", options)], why, by_default=by_default)
    ways = [make_way(name, options, alone=False) for name in names]
    return ChosenRedirect(ways, by_default=by_default)


def make_way(name: str, options: Mapping[str, Any], *, alone: bool = True) -> IRedirect:
    """One redirect.

    @param alone: whether no other one will be tried if it refuses.
    """
    how = {each: bool(options[each]) for each in ("ipv6", "force")}
    makers: dict[str, Callable[[], IRedirect]] = {
        "iptables": lambda: IptablesRedirect(PORT, options["rulespec"], cautious=not alone, **how),
        "nftables": lambda: NftablesRedirect(**how),
        "sk-lookup": lambda: SkLookupRedirect(**how),
        "none": NoRedirect,
    }
    return makers[name]()


def make_proxy(
    options: Mapping[str, Any],
    reactor: Reactor,
    *,
    redirect: IRedirect | None = None,
    pidfile: IPIDFile | None = None,
    factory: Callable[..., ProxyServerFactory] = ProxyServerFactory,
) -> ProxyService:
    """The proxy that the options describe, to be given to an application.

    @param options: parsed L{Options}.
    @param redirect: how to steer, instead of what C{--redirect} says.
    @param factory: makes what accepts the visitors.
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
        idle_timeout=options["idle-timeout"],
        log_visitors=options.get("log-level") == "debug",
    )
    proxy: ProxyService = ProxyService(
        reactor,
        visitors,
        redirect if redirect is not None else make_redirect(options),
        pidfile,
        network=network,
        port=PORT,
        max_connections=options["max-connections"],
        linger=options["linger"],
        drain_timeout=options["drain-timeout"],
        beside=make_metrics(options, reactor, lambda: proxy.status()),
        precheck=partial(require_web_server, options["fallback"], patience),
    )
    return proxy


def make_metrics(
    options: Mapping[str, Any], reactor: Reactor, describe: Callable[[], ProxyStatus]
) -> list[IService]:
    """The service for C{--metrics}, if that was given."""
    text = options["metrics"]
    if text is None:
        return []
    from twisted.internet.endpoints import serverFromString

    from .monitoring.metrics import MetricsService

    return [MetricsService(reactor, serverFromString(reactor, text), text, describe)]


def make_program(
    options: Mapping[str, Any], reactor: Reactor, pidfile: IPIDFile | None = None
) -> Program:
    """The proxy as the whole program of this process: it takes the signals."""
    proxy = make_proxy(options, reactor, pidfile=pidfile)
    program = Program(reactor, proxy)
    if pidfile is not None:
        service = StatusService(reactor, options["pidfile"], proxy.status, program.holders)
        service.setServiceParent(program)
    return program


def exit_with_line(problem: StartError) -> NoReturn:
    """For C{twistd -n}, which would print a traceback.

    In the background the error must be raised instead: twistd's parent process waits for it, and
    would wait for ever.
    """
    print(f"acme-alpn-proxy: {problem}", file=sys.__stderr__)
    raise SystemExit(problem.status)


def makeService(options: Options) -> ProxyService | Program:
    """What twistd runs for C{twistd acme-alpn-proxy}; works in your own application too.

    @param options: parsed L{Options}. If twistd has parsed them, they have it as their parent, and
        the service takes the signals (L{Program}). Without a parent it leaves the signals to the
        application (L{ProxyService}). Both have C{when_started}.
    """
    from twisted.internet import reactor as installed

    reactor = cast(Reactor, installed)
    twistd: Any = getattr(options, "parent", None)
    if twistd is None:
        return make_proxy(options, reactor)
    program = make_program(options, reactor)
    if twistd.get("nodaemon"):
        program.on_refusal = exit_with_line
    return program
