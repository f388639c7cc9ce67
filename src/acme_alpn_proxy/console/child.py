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
"""Signals that are the command's."""

_OF_THE_KERNEL: Final = 0x80
"""SI_KERNEL of sigaction(2): from the terminal, and so sent to the command, too."""

_LOOK_AGAIN: Final = 0.5
"""Seconds until the command is looked at without a signal: in a process with other threads, one of
them may have been given SIGCHLD."""

_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)


class CannotRun(Exception):
    """The command is not there, or is no program; C{status} is what a shell would exit with."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def run_command(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end; gives its exit status, 128 + N if signal N ended it.

    It stays in the caller's process group. Signals that come meanwhile are passed on to it.

    @param environment: is added to that of this process.

    Raises L{CannotRun}.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*FORWARDED, signal.SIGCHLD])
    ignored = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would leave no status
    try:
        child = os.posix_spawnp(
            words[0],
            list(words),
            {**os.environ, **environment},
            setsigmask=before,
            setsigdef=_IGNORED_BY_PYTHON,
        )
        return _await_end(child)
    except (FileNotFoundError, ValueError):  # the latter for an empty word
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
                os.kill(child, got.si_signo)  # not reaped yet, so the PID is its own
            continue
        pid, status = os.waitpid(child, os.WNOHANG)  # none if it was only stopped
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else ENDED_BY_SIGNAL - code
