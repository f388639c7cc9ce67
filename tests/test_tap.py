"""From options to the service."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from twisted.application.service import Application, IService, IServiceCollection, Service
from twisted.internet.defer import Deferred
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy import tap
from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host.processes import BlockingCommands
from acme_alpn_proxy.interfaces import IRedirect
from acme_alpn_proxy.options import REDIRECTS
from acme_alpn_proxy.program import Program
from acme_alpn_proxy.proxy.balancer import BalancedServer
from acme_alpn_proxy.proxy.protocols import ProxyServer, ProxyServerFactory
from acme_alpn_proxy.proxy.targets import HeadedTarget
from acme_alpn_proxy.responder.server import Responder
from acme_alpn_proxy.service import ProxyService
from acme_alpn_proxy.transports.original import OriginalTarget

from .memory import MemoryReactor


class TapTests(SynchronousTestCase):
    def options(self, *words: str) -> tap.Options:
        options = tap.Options()
        options.environment = {}
        options.parseOptions(list(words))
        return options

    def test_own_application(self) -> None:
        """In another application, the service runs beside others and sets no signal handlers."""
        application = Application("site")
        Service().setServiceParent(application)
        made = tap.makeService(self.options("--redirect", "none"))
        made.setServiceParent(application)
        self.assertIsInstance(made, ProxyService)
        self.assertEqual(len(list(IServiceCollection(application))), 2)
        self.assertTrue(IService.providedBy(made))

    def test_twistd(self) -> None:
        """In twistd it is the whole program, and accepts -n."""
        for nodaemon in (True, False):
            options = self.options("--alpn", "[::1]:1", "--linger", "1.5")
            options.parent = {"nodaemon": nodaemon}  # type: ignore[assignment]
            program = tap.makeService(options)
            assert isinstance(program, Program)
            if nodaemon:
                with self.assertRaises(SystemExit) as end:
                    program.on_refusal(StartError("no", os.EX_CONFIG))
                self.assertEqual(end.exception.code, os.EX_CONFIG)
            else:
                program.on_refusal(StartError("no"))

    def test_redirects(self) -> None:
        """Every name that --redirect accepts makes a redirect."""
        for name in REDIRECTS:
            self.assertTrue(
                IRedirect.providedBy(tap.make_redirect(self.options("--redirect", name)))
            )
        with self.assertRaises(UsageError):
            self.options("--redirect", "magic")

    def made_of(self, *words: str) -> ProxyServerFactory:
        """What accepts the visitors."""
        made: list[ProxyServerFactory] = []

        def factory(*arguments: Any, **named: Any) -> ProxyServerFactory:
            made.append(ProxyServerFactory(*arguments, **named))
            return made[0]

        tap.make_proxy(self.options(*words), MemoryReactor(), factory=factory)
        return made[0]

    def test_routes(self) -> None:
        """Each name has a separate target. The targets that are to get a header get one; the
        responder, which is asked before all ACME clients, gets none."""
        words = ("--alpn-for=b.example=127.0.0.1:2", "--fallback=original")
        made = self.made_of("--alpn-proxy-protocol=v2", *words)
        routing, targets = made.routing, made._targets
        named = routing.named["b.example"]
        self.assertEqual((routing.acme.target, named.target), ("127.0.0.1:31443", "127.0.0.1:2"))
        for route in (routing.acme, named):
            self.assertIsInstance(targets[route], HeadedTarget)
        self.assertIsInstance(targets[routing.fallback], OriginalTarget)
        made = self.made_of("--alpn-proxy-protocol=v2", "--control=/run/x.control", *words)
        for route in (made.routing.acme, *made.routing.named.values()):
            self.assertIsInstance(made._targets[route], Responder)

    def test_load_balancers(self) -> None:
        """Without load balancers the protocol of a visitor is the plain one."""
        self.assertIs(self.made_of().new_server, ProxyServer)
        made = self.made_of("--proxy-protocol-from=192.0.2.1").new_server()
        self.assertIsInstance(made, BalancedServer)

    def test_lists(self) -> None:
        """A list, or C{auto}, makes a choice of redirects. With a rule of the operator's, C{auto}
        means iptables; a list stays as it is."""
        for words, rule, name in (
            ("iptables,sk-lookup", "", "iptables,sk-lookup"),
            ("auto", "", "sk-lookup,nftables,iptables"),
            ("auto", "-j DNAT", "iptables"),
            ("nftables,sk-lookup", "-j DNAT", "nftables,sk-lookup"),
            ("nftables", "-j DNAT", "nftables"),
        ):
            options = tap.Options()
            options.environment = {"ACME_ALPN_PROXY_RULESPEC": rule}
            options.parseOptions(["--redirect", words])
            self.assertEqual(str(tap.make_redirect(options)), name)

    def test_no_redirect(self) -> None:
        """The Deferreds of the null redirect fire at once."""
        redirect = tap.make_redirect(self.options("--redirect", "none"))
        steps: tuple[Callable[[], Deferred[None]], ...] = (
            lambda: redirect.apply(BlockingCommands(), []),
            lambda: redirect.remove(BlockingCommands()),
            lambda: redirect.release(BlockingCommands()),
        )
        for step in steps:
            self.successResultOf(step())
