"""Redirect with an nftables table, without nft(8) or any other program (Linux 5.12).

The netlink socket that made the table owns it: the kernel removes the table when the socket is
closed, also after SIGKILL, and no other program can change or flush it. Its rule gives a new
connection to a listener on loopback (C{tproxy}) and keeps the address that the visitor connected
to. So INPUT sees port 443, and connection tracking is not used. The kernel looks for an established
connection first: connections of the web server stay there, and steered ones continue after the
table is removed.

Sources: nft(8); the kernel's C{Documentation/networking/tproxy.rst} and C{nft_tproxy.c}.
"""

from __future__ import annotations

import errno
import os
import platform
import socket
import struct
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, fail, inlineCallbacks, succeed
from zope.interface import implementer

from ..addresses import HTTPS
from ..errors import StartError, not_permitted
from ..firewall import judgement
from ..firewall.nftrules import OWN_TABLE as TABLE
from ..firewall.reading import CannotLook
from ..host import facts
from ..host.bridges import SWITCHES, filtered_bridges
from ..host.netlink import NETFILTER, Message, Netlink, Refused
from ..interfaces import ICommands, IRedirect
from . import nftmessages as nft
from .loopback import LoopbackRedirect

_SYN: Final = b"\x02"
_FIN_SYN_RST_ACK: Final = b"\x17"
_PORT_OFFSET: Final = 2
_FLAGS_OFFSET: Final = 13
"""Offsets in a TCP header (RFC 9293 section 3.1): the destination port, and the flags."""

_LOOPBACK: Final = 772
"""ARPHRD_LOOPBACK of C{linux/if_arp.h}, the type of lo."""

_LOCAL: Final = 2
"""RTN_LOCAL of C{linux/rtnetlink.h}: an address of this host."""

_TRANSPARENT: Final = {
    socket.AF_INET: (socket.IPPROTO_IP, 19),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 75),
}
"""IP_TRANSPARENT and IPV6_TRANSPARENT of C{linux/in.h} and C{in6.h}."""

_ANYWHERE: Final = {4: "127.0.0.1", 6: "::1"}

_MODULES: Final = {"fib": "nft_fib_inet"}


def steering_table(addresses: Iterable[tuple[str, int]], *, pin: bool) -> list[Message]:
    """The messages that make the table.

    @param addresses: host and port of the listeners, one for each family.
    @param pin: whether to add a chain that, before other rules run, keeps them from translating
        port 443. It needs connection tracking, which is on wherever other rules translate.
    """
    messages = [
        nft.new_table(TABLE, nft.OWNER),
        nft.new_chain(TABLE, "steer", "filter", nft.FILTER),  # after all translation
    ]
    if pin:
        messages.append(nft.new_chain(TABLE, "pin", "nat", nft.BEFORE_DSTNAT))
    for host, port in addresses:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        visitors = _visitors(family)
        listener = nft.load(1, socket.inet_pton(family, host)) + nft.load(2, _packed(port))
        steer = nft.tproxy(family, address=1, port=2)
        # Not only SYNs: the last packet of a handshake with a SYN cookie must be steered, too.
        messages.append(nft.new_rule(TABLE, "steer", *visitors, listener, steer))
        if pin:
            keep = nft.load(1, _packed(HTTPS)) + nft.dnat_to_port(family, port=1)
            messages.append(nft.new_rule(TABLE, "pin", *visitors, *_SYN_ALONE, keep))
    return messages


def _visitors(family: int) -> list[bytes]:
    """Match packets to port 443 of this host that do not come from this host."""
    return [
        nft.meta(nft.NFPROTO) + nft.compare(bytes([family])),
        nft.meta(nft.L4PROTO) + nft.compare(bytes([socket.IPPROTO_TCP])),
        nft.payload(_PORT_OFFSET, 2) + nft.compare(_packed(HTTPS)),
        nft.meta(nft.IIFTYPE) + nft.compare(struct.pack("=H", _LOOPBACK), nft.UNEQUAL),
        nft.fib_type_of_destination() + nft.compare(struct.pack("=I", _LOCAL)),
    ]


_SYN_ALONE: Final = (
    nft.payload(_FLAGS_OFFSET, 1) + nft.mask(_FIN_SYN_RST_ACK) + nft.compare(_SYN),
)


def _packed(port: int) -> bytes:
    return struct.pack("!H", port)


