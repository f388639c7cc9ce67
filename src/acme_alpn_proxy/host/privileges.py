"""Dropping all privileges for good, except named capabilities."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import pwd
import struct
from collections.abc import Collection
from typing import Final

_SET_DUMPABLE: Final = 4
_SET_KEEP_CAPABILITIES: Final = 8
_DROP_FROM_BOUNDING_SET: Final = 24
_SET_NO_NEW_PRIVILEGES: Final = 38
"""PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_CAPBSET_DROP and PR_SET_NO_NEW_PRIVS of prctl(2)."""

_CAPABILITY_VERSION: Final = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3 of capget(2): three sets of 64 bits each."""


CAP_NET_ADMIN: Final = 12
CAP_NET_RAW: Final = 13
CAP_BPF: Final = 39
"""Numbers of capabilities(7)."""

TO_STEER: Final = (CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF)
"""What it takes to steer again and again, to notice lost visitors, and to connect from visitors'
addresses."""


def drop_privileges(uid: int, gid: int | None = None, keep: Collection[int] = ()) -> None:
    """Become another user and keep only the named capabilities. No program that this process runs
    can get any.

    Capabilities and no_new_privs belong to a thread: call this while there is only one; later
    threads inherit them. From then on, other processes of the user cannot inspect this one
    (ptrace(2)); they can still send it signals.

    Raises C{OSError} if this process may not become that user. If it lacks CAP_SETPCAP (in some
    containers), the bounding set stays, but without effect: no_new_privs prevents all new
    capabilities.

    @param gid: the group; by default the user's group.
    @param keep: the capabilities that this process keeps; programs that it runs do not get them.
    """
    user = pwd.getpwuid(uid)
    group = user.pw_gid if gid is None else gid
    _prctl(_SET_NO_NEW_PRIVILEGES, 1)
    _prctl(_SET_KEEP_CAPABILITIES, 1)
    _empty_bounding_set()
    if uid != os.geteuid():
        os.initgroups(user.pw_name, group)
    os.setresgid(group, group, group)
    os.setresuid(uid, uid, uid)
    _set_capabilities(keep)
    _prctl(_SET_DUMPABLE, 0)  # last: becoming another user sets it to fs.suid_dumpable


def _empty_bounding_set() -> None:
    for capability in itertools.count():
        try:
            _prctl(_DROP_FROM_BOUNDING_SET, capability)
        except OSError as problem:
            if problem.errno in (errno.EINVAL, errno.EPERM):  # that was the last; not permitted
                return
            raise


def _set_capabilities(keep: Collection[int]) -> None:
    """Set the effective and the permitted set; empty the inheritable set and with it the ambient
    one (capset(2))."""
    kept = sum(1 << number for number in keep)
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    halves = (kept & 0xFFFFFFFF, kept >> 32)
    _check(_libc().capset(header, b"".join(struct.pack("=III", half, half, 0) for half in halves)))


def _prctl(option: int, value: int) -> None:
    _check(_libc().prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
