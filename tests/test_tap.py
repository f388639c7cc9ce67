"""From options to the service."""

from __future__ import annotations

import os
from collections.abc import Callable

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
from acme_alpn_proxy.service import ProxyService


class TapTests(SynchronousTestCase):
    def options(self, *words: str) -> tap.Options:
        options = tap.Options()
        options.environment = {}
        options.parseOptions(list(words))
        return options

    def test_own_application(self) -> None:
        """In an application of one's own the service stands beside others, without signals."""
        application = Application("site")
        Service().setServiceParent(application)
        made = tap.makeService(self.options("--redirect", "none"))
        made.setServiceParent(application)
        self.assertIsInstance(made, ProxyService)
        self.assertEqual(len(list(IServiceCollection(application))), 2)
        self.assertTrue(IService.providedBy(made))

    def test_twistd(self) -> None:
        """Run by twistd it is the whole program, and knows -n."""
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
        """Every name that --redirect takes makes a redirect."""
        for name in REDIRECTS:
            self.assertTrue(
                IRedirect.providedBy(tap.make_redirect(self.options("--redirect", name)))
            )
        with self.assertRaises(UsageError):
            self.options("--redirect", "magic")

    def test_lists(self) -> None:
        """A list makes a choice, which a rule of the operator's ends in favour of iptables."""
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
        """The null redirect fires at once, whatever it is asked."""
        redirect = tap.make_redirect(self.options("--redirect", "none"))
        steps: tuple[Callable[[], Deferred[None]], ...] = (
            lambda: redirect.apply(BlockingCommands(), []),
            lambda: redirect.remove(BlockingCommands()),
            lambda: redirect.release(BlockingCommands()),
        )
        for step in steps:
            self.successResultOf(step())
