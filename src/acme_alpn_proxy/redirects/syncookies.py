"""Handshakes with SYN cookies that begin at one listener and end at another.

All listeners of a host make and understand the same cookies, but each accepts one only if it has
itself sent a cookie in the last minutes (the kernel's C{tcp_synq_no_recent_overflow}). Where every
handshake uses a cookie (C{net.ipv4.tcp_syncookies=2}), a visitor whose handshake is under way at
the start or the stop would be reset. To prevent that, the other listener is made to send one cookie
first.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..host.tcpsockets import LISTENING, tcp_sockets
from .bpf import attach_filter

PROC: Final = Path("/proc")

_ALWAYS: Final = "2"
_DROP: Final = ((0x06, 0, 0, 0),)
"""A program of the classic BPF (C{linux/filter.h}) that returns 0: no bytes are passed."""


def let_web_server_take_cookies(port: int, proc: Path = PROC) -> None:
    """Make the web server's listeners accept cookies that the proxy's listeners have sent."""
    if _always(proc):
        with suppress(OSError):
            found = [each.local for each in tcp_sockets(LISTENING) if each.local[1] == port]
            let_take_cookies(found, proc)


def let_take_cookies(listeners: Iterable[tuple[str, int]], proc: Path = PROC) -> None:
    """Make the listeners at these addresses accept cookies that others have sent."""
    if not _always(proc):
        return
    for host, port in listeners:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as caller:
            caller.setblocking(False)
            attach_filter(caller, _DROP)  # the listener answers the SYN, and the answer is dropped
            caller.connect_ex((host, port))


def _always(proc: Path) -> bool:
    try:
        return (proc / "sys/net/ipv4/tcp_syncookies").read_text().strip() == _ALWAYS
    except OSError:  # the kernel has no SYN cookies
        return False
