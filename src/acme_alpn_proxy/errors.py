"""What can go wrong at start and stop, in words for the operator."""

from __future__ import annotations

import os
from typing import Final

AS_ADMINISTRATOR: Final = "run this as root, with CAP_NET_ADMIN where it runs in a container"
"""The remedy for who may not change the firewall's rules."""


class StartError(Exception):
    """The proxy cannot start, or cannot go on; nothing is left applied.

    The text is one line: the cause first, the remedy second.

    @ivar status: what the console script exits with: that of sysexits(3) where the failure is of
        one of its classes, else 1, as the original program does always.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class AlreadyRunning(StartError):
    """Another instance holds the PID file."""


def not_permitted(reason: str) -> StartError:
    """What fails for lack of a privilege over the network."""
    return StartError(f"{reason}; {AS_ADMINISTRATOR}", os.EX_NOPERM)


def refused_by_system(problem: OSError) -> StartError:
    """What the kernel refuses where nobody has expected it."""
    return StartError(
        f"the system refuses: {problem}; look at its limits (ulimit -a) and its disks (df)",
        os.EX_OSERR,
    )
