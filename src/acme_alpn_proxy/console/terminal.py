"""The operator's terminal: lines, colours, and one line that shows what the program waits for."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Final, TextIO

NAME: Final = "acme-alpn-proxy"

COLOURS: Final = {
    "ok": 32,
    "running": 32,
    "idle": 32,
    "warning": 33,
    "starting": 33,
    "draining": 33,
    "failed": 31,
    "silent": 31,
}
"""For each word, its colour: 32 is green, 33 yellow, 31 red (ECMA-48 SGR)."""

_ERASE_LINE: Final = "\r\x1b[K"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that can erase a line."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(word: str, stream: TextIO | None) -> str:
    """The word, in its colour if C{stream} is a terminal and NO_COLOR (no-color.org) is not set.

    @param word: may have spaces around it.
    """
    colour = COLOURS.get(word.strip())
    if colour is None or os.environ.get("NO_COLOR") or not is_terminal(stream):
        return word
    return f"\x1b[{colour}m{word}\x1b[m"


def tell(text: str) -> None:
    """Print one line to stderr. The real stderr: twistd may redirect C{sys.stderr} to the log."""
    stream = sys.__stderr__
    if stream is not None:
        line = " ".join(text.splitlines())  # a path may contain line ends
        word, colon, rest = line.partition(":")
        with contextlib.suppress(OSError):  # the exit status still reports the failure
            print(f"{NAME}: {coloured(word, stream)}{colon}{rest}", file=stream, flush=True)


class Waiting:
    """On a terminal, one line that shows what the program waits for; a new text replaces the old.

    The line is erased at the end of the C{with} block. Without a terminal, nothing is printed.
    """

    def __init__(self) -> None:
        self._stream = sys.__stderr__ if is_terminal(sys.__stderr__) else None
        self._shown = ""

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *problem: object) -> None:
        self.clear()

    def __bool__(self) -> bool:
        """Whether the line is shown at all."""
        return self._stream is not None

    def show(self, text: str) -> None:
        """Show that the program waits for this."""
        if text != self._shown:
            self._print(f"{_ERASE_LINE}{text[: self._columns() - 1]}")
            self._shown = text

    def tell(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        tell(text)

    def clear(self) -> None:
        """Erase the line: the wait is over, or another line is going to be printed."""
        if self._shown:
            self._print(_ERASE_LINE)
            self._shown = ""

    def _columns(self) -> int:
        try:
            assert self._stream is not None
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (AssertionError, OSError, ValueError):
            return 80

    def _print(self, text: str) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                print(text, end="", file=self._stream, flush=True)


def nobody_reads() -> None:
    """The reader of our output has closed it, as head(1) does: discard the rest."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def fill_standard_descriptors() -> None:
    """Open descriptors 0 to 2 if the caller has closed them, so that no file takes their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
