"""Handshakes by SYN cookie; tests/integration/test_nftables.py has real visitors."""

from __future__ import annotations

import socket

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.host.tcpsockets import LISTENING, TCPSocket
from acme_alpn_proxy.redirects import syncookies

from ..diagnosis.folders import folder_for


class SynCookieTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.proc = folder_for(self)
        self.switch = self.proc / "sys/net/ipv4/tcp_syncookies"
        self.switch.parent.mkdir(parents=True)
        self.switch.write_text("2\n")
        self.dialled: list[tuple[str, int]] = []

        class Caller(socket.socket):
            def connect_ex(caller, address: tuple[str, int]) -> int:  # type: ignore[override]
                self.dialled.append(address)
                return super().connect_ex(address)

        self.patch(socket, "socket", Caller)

    def test_nobody_accepts(self) -> None:
        """Each listener gets a SYN, and accepts nothing."""
        for host in ("127.0.0.1", "::1"):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.create_server((host, 0), family=family) as listener:
                address = listener.getsockname()[:2]
                syncookies.let_take_cookies([address], self.proc)
                listener.setblocking(False)
                with self.assertRaises(BlockingIOError):
                    listener.accept()
            self.assertEqual(self.dialled.pop(), address)

    def test_not_there(self) -> None:
        """An address to which no connection is possible is skipped."""
        syncookies.let_take_cookies([("192.0.2.1", 0), ("::ffff:0:0:1", 1)], self.proc)

    def test_usual(self) -> None:
        """If cookies are sent only in a flood, or never, no connection to a listener is made."""
        for text in ("0", "1"):
            self.switch.write_text(text)
            syncookies.let_take_cookies([("127.0.0.1", 1)], self.proc)
            syncookies.let_web_server_take_cookies(443, self.proc)
        self.switch.unlink()
        syncookies.let_take_cookies([("127.0.0.1", 1)], self.proc)
        self.assertEqual(self.dialled, [])

    def test_web_server(self) -> None:
        """Connections are made only to the listening sockets of the web server's port."""

        def found(host: str, port: int) -> TCPSocket:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return TCPSocket(family, LISTENING, (host, port), ("", 0), 0, 0)

        asked: list[int] = []

        def sockets(*states: int) -> list[TCPSocket]:
            asked.extend(states)
            return [found("127.0.0.1", 443), found("::1", 443), found("127.0.0.1", 80)]

        self.patch(syncookies, "tcp_sockets", sockets)
        syncookies.let_web_server_take_cookies(443, self.proc)
        self.assertEqual(self.dialled, [("127.0.0.1", 443), ("::1", 443)])
        self.assertEqual(asked, [LISTENING])

    def test_cannot_look(self) -> None:
        """If the sockets cannot be listed, nothing is done, and nothing fails."""

        def refuse(*states: int) -> list[TCPSocket]:
            raise OSError

        self.patch(syncookies, "tcp_sockets", refuse)
        syncookies.let_web_server_take_cookies(443, self.proc)
        self.assertEqual(self.dialled, [])
