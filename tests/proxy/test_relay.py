"""Properties of the relay for all transports that real sockets do not show."""

from __future__ import annotations

from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.proxy.relay import TransportRelay
from acme_alpn_proxy.transports.hangup import NoHangupWatch


class TransportRelayTests(SynchronousTestCase):
    def test_no_descriptor(self) -> None:
        """A reset is passed on to a transport that has no descriptor to write to at once."""
        front, back = StringTransport(), StringTransport()
        made = TransportRelay(front, back, NoHangupWatch())
        made.start(b"hello")
        made.lost(front)
        self.assertTrue(back.disconnected)

    def test_told_twice(self) -> None:
        """A reset noticed after the relay has ended does no harm."""
        front, back = StringTransport(), StringTransport()
        made = TransportRelay(front, back, NoHangupWatch())
        made.abort()
        made._hung_up(front)
        self.assertTrue(back.disconnected)

    def test_sent_ahead(self) -> None:
        """Bytes that the target has already been sent are not sent again, and count as passed
        on."""
        front, back = StringTransport(), StringTransport()
        made = TransportRelay(front, back, NoHangupWatch())
        made.start(b"hello", 3)
        self.assertEqual((back.value(), made.moved), (b"lo", (5, 0)))
