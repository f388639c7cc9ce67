"""Unix sockets: short names for their paths; the abstract names in this network namespace, with
their owners.

The abstract names come from the sock_diag(7) family of netlink, the owners with C{UNIX_DIAG_UID}
(Linux 5.3).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

from .netlink import SOCK_DIAG, Netlink, attributes

_BY_FAMILY: Final = 20
_SHOW_NAME: Final = 0x1
_SHOW_UID: Final = 0x40
_NAME: Final = 0
_UID: Final = 7

_REQUEST: Final = struct.Struct("=BBHIIIII")
"""struct unix_diag_req: family, protocol, padding, states, inode, what to show, cookie (two)."""

_ANSWER: Final = struct.Struct("=BBBBIII")
"""struct unix_diag_msg: family, type, state, padding, inode, cookie (two)."""

_ALL_STATES: Final = 0xFFFFFFFF

_CREDENTIALS: Final = struct.Struct("iII")
"""struct ucred: PID, UID, GID."""


class BoundName(NamedTuple):
    """An abstract name to which a socket is bound.

    @ivar name: without the zero byte at its beginning.
    @ivar inode: of the socket.
    @ivar uid: of the socket's owner; L{None} if the kernel does not say.
    """

    name: bytes
    inode: int
    uid: int | None


def abstract_names(prefix: bytes) -> Iterator[BoundName]:
    """The names that begin with C{prefix}; raises C{OSError} if the kernel cannot list them."""
    request = _REQUEST.pack(
        socket.AF_UNIX, 0, 0, _ALL_STATES, 0, _SHOW_NAME | _SHOW_UID, 0xFFFFFFFF, 0xFFFFFFFF
    )
    with Netlink(SOCK_DIAG) as kernel:
        for body in kernel.dump(_BY_FAMILY, request):
            shown = attributes(body[_ANSWER.size :])
            name = shown.get(_NAME, b"")
            if name[:1] == b"\0" and name[1:].startswith(prefix):
                inode = _ANSWER.unpack_from(body)[4]
                uid = struct.unpack("=I", shown[_UID])[0] if _UID in shown else None
                yield BoundName(name[1:], inode, uid)


@contextmanager
def short(path: str) -> Iterator[str]:
    """Another name for C{path}, since names of sockets have at most 107 bytes (unix(7))."""
    folder, name = os.path.split(path)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def is_dead(path: str) -> bool:
    """Whether there is a Unix socket at C{path} whose program has ended; raises L{OSError} if the
    kernel does not tell."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as stream, short(path) as name:
        stream.setblocking(False)
        try:
            stream.connect(name)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:  # a full backlog: the program is alive
            pass
    return False


def require_free(path: str) -> None:
    """Raises L{OSError} if anything but a dead program's socket is at C{path}."""
    try:
        if is_dead(path):
            return
    except FileNotFoundError:
        return
    is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    number = errno.EADDRINUSE if is_socket else errno.EEXIST
    raise OSError(number, os.strerror(number), path)


def remove_if_dead(path: str) -> None:
    """Remove the socket of a dead program, if there is one at C{path} and that is permitted."""
    with suppress(OSError):
        if is_dead(path):
            os.unlink(path)


class Peer(NamedTuple):
    """The process at the other end, as it was when the connection was made."""

    pid: int
    uid: int
    gid: int


def peer_of(stream: socket.socket) -> Peer:
    """The process at the other end of a Unix socket (SO_PEERCRED of unix(7))."""
    size = _CREDENTIALS.size
    told = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return Peer(*_CREDENTIALS.unpack(told))


def program_at_other_end(stream: socket.socket) -> str:
    """The program that has connected to this Unix socket, for people."""
    pid = peer_of(stream).pid
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            name = ascii(file.read().rstrip("\n"))[1:-1]
    except OSError:  # it has ended, or is in another PID namespace
        name = "a program"
    return f"{name} (PID {pid})"
