"""Shows a text again and again until a signal arrives."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from typing import Final, NoReturn

from ..interfaces import ENDED_BY_SIGNAL
from .terminal import is_terminal

WATCH_SECONDS: Final = 1.0

OTHER_SCREEN: Final = "\x1b[?1049h\x1b[?25l"
USUAL_SCREEN: Final = "\x1b[?25h\x1b[?1049l"
"""Switch the terminal to its alternate screen without a cursor, and back (xterm's control
sequences)."""

HOME: Final = "\x1b[H"
END_OF_LINE: Final = "\x1b[K\n"
ERASE_BELOW: Final = "\x1b[J"
"""Control sequences of ECMA-48 (CUP, EL, ED). Overwriting the old text flickers less than clearing
first."""


def watch(draw: Callable[[], str]) -> NoReturn:
    """Print the result of C{draw} every second.

    On a terminal, each text replaces the previous one, on the alternate screen; the last text
    stays.
    """
    if not is_terminal(sys.stdout):
        while True:
            print(draw(), end="", flush=True)
            time.sleep(WATCH_SECONDS)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)
    text = ""
    print(OTHER_SCREEN, end="")
    try:
        while True:
            text = draw()
            lines = "".join(f"{line}{END_OF_LINE}" for line in text.splitlines())
            print(f"{HOME}{lines}{ERASE_BELOW}", end="", flush=True)
            time.sleep(WATCH_SECONDS)
    finally:
        print(f"{USUAL_SCREEN}{text}", end="", flush=True)


def _exit(number: int, frame: object) -> NoReturn:
    raise SystemExit(ENDED_BY_SIGNAL + number)
