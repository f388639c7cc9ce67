"""A handle on another process: a signal cannot reach a later process with the same PID."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from typing import Final

from .facts import process_start_time

_PIDFD_SEND_SIGNAL: Final = 424
_PIDFD_OPEN: Final = 434
"""System calls of Linux 5.1 and 5.3, with the same number on every machine. Some builds of Python
have no functions for them."""

_POLL_SECONDS: Final = 0.02


class ProcessHandle:
    """A handle on a process: a pidfd (pidfd_open(2)); before Linux 5.3, its start time."""

    def __init__(self, pid: int) -> None:
        """Raises C{ProcessLookupError} if there is no such process."""
        self.pid = pid
        self._started = process_start_time(pid)
        self._descriptor: int | None = None
        try:
            self._descriptor = _open(pid)
        except ProcessLookupError:
            raise
        except OSError:
            if self._started is None:
                raise ProcessLookupError from None

    def __enter__(self) -> ProcessHandle:
        return self

    def __exit__(self, *problem: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def ended(self, seconds: float) -> bool:
        """Return whether it ends within that time."""
        if self._descriptor is not None:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            return bool(poll.poll(seconds * 1000))
        deadline = time.monotonic() + seconds
        while process_start_time(self.pid) == self._started:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal; raises C{ProcessLookupError} if the process has ended, or
        C{PermissionError}."""
        if self._descriptor is None:
            if process_start_time(self.pid) != self._started:
                raise ProcessLookupError
            os.kill(self.pid, number)
        elif hasattr(signal, "pidfd_send_signal"):
            signal.pidfd_send_signal(self._descriptor, number)
        else:
            _system_call(_PIDFD_SEND_SIGNAL, self._descriptor, number, None, 0)


def _open(pid: int) -> int:
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    return _system_call(_PIDFD_OPEN, pid, 0)


def _system_call(*arguments: int | None) -> int:
    """syscall(2); raises C{OSError}."""
    libc = ctypes.CDLL(None, use_errno=True)
    longs = [each if each is None else ctypes.c_long(each) for each in arguments]
    result: int = libc.syscall(*longs)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
