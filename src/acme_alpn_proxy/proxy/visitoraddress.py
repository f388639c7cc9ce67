"""Whether the web server sees the visitors' own addresses; decided before any visitor is steered.

It sees them if two things are true: it listens on loopback, and its answers to a connection from an
unused address reach this process. Otherwise it sees all visitors under an address of this host.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from ..addresses import Address
from ..errors import AS_ADMINISTRATOR, StartError
from ..host.facts import PROC, has_capabilities, has_ipv6, may_administer_network
from ..host.privileges import CAP_NET_RAW
from ..host.returnpath import TUN, ReturnPath, WebServer
from ..host.tcpsockets import LISTENING, TCPSocket, shown, tcp_sockets
from ..interfaces import ITarget
from ..transports.network import TwistedNetwork
from ..transports.sockets import bind_as_visitor, is_near

NOBODY: Final[dict[int, str]] = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses for documentation, which no visitor has (RFC 5737, RFC 3849)."""

_ON_LOOPBACK: Final = {4: "127.0.0.1", 6: "::1"}

_PATIENCE: Final = 0.3
"""Seconds for the web server to answer over loopback; normally less than a millisecond."""

_CANNOT: Final = "the web server cannot see the visitors' own addresses"
_INSTEAD: Final = "or start without --visitor-address require"

Blocking: TypeAlias = Callable[[Callable[[], None]], "Deferred[None]"]


class IVisitorAddress(Protocol):
    """A way to make the web server see addresses of visitors."""

    @property
    def capabilities(self) -> Sequence[int]:
        """Capabilities that it needs while it is open, as numbers of <linux/capability.h>."""

    def open(self, blocking: Blocking) -> Deferred[None]:
        """To be called before any visitor is steered; fails with L{StartError}, and is then not
        open.

        @param blocking: runs calls that block.
        """

    def close(self) -> None:
        """To be called after the last connection. Does nothing if not open."""


class HostAddress:
    """The web server sees an address of this host."""

    capabilities = ()

    def open(self, blocking: Blocking) -> Deferred[None]:
        """Nothing to open."""
        return succeed(None)

    def close(self) -> None:
        """Nothing to close."""


class VisitorAddress:
    """The web server sees the visitors' addresses as far as possible.

    @ivar target: the web server.
    """

    _log = Logger()

    def __init__(
        self,
        network: TwistedNetwork,
        target: ITarget,
        fallback: Address,
        seen: Callable[[], None] = lambda: None,
        *,
        required: bool = False,
        ipv6: bool = True,
    ) -> None:
        """
        @param target: connects to the web server from this host's address.
        @param fallback: the web server's address.
        @param seen: called for each connection that came from the visitor's address.
        @param required: whether to refuse the start if the web server cannot see them.
        @param ipv6: whether IPv6 visitors may come.
        """
        self._source = network.from_visitors(target, seen) if _is_on_loopback(fallback) else None
        self.target: ITarget = target if self._source is None else self._source
        self._fallback = fallback
        self._required = required
        self._ipv6 = ipv6
        self._path: ReturnPath | None = None

    @property
    def capabilities(self) -> Sequence[int]:
        needed = self._path is not None and has_capabilities(CAP_NET_RAW)
        return (CAP_NET_RAW,) if needed else ()

    def open(self, blocking: Blocking) -> Deferred[None]:
        return blocking(self._open_if_possible)

    def _open_if_possible(self) -> None:
        try:
            self._open()
        except StartError as problem:
            self.close()
            if self._required:
                raise
            self._log.info(
                "The web server sees an address of this host instead of the visitors' addresses:"
                " {cause}",
                cause=bare_cause(problem),
            )

    def close(self) -> None:
        if self._source is not None:
            self._source.use_none()
        path, self._path = self._path, None
        if path is not None:
            path.close()

    def _open(self) -> None:
        own = web_server(self._fallback)
        if self._source is None:
            raise StartError(
                f"{_CANNOT}: this reactor's transports do not allow it; use a reactor with epoll,"
                f" {_INSTEAD}",
                os.EX_UNAVAILABLE,
            )
        servers = [own, *self._counterpart(own)]
        refuse_translation(servers)
        try:
            self._path = ReturnPath(servers)
        except OSError as problem:
            raise no_way_back(problem) from None
        if (why := _no_answer(own)) is not None:
            raise StartError(
                f"{_CANNOT}: its answer to the test address {NOBODY[own.family]} does not reach the"
                f" proxy from {shown(own)}: {why}; check the firewall rules for the interface lo"
                f" (iptables -S, nft list ruleset), {_INSTEAD}",
                os.EX_CONFIG,
            )
        answering = [own, *filter(self._answers, servers[1:])]
        self._source.use(answering)
        self._log.info(
            "The web server sees the visitors' own addresses, at {servers}",
            servers=" and ".join(map(shown, answering)),
        )

    def _counterpart(self, own: WebServer) -> Iterator[WebServer]:
        """The address on loopback where the same web server serves the other family, if it does."""
        other = WebServer(_ON_LOOPBACK[4 if own.family == socket.AF_INET6 else 6], own.port)
        if not (self._ipv6 and has_ipv6()):
            return
        try:
            listening = list(tcp_sockets(LISTENING))
        except OSError:
            listening = []
        if same_program(_listener(own, listening), _listener(other, listening)):
            yield other
        else:
            self._tell_of(other, f"it does not listen at {shown(other)}")

    def _answers(self, server: WebServer) -> bool:
        why = _no_answer(server)
        if why is not None:
            self._tell_of(
                server, f"its answer does not reach the proxy from {shown(server)}: {why}"
            )
        return why is None

    def _tell_of(self, server: WebServer, why: str) -> None:
        """Log that the web server does not see the visitors of this family."""
        self._log.info(
            "For {family} visitors, the web server sees an address of this host: {why}",
            family="IPv6" if server.family == socket.AF_INET6 else "IPv4",
            why=why,
        )


