"""Giving up all privileges, for good."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import pwd
import struct
from typing import Final

_SET_DUMPABLE: Final = 4
_DROP_FROM_BOUNDING_SET: Final = 24
_SET_NO_NEW_PRIVILEGES: Final = 38
"""PR_SET_DUMPABLE, PR_CAPBSET_DROP and PR_SET_NO_NEW_PRIVS of prctl(2)."""

_CAPABILITY_VERSION: Final = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3 of capget(2): three sets of 64 bits each."""


def drop_privileges(uid: int, gid: int | None = None) -> None:
    """Become another user, keep no capability, and let no program bring one back.

    Capabilities and no_new_privs belong to a thread: call this while there is only one; later ones
    inherit. Other processes of the user cannot look into this one (ptrace(2)) from then on. They
    can still signal it.

    Raises C{OSError} if this process may not become that user. Where it lacks CAP_SETPCAP (in some
    containers) the bounding set stays, without effect: no_new_privs keeps all capabilities away.

    @param gid: the group; by default that of the user.
    """
    user = pwd.getpwuid(uid)
    group = user.pw_gid if gid is None else gid
    _prctl(_SET_NO_NEW_PRIVILEGES, 1)
    _empty_bounding_set()
    if uid != os.geteuid():
        os.initgroups(user.pw_name, group)
    os.setresgid(group, group, group)
    os.setresuid(uid, uid, uid)
    _empty_capability_sets()
    _prctl(_SET_DUMPABLE, 0)  # last: becoming another user sets it to fs.suid_dumpable


def _empty_bounding_set() -> None:
    for capability in itertools.count():
        try:
            _prctl(_DROP_FROM_BOUNDING_SET, capability)
        except OSError as problem:
            if problem.errno in (errno.EINVAL, errno.EPERM):  # it was the last one; or may not
                return
            raise


def _empty_capability_sets() -> None:
    """Effective, permitted and inheritable set, and with them the ambient one (capset(2))."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    _check(_libc().capset(header, bytes(24)))


def _prctl(option: int, value: int) -> None:
    _check(_libc().prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
