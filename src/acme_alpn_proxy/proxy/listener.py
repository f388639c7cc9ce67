"""The listening sockets, and the limit on simultaneous connections."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
from collections.abc import Generator, Sequence
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from ..errors import StartError
from ..host.processes import commands_for
from ..host.tcpsockets import port_taken, taken_by_another_user
from ..interfaces import ICommands, INetwork, Reactor
from .protocols import Limits

BACKLOG: Final = 4_096
"""Connections that may wait to be accepted. The kernel limits this to net.core.somaxconn, which has
the same value since Linux 5.4."""

_RESERVE: Final = 42
"""Descriptors for everything but connections: log, pipe, commands and reactor need about twelve."""

WAITING_ROOM: Final = 2_048
"""How many accepted connections may be without a target."""

_INFO_BYTES: Final = 28

_BIND_RETRY: Final = 0.05


def listening_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket, non-blocking; raises C{OSError}.

    C{"::"} takes IPv4 too, whatever the value of net.ipv6.bindv6only. On a host without IPv6, it
    listens on IPv4 only.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as problem:
        if host == "::" and problem.errno == errno.EAFNOSUPPORT:
            return listening_socket("0.0.0.0", port)  # noqa: S104
        raise
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _raise_descriptor_limit() -> None:
    """Raise the soft limit, usually 1,024: a connection takes two descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # if the hard limit is over fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _descriptor_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def limits_of(descriptors: int) -> Limits:
    """The limits for this number of open files.

    A visitor takes two files: one for its own connection, one for the connection to the target.
    Half of the files that are free, at most L{WAITING_ROOM}, are for visitors whose target is not
    known yet or not connected.
    """
    free = descriptors - _RESERVE
    waiting = min(free // 2, WAITING_ROOM)
    visitors = max(1, (free - waiting) // 2)
    return Limits(max(2, visitors + waiting), visitors)


def highest_limits(max_connections: int) -> Limits:
    """Raise the limit on open files, and return the limits that it allows.

    @param max_connections: how many visitors to allow; 0: as many as the open files allow.
    """
    _raise_descriptor_limit()
    allowed = limits_of(_descriptor_limit())
    if not max_connections:
        return allowed
    connections = min(3 * max_connections, allowed.connections)
    return Limits(connections, max_connections)


def _waiting(listener: socket.socket) -> int:
    """How many connections wait to be accepted: tcpi_unacked in TCP_INFO of a listening socket."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    waiting: int = struct.unpack_from("=I", info, _INFO_BYTES - 4)[0]
    return waiting


def _host_and_port(text: str, port: int) -> tuple[str, int]:
    """Where to listen; see L{acme_alpn_proxy.interfaces.IRedirect.prepare}."""
    bare = text.removesuffix(":0")
    if bare != text and ("." in bare or bare.startswith("[")):
        return bare.strip("[]"), 0
    return text, port


class ListenerService(Service):
    """Listens while it runs.

    @ivar hosts: where to listen, set before the start; see L{IRedirect.prepare}.
    @ivar sockets: the listening sockets; empty when it does not listen.
    @ivar ready: fires when it listens, or fails with L{StartError}.
    """

    ready: Deferred[None]
    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        factory: Factory,
        network: INetwork,
        port: int,
        patience: float,
    ) -> None:
        """
        @param patience: how many seconds to try again if the port is taken: an instance that stops
            keeps it during its linger.
        """
        self._reactor = reactor
        self._factory = factory
        self._network = network
        self.port = port
        self._patience = patience
        self._ports: list[Any] = []
        self.hosts: Sequence[str] = ()
        self.sockets: list[socket.socket] = []

    def startService(self) -> None:
        super().startService()
        self.ready = self._open(commands_for(self._reactor))

    @inlineCallbacks
    def _open(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        waited = 0.0
        while not self._try_to_open():
            if waited >= self._patience or taken_by_another_user(self.port):
                raise port_taken(self.port)
            if not waited:
                self._log.info(
                    "Waiting for port {port}: a stopped instance gives it back; {seconds:g} s at"
                    " most",
                    port=self.port,
                    seconds=self._patience,
                    is_waiting=True,
                )
            yield commands.pause(_BIND_RETRY)
            waited += _BIND_RETRY
        for listener in self.sockets:
            self._ports.append(self._network.listen(listener, self._factory))

    def pause(self) -> None:
        """Accept nothing: new connections wait in the backlog."""
        for port in self._ports:
            port.pauseProducing()

    def resume(self) -> None:
        """Accept new connections again."""
        for port in self._ports:
            port.resumeProducing()

    @property
    def is_full(self) -> bool:
        """Whether connections wait to be accepted."""
        return any(_waiting(listener) for listener in self.sockets)

    def _try_to_open(self) -> bool:
        """Return whether it listens now; C{False} if the port is taken."""
        missing = None
        for host in self.hosts:
            try:
                self.sockets.append(listening_socket(*_host_and_port(host, self.port)))
            except OSError as problem:
                if problem.errno == errno.EADDRINUSE:
                    self._close_sockets()
                    return False
                missing = problem
        if missing is not None and not self.sockets:
            raise StartError(
                f"cannot listen on port {self.port}: {missing.strerror}; see whether lo is up"
                " (ip address show lo), and how many files may be open (ulimit -n)",
                os.EX_OSERR,
            )
        return True

    @inlineCallbacks
    def stopService(self) -> Generator[Deferred[Any], Any, None]:
        """Stop listening, after accepting the connections that wait to be accepted."""
        super().stopService()
        ports, self._ports = self._ports, []
        for port in ports:
            yield port.stopListening()
        for listener in self.sockets:
            self._accept_all(listener)
        self._close_sockets()

    def abandon(self) -> None:
        """Stop listening at once: no connection was steered here yet."""
        super().stopService()
        ports, self._ports = self._ports, []
        for port in ports:
            port.stopListening()
        self._close_sockets()

    def _accept_all(self, listener: socket.socket) -> None:
        while True:
            try:
                visitor, _ = listener.accept()
            except OSError:
                return
            self._network.adopt(visitor, self._factory)

    def _close_sockets(self) -> None:
        sockets, self.sockets = self.sockets, []
        for listener in sockets:
            listener.close()
