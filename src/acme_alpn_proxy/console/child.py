"""Runs a command as a shell would: with the caller's terminal, descriptors, and signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Final

from ..interfaces import CANNOT_RUN, ENDED_BY_SIGNAL, NOT_FOUND

FORWARDED: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""Signals that are passed on to the command."""

_OF_THE_KERNEL: Final = 0x80
"""SI_KERNEL of sigaction(2): the signal came from the terminal, which also sent it to the
command."""

_LOOK_AGAIN: Final = 0.5
"""Seconds after which the command is checked even if no signal came: in a process with other
threads, another thread may have received SIGCHLD."""

_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)


class CannotRun(Exception):
    """The command does not exist or is not a program; C{status} is the exit status of a shell."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def run_command(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end; returns its exit status, 128 + N if signal N ended it.

    It stays in the caller's process group. Signals that arrive while it runs are passed on to it.

    @param environment: added to the environment of this process.

    Raises L{CannotRun}.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*FORWARDED, signal.SIGCHLD])
    ignored = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored: no exit status
    try:
        child = os.posix_spawnp(
            words[0],
            list(words),
            {**os.environ, **environment},
            setsigmask=before,
            setsigdef=_IGNORED_BY_PYTHON,
        )
        return _await_end(child)
    except (FileNotFoundError, ValueError):  # ValueError: an empty word
        raise CannotRun(
            f"{words[0]}: command not found; name one that is on PATH", NOT_FOUND
        ) from None
    except OSError as problem:
        raise CannotRun(
            f"cannot run {words[0]}: {problem.strerror}; name a program that may be executed",
            CANNOT_RUN,
        ) from None
    finally:
        signal.signal(signal.SIGCHLD, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _await_end(child: int) -> int:
    while True:
        got = signal.sigtimedwait([*FORWARDED, signal.SIGCHLD], _LOOK_AGAIN)
        if got is not None and got.si_signo != signal.SIGCHLD:
            if got.si_code != _OF_THE_KERNEL:
                os.kill(child, got.si_signo)  # not reaped yet, so the PID still belongs to it
            continue
        pid, status = os.waitpid(child, os.WNOHANG)  # PID 0 if it was only stopped
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else ENDED_BY_SIGNAL - code
