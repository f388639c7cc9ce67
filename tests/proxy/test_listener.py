"""The listening sockets, and the limits on their connections."""

from __future__ import annotations

import errno
import resource
import socket
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host import tcpsockets
from acme_alpn_proxy.host.processes import BlockingCommands
from acme_alpn_proxy.host.tcpsockets import ESTABLISHED, LISTENING, TCPSocket
from acme_alpn_proxy.proxy import listener
from acme_alpn_proxy.proxy.listener import (
    BACKLOG,
    highest_limits,
    limits_of,
    listening_socket,
)
from acme_alpn_proxy.proxy.protocols import Limits

from ..service_case import ServiceCase


class ListeningSocketTests(SynchronousTestCase):
    def test_both_families(self) -> None:
        """The wildcard accepts IPv4 and IPv6, and does not block."""
        with listening_socket("::", 0) as listener:
            port = listener.getsockname()[1]
            self.assertFalse(listener.getblocking())
            for host in ("127.0.0.1", "::1"):
                socket.create_connection((host, port)).close()

    def test_no_ipv6(self) -> None:
        """If the kernel has no IPv6, it listens on IPv4 only."""
        real = socket.socket

        def make(family: int = socket.AF_INET, *rest: Any) -> socket.socket:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no IPv6")
            return real(family, *rest)

        self.patch(socket, "socket", make)
        with listening_socket("::", 0) as listener:
            self.assertEqual(listener.family, socket.AF_INET)
        with self.assertRaises(OSError):
            listening_socket("::1", 0)

    def test_backlog(self) -> None:
        """Over a thousand connections may wait to be accepted."""
        self.assertGreaterEqual(BACKLOG, 1_024)


class PortTests(ServiceCase):
    """The port that it listens on, as the service starts and stops."""

    def test_port_taken(self) -> None:
        """A port that stays taken is tried until linger and 2 s have passed, then refused."""
        pauses: list[float] = []

        class Commands(BlockingCommands):
            def pause(self, seconds: float) -> Deferred[None]:
                pauses.append(seconds)
                return succeed(None)

        self.patch(listener, "commands_for", lambda reactor: Commands())
        with (
            listening_socket("127.0.0.1", self.port),
            self.assertRaisesRegex(StartError, f"port {self.port} is taken.*ss -ltnp"),
        ):
            self.proxy.startService()
        self.assertTrue(16.9 < sum(pauses) < 17.1)
        self.told("claim PID file", "release PID file")

    def test_port_of_another_user(self) -> None:
        """A port that another user's program has is not waited for: that is not an instance."""
        pauses: list[float] = []

        class Commands(BlockingCommands):
            def pause(self, seconds: float) -> Deferred[None]:
                pauses.append(seconds)
                return succeed(None)

        here, nowhere = ("0.0.0.0", self.port), ("0.0.0.0", 0)
        found = TCPSocket(socket.AF_INET, LISTENING, here, nowhere, 61_001, 7)
        self.patch(tcpsockets, "tcp_sockets", lambda *states: [found])
        self.patch(listener, "commands_for", lambda reactor: Commands())
        with (
            listening_socket("127.0.0.1", self.port),
            self.assertRaisesRegex(StartError, f"port {self.port} is taken"),
        ):
            self.proxy.startService()
        self.assertEqual(pauses, [])

    def test_port_of_a_connection(self) -> None:
        """If an outgoing connection uses the port, the error says so, and how to keep the port
        free."""
        found = TCPSocket(socket.AF_INET, 1, ("192.0.2.1", 7), ("192.0.2.9", 443), 0, 7)
        sockets = {LISTENING: [], ESTABLISHED: [found]}
        self.patch(tcpsockets, "tcp_sockets", lambda *states: sockets[states[0]])
        self.assertEqual(
            str(tcpsockets.port_taken(7)),
            "port 7 is in use by a connection with 192.0.2.9:443; wait until it ends, and reserve"
            " the port: sysctl -w net.ipv4.ip_local_reserved_ports=7 (if ports are reserved"
            " already, name them, too)",
        )

    def test_port_becomes_free(self) -> None:
        """A port that its last owner releases during the wait is taken; steering starts only
        then."""
        owner = listening_socket("127.0.0.1", self.port)
        story = self.story

        class Commands(BlockingCommands):
            def pause(self, seconds: float) -> Deferred[None]:
                story.append("wait")
                owner.close()
                return succeed(None)

        self.patch(listener, "commands_for", lambda reactor: Commands())
        self.proxy.startService()
        self.told("claim PID file", "wait", "listen", "steer")

    def test_address_not_here(self) -> None:
        """An address that this host has not is left out; if none is left it cannot start."""
        self.redirect.hosts = ("127.0.0.1", "2001:db8::1")
        proxy = self.make_proxy()
        proxy.startService()
        self.assertEqual(len(proxy.listener.sockets), 1)
        self.redirect.hosts = ("2001:db8::1",)
        with self.assertRaisesRegex(StartError, "cannot listen"):
            self.make_proxy().startService()

    def test_queue(self) -> None:
        """Connections that wait to be accepted when the listener closes are accepted."""
        self.proxy.startService()
        waiting = [socket.create_connection(("127.0.0.1", self.port)) for _ in range(3)]
        stopped = self.proxy.stopService()
        self.assertEqual(self.reactor.accepted, 0)
        self.linger()
        self.assertEqual(self.reactor.accepted, 3)
        self.successResultOf(stopped)
        for connection in waiting:
            connection.close()


class LimitsTests(SynchronousTestCase):
    def test_of_open_files(self) -> None:
        """Of the open files that are left, a quarter are for visitors and as many for their
        targets; half are for connections that wait, or have no whole hello yet."""
        self.assertEqual(limits_of(256), Limits(connections=160, visitors=53))
        self.assertEqual(limits_of(16_384), Limits(2_048 + 7_147, 7_147))
        self.assertEqual(limits_of(20), Limits(connections=2, visitors=1))

    def test_highest(self) -> None:
        """The limit on open files is raised as far as possible; the operator's number of
        connections is used as it is."""
        limits = {resource.RLIMIT_NOFILE: (256, 1_024)}
        self.patch(resource, "getrlimit", limits.__getitem__)
        self.patch(resource, "setrlimit", limits.__setitem__)
        self.assertEqual(highest_limits(0), limits_of(1_024))
        self.assertEqual(limits, {resource.RLIMIT_NOFILE: (1_024, 1_024)})
        self.assertEqual(highest_limits(7), Limits(21, 7))
        most = limits_of(1_024).connections
        self.assertEqual(highest_limits(10_000), Limits(most, 10_000))