def bare_cause(problem: StartError) -> str:
    """The cause of the problem, without the words with which all these errors begin."""
    return problem.cause.removeprefix(f"{_CANNOT}: ")


def bare_remedy(problem: StartError) -> str:
    """The remedy of the problem if C{--visitor-address require} was not given."""
    return problem.remedy.removesuffix(f", {_INSTEAD}")


def web_server(fallback: Address) -> WebServer:
    """The fallback, if it can see the visitors' addresses; raises L{StartError}."""
    if not _is_on_loopback(fallback):
        raise StartError(
            f"{_CANNOT}: {fallback.text} is no numeric loopback address; name one with --fallback,"
            f" such as 127.0.0.1:443, {_INSTEAD}",
            os.EX_CONFIG,
        )
    return WebServer(str(ip_address(fallback.host)), fallback.port)


def _is_on_loopback(address: Address) -> bool:
    return address.socket_address() is not None and is_near(address.host)


def refuse_translation(servers: Sequence[WebServer], proc: Path = PROC) -> None:
    """Raises L{StartError} if distant visitors may already be connected to the loopback address:
    the answers to them have the same source as the answers that must stay on this host."""
    if not any(server.family == socket.AF_INET for server in servers):
        return
    for setting in sorted(proc.glob("sys/net/ipv4/conf/*/route_localnet")):
        name, value = setting.parent.name, "0"
        with suppress(OSError):  # the interface no longer exists
            value = setting.read_text().strip()
        if name not in ("default", "lo") and value != "0":
            raise StartError(
                f"{_CANNOT}: net.ipv4.conf.{name}.route_localnet is on, so DNAT rules can send"
                " visitors to the loopback address, and the proxy would break these connections;"
                f" set it to 0, {_INSTEAD}",
                os.EX_CONFIG,
            )


def may_have_way_back() -> None:
    """Raises L{StartError} if no L{ReturnPath} can be made. Changes nothing."""
    if not os.path.exists(TUN):
        raise no_way_back(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    if not may_administer_network():
        raise no_way_back(PermissionError(errno.EPERM, os.strerror(errno.EPERM)))


def no_way_back(problem: OSError) -> StartError:
    """The error if no L{ReturnPath} can be made."""
    if problem.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return StartError(
            f"{_CANNOT}: {TUN} does not exist; load the kernel's module (modprobe tun), in a"
            f" container pass the device to it, {_INSTEAD}",
            os.EX_UNAVAILABLE,
        )
    if problem.errno in (errno.EPERM, errno.EACCES):
        return StartError(
            f"{_CANNOT}: no permission to use a TUN device; {AS_ADMINISTRATOR}, {_INSTEAD}",
            os.EX_NOPERM,
        )
    return StartError(
        f"{_CANNOT}: the kernel refused the TUN device or its routes: {problem.strerror}; look for"
        f" conflicting entries (ip rule, ip route show table all), {_INSTEAD}",
        os.EX_OSERR,
    )


def _no_answer(server: WebServer) -> str | None:
    """Why a connection from an unused address fails; C{None} if it does not fail."""
    with socket.socket(server.family, socket.SOCK_STREAM) as dial:
        dial.settimeout(_PATIENCE)
        try:
            bind_as_visitor(dial, server.family, NOBODY[server.family])
            dial.connect(server)
        except TimeoutError:
            return f"no answer within {_PATIENCE:g} s"
        except OSError as problem:
            return problem.strerror
    return None


def _listener(server: WebServer, listening: Sequence[TCPSocket]) -> TCPSocket | None:
    """The listening socket that gets connections to C{server}: the one at its address, or one at
    all addresses, of both families if there is none for its own."""
    of = {each.local: each for each in listening}
    anywhere = ("0.0.0.0", "::") if server.family == socket.AF_INET else ("::",)  # noqa: S104
    found = (of.get((host, server.port)) for host in (server.host, *anywhere))
    return next(filter(None, found), None)


def same_program(one: TCPSocket | None, other: TCPSocket | None) -> bool:
    """Whether two listening sockets seem to belong to the same program, because they have the same
    user and control group. Another program may serve other sites at the same port."""
    if one is None or other is None:
        return False
    return one is other or (one.uid, one.cgroup) == (other.uid, other.cgroup)
