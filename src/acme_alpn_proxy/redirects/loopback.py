"""The common part of the ways that give connections to listeners on loopback."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from ..host import facts
from ..interfaces import ICommands


class LoopbackRedirect:
    """The part of L{acme_alpn_proxy.interfaces.IRedirect} that these ways share.

    @ivar _families: 4, and 6 if IPv6 is steered, too.
    """

    _log = Logger()

    def __init__(self, *, ipv6: bool = True, force: bool = False) -> None:
        """
        @param ipv6: whether to steer IPv6 too, if the host has it.
        @param force: whether to steer even if it seems that visitors would be lost, or would not be
            steered.
        """
        self._families = (4, 6) if ipv6 else (4,)
        self._force = force

    def _hosts(self) -> tuple[str, ...]:
        """The addresses to listen on, with any port."""
        hosts = {4: "127.0.0.1:0", 6: f"[{facts.ipv6_to_listen_on()}]:0"}
        return tuple(hosts[family] for family in self._families)

    def _note_families(self, listeners: Sequence[socket.socket]) -> None:
        """Note which families have a listener; log it if IPv6 has none."""
        if len(listeners) < len(self._families):
            self._log.info(
                "This host has no IPv6 loopback address: the proxy steers IPv4 only; IPv6"
                " connections go to the web server"
            )

    def release(self, commands: ICommands) -> Deferred[None]:
        """Nothing to remove: established connections do not depend on this redirect."""
        return succeed(None)
