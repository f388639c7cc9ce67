"""What can go wrong at the start and at the stop, with a text for the operator."""

from __future__ import annotations

import os
from typing import Final

AS_ADMINISTRATOR: Final = "run this as root (in a container: with CAP_NET_ADMIN)"
"""The remedy for a process that may not change the firewall's rules."""


def cause_and_remedy(text: str) -> tuple[str, str]:
    """The two parts of a line for the operator; the remedy is empty if the line has none."""
    cause, _, remedy = text.rpartition("; ")
    return (cause, remedy) if cause else (text, "")


class StartError(Exception):
    """The proxy cannot start, or cannot go on; nothing is left applied.

    The text is one line: the cause first, the remedy second.

    @ivar status: the exit status of the console script: the one of sysexits(3) that fits the
        failure, otherwise 1, which the original program always uses.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status

    @property
    def cause(self) -> str:
        """What is wrong, without the remedy."""
        return cause_and_remedy(str(self))[0]

    @property
    def remedy(self) -> str:
        """What to do; empty if the text does not say."""
        return cause_and_remedy(str(self))[1]


class AlreadyRunning(StartError):
    """Another instance holds the PID file.

    @ivar pid: the PID of that instance.
    @ivar path: the PID file.
    """

    def __init__(self, pid: int, path: str) -> None:
        super().__init__(f"already running as PID {pid} ({path})")
        self.pid = pid
        self.path = path


class VisitorsLost(StartError):
    """The proxy steers, but would lose visitors if it went on: it must stop at once."""

    @classmethod
    def because_of(cls, problem: StartError) -> VisitorsLost:
        """Turn a L{StartError} that occurs while the proxy runs into an error of this class."""
        return cls(str(problem), problem.status)


def not_permitted(reason: str) -> StartError:
    """The error for a step that failed because this process lacks a privilege."""
    return StartError(f"{reason}; {AS_ADMINISTRATOR}", os.EX_NOPERM)


def refused_by_system(problem: OSError) -> StartError:
    """The error for a step that normally never fails, but that the kernel refused."""
    return StartError(
        f"the kernel refused an operation: {problem}; check the limits (ulimit -a) and the free"
        " disk space (df)",
        os.EX_OSERR,
    )
