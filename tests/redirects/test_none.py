"""Not steering at all."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.interfaces import IRedirect
from acme_alpn_proxy.redirects.none import NoRedirect

from ..fake_iptables import FakeIptables


class NoRedirectTests(SynchronousTestCase):
    def test_does_nothing(self) -> None:
        """Without a redirect it listens on every address, and every step is done at once."""
        redirect = NoRedirect()
        self.assertEqual(str(redirect), "none")
        verifyObject(IRedirect, redirect)
        iptables = FakeIptables()
        self.assertEqual(self.successResultOf(redirect.prepare(iptables)), ("::",))
        self.successResultOf(redirect.look_after(iptables))
        self.successResultOf(redirect.apply(iptables, []))
        self.successResultOf(redirect.remove(iptables))
        self.successResultOf(redirect.release(iptables))
        self.assertEqual(iptables.calls, [])
