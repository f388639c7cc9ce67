"""Makes the service from the options. It only puts the parts together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, cast

from .addresses import Address
from .errors import StartError
from .interfaces import INetwork, IPIDFile, IRedirect, ITarget, Reactor
from .monitoring.status import DaemonStatus
from .monitoring.statussocket import StatusService
from .ondemand import OnDemandProxy
from .options import PORT, RULESPEC_VARIABLE, WAYS
from .options import ProxyOptions as Options
from .program import Program
from .proxy.protocols import ProxyServer, ProxyServerFactory, statistics_for
from .proxy.routing import Route, Routing
from .proxy.targets import HeadedTarget
from .proxy.visitoraddress import HostAddress, IVisitorAddress, VisitorAddress
from .proxy.webserver import require_web_server
from .redirects.choice import ChosenRedirect
from .redirects.iptables import IptablesRedirect
from .redirects.nftables import NftablesRedirect
from .redirects.none import NoRedirect
from .redirects.sklookup import SkLookupRedirect
from .responder.pending import Pending
from .responder.server import Responder
from .service import ProxyService
from .transports.network import TwistedNetwork, network_for

__all__ = ["Options", "makeService", "make_program", "make_proxy", "make_redirect"]


def make_redirect(options: Mapping[str, Any]) -> IRedirect:
    """The redirect that C{--redirect} names, or a choice from its list."""
    names = options["redirect"].split(",")
    if names == ["none"]:
        return make_way("none", options)
    usable: Sequence[str] = WAYS
    if options.get("on-demand") and options["uid"]:
        usable = WAYS[1:]  # iptables would run without capabilities
        names = [name for name in names if name in usable]
    by_default = names == list(WAYS)
    why = "it works here"
    if len(names) == 1:
        why = ""
    elif options["rulespec"] and "iptables" in names:
        names, why = ["iptables"], f"{RULESPEC_VARIABLE} is set"
    alone = len(names) == 1
    return ChosenRedirect(
        [make_way(name, options, alone=alone) for name in names],
        why,
        others=[make_way(name, options, alone=False) for name in usable if name not in names],
        by_default=by_default,
    )


def make_way(name: str, options: Mapping[str, Any], *, alone: bool = True) -> IRedirect:
    """One redirect.

    @param alone: whether this is the only redirect that may be used.
    """
    how = {each: bool(options[each]) for each in ("ipv6", "force")}
    makers: dict[str, Callable[[], IRedirect]] = {
        "iptables": lambda: IptablesRedirect(PORT, options["rulespec"], cautious=not alone, **how),
        "nftables": lambda: NftablesRedirect(**how),
        "sk-lookup": lambda: SkLookupRedirect(**how),
        "none": NoRedirect,
    }
    return makers[name]()


class Parts:
    """The objects that are made from one set of options.

    @ivar pending: the identifiers that the responder answers for.
    """

    def __init__(self, options: Mapping[str, Any], reactor: Reactor) -> None:
        """
        @param options: parsed L{Options}.
        """
        self._options = options
        self._reactor = reactor
        self._routing = Routing(
            Route("acme", options["alpn"].text),
            Route("fallback", options["fallback"].text),
            {name: Route("acme", where.text) for name, where in options["alpn-for"].items()},
        )
        self._statistics = statistics_for(self._routing)
        self.pending = Pending(reactor)

    def proxy(
        self,
        redirect: IRedirect | None = None,
        pidfile: IPIDFile | None = None,
        factory: Callable[..., ProxyServerFactory] = ProxyServerFactory,
    ) -> ProxyService:
        """A proxy; all that are made here share their counters."""
        options = self._options
        network = network_for(self._reactor)
        visitor_address, web_server = self._web_server(network)
        visitors = factory(
            self._routing,
            self._targets(network, web_server),
            self._reactor,
            hello_timeout=options["hello-timeout"],
            idle_timeout=options["idle-timeout"],
            log_visitors=options.get("log-level") == "debug",
            statistics=self._statistics,
            protocol=self._server_maker(),
        )
        return ProxyService(
            self._reactor,
            visitors,
            redirect if redirect is not None else make_redirect(options),
            pidfile,
            network=network,
            port=PORT,
            max_connections=options["max-connections"],
            linger=options["linger"],
            drain_timeout=options["drain-timeout"],
            precheck=partial(require_web_server, options["fallback"], options["connect-timeout"]),
            visitor_address=visitor_address,
        )

    def _targets(self, network: INetwork, web_server: ITarget) -> dict[Route, ITarget]:
        routing, options = self._routing, self._options
        targets = {
            routing.acme: self._acme_target(network, options["alpn"]),
            routing.fallback: self._headed("fallback", web_server),
        }
        for name, address in options["alpn-for"].items():
            targets[routing.named[name]] = self._acme_target(network, address)
        return targets

    def later_proxy(self) -> ProxyService:
        """Make a proxy in a process that may have become another user.

        That user cannot run the programs that read the firewall. So the firewall was checked at the
        start, and is not checked again.
        """
        force = self._options["force"] or bool(self._options["uid"])
        return self.proxy(make_redirect({**self._options, "force": force}))

    def _acme_target(self, network: INetwork, address: Address) -> ITarget:
        options, target = self._options, self._target(network, "alpn", address)
        if options["control"] or options["alpn-certs"]:
            return Responder(self._reactor, self.pending, target, options["alpn-certs"])
        return target

    def _target(self, network: INetwork, option: str, address: Address) -> ITarget:
        target = network.target(address, self._options["connect-timeout"])
        return self._headed(option, target)

    def _headed(self, option: str, target: ITarget) -> ITarget:
        version = self._options[f"{option}-proxy-protocol"]
        return target if version == "none" else HeadedTarget(target, version)

    def _server_maker(self) -> Callable[[], ProxyServer]:
        networks = self._options["proxy-protocol-from"]
        if networks is None:
            return ProxyServer
        from .proxy.balancer import Balancers  # a slow import

        return Balancers(networks).new_server

    def _web_server(self, network: TwistedNetwork) -> tuple[IVisitorAddress, ITarget]:
        """The object that makes the web server see the visitors' addresses, and the target for
        it."""
        options = self._options
        plain = network.target(options["fallback"], options["connect-timeout"])
        if options["visitor-address"] == "off":
            return HostAddress(), plain
        how = VisitorAddress(
            network,
            plain,
            options["fallback"],
            self._statistics.visitor_seen,
            required=options["visitor-address"] == "require",
            ipv6=options["ipv6"],
        )
        return how, how.target

    def run_services(self, proxy: ProxyService | OnDemandProxy, leave: Callable[[], None]) -> None:
        """Run the services for C{--metrics} and C{--control} beside C{proxy}, if these options were
        given.

        @param leave: ends the program when no command needs it.
        """
        if self._options["metrics"] is not None:
            from twisted.internet.endpoints import serverFromString

            from .monitoring.metrics import MetricsService

            text = self._options["metrics"]
            endpoint = serverFromString(self._reactor, text)
            proxy.run_beside(MetricsService(self._reactor, endpoint, text, proxy.status))
        if self._options["control"]:
            from .responder.control import Control, ControlService

            control = Control(self.pending, proxy, lambda: proxy.status()["validations"], leave)
            proxy.run_beside(ControlService(self._reactor, self._options["control"], control))


def make_proxy(
    options: Mapping[str, Any],
    reactor: Reactor,
    *,
    redirect: IRedirect | None = None,
    pidfile: IPIDFile | None = None,
    factory: Callable[..., ProxyServerFactory] = ProxyServerFactory,
) -> ProxyService:
    """The proxy that the options describe, for use in an application.

    @param options: parsed L{Options}.
    @param redirect: how to steer, instead of the value of C{--redirect}.
    @param factory: makes the protocols for visitors.
    """
    parts = Parts(options, reactor)
    proxy = parts.proxy(redirect, pidfile, factory)
    parts.run_services(proxy, lambda: None)
    return proxy


def make_program(
    options: Mapping[str, Any],
    reactor: Reactor,
    pidfile: IPIDFile | None = None,
    told: Mapping[str, str] | None = None,
) -> Program:
    """The proxy as the whole program of this process: it handles the signals.

    @param told: the options as given, for C{status}; see L{acme_alpn_proxy.options.of_the_proxy}.
    """
    parts = Parts(options, reactor)
    on_demand = bool(options.get("on-demand"))
    proxy = (
        OnDemandProxy(parts.proxy(), parts.later_proxy, pidfile)
        if on_demand
        else parts.proxy(pidfile=pidfile)
    )
    program = Program(reactor, proxy)
    parts.run_services(proxy, program.holders.leave)
    if pidfile is not None:

        def describe() -> DaemonStatus:
            return {**proxy.status(), **parts.pending.status(), "on_demand": on_demand}

        service = StatusService(reactor, options["pidfile"], describe, program.holders, told or {})
        service.setServiceParent(program)
    return program


def exit_with_line(problem: StartError) -> NoReturn:
    """Print a failed start for C{twistd -n}, which would print a traceback.

    In the background, the error must be raised instead: twistd's parent process waits for it, and
    would wait for ever.
    """
    print(f"acme-alpn-proxy: {problem}", file=sys.__stderr__)
    raise SystemExit(problem.status)


def makeService(options: Options) -> ProxyService | Program:
    """The service for C{twistd acme-alpn-proxy}; it works in other applications, too.

    @param options: parsed L{Options}. If twistd has parsed them, they have a parent, and the
        service handles the signals (L{Program}). Without a parent, it leaves the signals to the
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