@implementer(IRedirect)
class NftablesRedirect(LoopbackRedirect):
    """Steers with a table that disappears with this process; leaves nothing to remove."""

    def __init__(self, *, ipv6: bool = True, force: bool = False) -> None:
        super().__init__(ipv6=ipv6, force=force)
        self._messages: list[Message] = []
        self._pin = False
        self._kernel: Netlink | None = None

    def __del__(self) -> None:
        """Close the socket, for a redirect that was prepared and never applied."""
        if self._kernel is not None:
            self._kernel.close()

    def __str__(self) -> str:
        return "nftables"

    @inlineCallbacks
    def prepare(self, commands: ICommands) -> Generator[Deferred[Any], Any, Sequence[str]]:
        """Listen on loopback only. To learn whether the kernel accepts the table, make and delete
        it in one transaction, so that no packet passes it.
        """
        families = [family for family in self._families if family == 4 or facts.has_ipv6()]
        if not self._force:
            self._refuse_bridge(families)
        try:
            self._pin = yield self._look_at_firewall(commands, families)
        finally:
            # Only after reading the firewall: a read would wait until the kernel has freed the
            # table.
            # If both refuse, the kernel's reason is the one to report (a missing privilege, for
            # example).
            self._try_table(families)
        return self._hosts()

    def apply(self, commands: ICommands, listeners: Sequence[socket.socket]) -> Deferred[None]:
        try:
            for listener in listeners:
                listener.setsockopt(*_TRANSPARENT[listener.family], 1)
            addresses = [listener.getsockname()[:2] for listener in listeners]
            self._messages = nft.batch(steering_table(addresses, pin=self._pin))
            self._send(self._messages)
        except OSError as problem:
            return fail(_refusal(problem))
        self._note_families(listeners)
        return succeed(None)

    def look_after(self, commands: ICommands) -> Deferred[None]:
        """Put the table back if it is gone. That should not happen: the kernel lets no other
        program remove it. Without privileges it cannot be read; then do nothing."""
        if self._kernel is None or not facts.may_administer_network():
            return succeed(None)
        try:
            self._kernel.ask(nft.GET_TABLE, nft.which_table(TABLE))
        except FileNotFoundError:
            try:
                self._send(self._messages)
            except OSError as problem:
                return fail(_refusal(problem))
            self._log.warn("The proxy's nftables table was removed; the proxy has created it again")
        except OSError as problem:
            self._log.debug("Cannot see the nftables table: {problem}", problem=problem)
        return succeed(None)

    def remove(self, commands: ICommands) -> Deferred[None]:
        """Close the socket, which needs no privilege and cannot fail."""
        kernel, self._kernel = self._kernel, None
        if kernel is not None:
            kernel.close()
        return succeed(None)

    @inlineCallbacks
    def _look_at_firewall(
        self, commands: ICommands, families: Sequence[int]
    ) -> Generator[Deferred[Any], Any, bool]:
        """Return whether another program's rule sends visitors elsewhere, so that the table must
        pin them. If the firewall cannot be read and C{--force} is given, assume such a rule."""
        try:
            if self._force:
                host: judgement.Host = yield judgement.look(commands, families)
            else:
                host = yield judgement.require(judgement.NFTABLES, commands, families)
        except CannotLook:
            return True
        return (yield host.why_not(judgement.SK_LOOKUP, commands)) is not None

    def _try_table(self, families: Iterable[int]) -> None:
        """Raises L{StartError} if the kernel does not accept the table."""
        anywhere = [(_ANYWHERE[family], HTTPS) for family in families]
        trial = [*steering_table(anywhere, pin=self._pin), nft.delete_table(TABLE)]
        try:
            self._send(nft.batch(trial))
        except OSError as problem:
            raise _refusal(problem) from None

    def _send(self, messages: Sequence[Message]) -> None:
        """Raises L{OSError}; then nothing is left applied. The socket stays open: the kernel takes
        milliseconds to close a socket that has deleted a table."""
        kernel = self._kernel or Netlink(NETFILTER)
        try:
            kernel.send(messages)
        except OSError:
            kernel.close()
            self._kernel = None
            raise
        self._kernel = kernel

    def _refuse_bridge(self, families: Iterable[int]) -> None:
        """Raise L{StartError} if visitors arrive through a bridge whose packets pass the firewall.
        Such packets pass PREROUTING while they are bridged. When they are then routed to this host,
        the listener that C{tproxy} has assigned is lost."""
        for family in families:
            try:
                names = facts.visitor_interfaces(family) & filtered_bridges(family)
            except OSError:
                continue
            if names:
                raise StartError(
                    f"visitors arrive through the bridge {', '.join(sorted(names))}, whose packets"
                    f" pass the firewall too early ({SWITCHES[family]}=1), so nftables cannot steer"
                    f" them; set net.bridge.{SWITCHES[family]} and the bridge's own switch to 0"
                    " (with --force the proxy starts, but does not steer these visitors)",
                    os.EX_CONFIG,
                )


def _refusal(problem: OSError) -> StartError:
    kernel = f"{platform.release()} on {platform.machine()}"
    message = problem.message if isinstance(problem, Refused) else None
    if message is not None and message.kind == nft.NEW_TABLE:
        if problem.errno == errno.EPERM:
            return StartError(
                "another instance already steers with nftables; stop that instance first (its"
                f" table: nft list table inet {TABLE})",
                os.EX_TEMPFAIL,
            )
        if problem.errno == errno.EEXIST:
            return StartError(
                f"there is an nftables table 'inet {TABLE}' already, which is not this program's;"
                f" remove it (nft delete table inet {TABLE})",
                os.EX_CONFIG,
            )
    if problem.errno == errno.EPERM:
        return not_permitted("no permission to use nftables")
    if problem.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT, errno.EPROTONOSUPPORT):
        if message is None or message.kind in (nft.BATCH_BEGIN, nft.NEW_TABLE):
            return StartError(
                f"this kernel ({kernel}) has no nftables whose tables can have an owner; run Linux"
                " 5.12 or newer",
                os.EX_UNAVAILABLE,
            )
        what, module = _missing(problem, message)
        return StartError(
            f"this kernel ({kernel}) lacks {what} of nftables; load the module {module}",
            os.EX_UNAVAILABLE,
        )
    return StartError(
        f"cannot steer with nftables: {problem.strerror}; check the free memory (free -m) and the"
        " limits (ulimit -a)",
        os.EX_OSERR,
    )


def _missing(problem: OSError, message: Message) -> tuple[str, str]:
    """What the kernel does not support, and the module that provides it."""
    if message.kind == nft.NEW_CHAIN:
        return "a type of chain, nat or filter,", "nft_chain_nat"
    offset = getattr(problem, "offset", None)
    if offset is None:
        return "one of the expressions fib, tproxy and nat", "nft_fib_inet, nft_tproxy or nft_nat"
    name = nft.expression_at(message, offset)
    return f"the expression '{name}'", _MODULES.get(name, f"nft_{name}")
