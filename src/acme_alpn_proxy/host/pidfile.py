"""The PID file: it shows which instance runs.

The running instance holds a lock (F_OFD_SETLK of fcntl(2)) on its file for as long as it steers. So
the lock shows whether the file is valid: no process holds a lock on a file that was left over, that
has garbage in it, or whose PID now belongs to another program. The lock is a write lock until the
PID is written, and a read lock after that. So nobody takes the PID of a previous owner for the new
owner's.

Root may send signals to the PID in the file. So a file that other users could have opened or
written does not count: a claim replaces it. And the process that claims it keeps only a read-only
descriptor: if it drops its privileges and is taken over by an attacker, it cannot write another PID
there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
import time
from typing import Final

from zope.interface import implementer

from ..errors import AlreadyRunning, StartError
from ..interfaces import IPIDFile

_MODE: Final = 0o600
"""Only its owner may open the file: a user who can open it can lock it, and so look like an
instance."""
_LONGEST: Final = 32
"""Bytes read from a PID file: a PID has seven digits at most (proc(5), pid_max)."""
_FLOCK: Final = "hhqqi"
_PATIENCE: Final = 200
_PATIENCE_STEP: Final = 0.005


@implementer(IPIDFile)
class NoPIDFile:
    """For twistd or another application that keeps the PID itself."""

    def claim(self) -> None:
        pass

    def release(self) -> None:
        pass


@implementer(IPIDFile)
class PIDFile:
    """A file with the PID in decimal, locked by its owner."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None

    def owner(self) -> int | None:
        """The PID of the instance that holds the file, or L{None} if none does.

        Raises L{StartError} if the file cannot be read.
        """
        for _ in range(_PATIENCE):
            try:
                descriptor = self._open(os.O_RDONLY)
            except FileNotFoundError:
                return None
            except OSError as problem:
                raise self._refusal("read", problem) from None
            try:
                lock = _held_lock(descriptor)
                if lock == fcntl.F_UNLCK or not _is_private(descriptor):
                    return None
                pid = _read_pid(descriptor) if lock == fcntl.F_RDLCK else None
            finally:
                os.close(descriptor)
            if pid is not None:
                return pid
            time.sleep(_PATIENCE_STEP)  # it has the lock and will write its PID soon
        raise StartError(
            f"{self.path} is locked by a program that does not write its PID there; end that one"
            f" (see: fuser {self.path})"
        )

    def claim(self) -> None:
        """Write this process's PID; raises L{AlreadyRunning} or L{StartError}."""
        if self._descriptor is None:
            self._descriptor = self._claim()

    def _claim(self) -> int:
        """Return a read-only descriptor that holds the lock."""
        while True:
            try:
                descriptor = self._open(os.O_RDWR | os.O_CREAT)
            except OSError as problem:
                raise self._refusal("write", problem) from None
            if self._take(descriptor):
                break
            os.close(descriptor)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
            _lock(descriptor, fcntl.F_RDLCK)
            reading = self._open(os.O_RDONLY)
        except OSError as problem:  # not a plain file, or a full disk
            raise self._refusal("write", problem) from None
        else:
            _lock(reading, fcntl.F_RDLCK)
            return reading
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> bool:
        """Return whether the file is ours now. If not, it has been removed or replaced, or its
        owner has just ended: try again."""
        if not _is_private(descriptor):
            self._remove_strange(descriptor)
            return False
        if _lock(descriptor, fcntl.F_WRLCK):
            return self._is_at_path(descriptor)  # its owner may have removed it in between
        if (pid := self.owner()) is not None:
            os.close(descriptor)
            raise AlreadyRunning(pid, self.path)
        return False

    def _remove_strange(self, descriptor: int) -> None:
        """Remove a file that other users could have written; raises L{StartError}."""
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if self._is_at_path(descriptor):
                os.unlink(self.path)
        except OSError as problem:
            os.close(descriptor)
            raise self._refusal("write", problem) from None

    def release(self) -> None:
        if self._descriptor is None:
            return
        try:
            if self._is_at_path(self._descriptor):
                os.unlink(self.path)
        except OSError:
            pass  # closing releases the lock, and only the lock counts
        os.close(self._descriptor)
        self._descriptor = None

    def remove_of(self, pid: int) -> None:
        """Remove the file of an instance that has dropped root and so could not remove it
        itself."""
        try:
            descriptor = self._open(os.O_RDWR)
        except OSError:
            return
        try:
            free = _lock(descriptor, fcntl.F_WRLCK)
            if free and self._is_at_path(descriptor) and _read_pid(descriptor) == pid:
                os.unlink(self.path)
        finally:
            os.close(descriptor)

    def _open(self, flags: int) -> int:
        # Other users may be able to write to the folder: do not follow a symbolic link, and do not
        # wait for the other end of a FIFO.
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(self.path, flags, _MODE)

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _refusal(self, what: str, problem: OSError) -> StartError:
        if isinstance(problem, PermissionError):
            return StartError(
                f"no permission to {what} the PID file {self.path}; run this as root, or set"
                " ACME_ALPN_PROXY_PIDFILE to another path",
                os.EX_NOPERM,
            )
        return StartError(
            f"cannot {what} the PID file {self.path}: {problem.strerror}; set"
            " ACME_ALPN_PROXY_PIDFILE to a plain file in a folder that exists",
            os.EX_CANTCREAT,
        )


def _lock(descriptor: int, kind: int) -> bool:
    """Return whether the lock was taken. It belongs to the open file, so it survives a fork."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(kind))
    except BlockingIOError:
        return False
    return True


def _is_private(descriptor: int) -> bool:
    """Whether only root and this user can have opened the file."""
    about = os.fstat(descriptor)
    return about.st_uid in (0, os.geteuid()) and not stat.S_IMODE(about.st_mode) & 0o077


def _held_lock(descriptor: int) -> int:
    """The kind of lock that another process holds."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK))
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind


def _flock(kind: int) -> bytes:
    """struct flock of fcntl(2), for the whole file."""
    return struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)


def _read_pid(descriptor: int) -> int | None:
    """The PID in the file; L{None} if there is none."""
    text = os.pread(descriptor, _LONGEST, 0)
    return int(text) if re.fullmatch(rb"[1-9][0-9]{0,9}\n?", text) else None
