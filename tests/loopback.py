"""Sockets over loopback: what both ends of a connection do, and what each sees of the other."""

from __future__ import annotations

import errno
import select
import socket
import struct
import sys

WAIT = 10.0
"""Seconds after which a test gives up; nothing here takes that long."""


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return one, other


def reset(connection: socket.socket) -> None:
    """Close with a reset (socket(7), SO_LINGER of 0 seconds)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_exactly(connection: socket.socket, count: int) -> bytes:
    """That many bytes, or all bytes before the end-of-file."""
    data = b""
    while len(data) < count and (piece := connection.recv(count - len(data))):
        data += piece
    return data


def was_reset(connection: socket.socket) -> bool:
    """Whether the peer has reset the connection, or does within the wait."""
    poll = select.poll()
    poll.register(connection, select.POLLERR)
    poll.poll(WAIT * 1000)
    # After a FIN, the kernel reports a reset as EPIPE.
    error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return error in (errno.ECONNRESET, errno.EPIPE)


def segments_in(connection: socket.socket) -> int:
    """C{tcpi_segs_in} of C{struct tcp_info} (<linux/tcp.h>)."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 144)
    return int.from_bytes(info[140:], sys.byteorder)
