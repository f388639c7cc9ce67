"""Programs on a terminal of their own."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

COLUMNS = 80
MOST_SECONDS = 30.0


class OnTerminal:
    """A program with a terminal as its three standard descriptors; a context manager."""

    def __init__(self, argv: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        unset = {name: text for name, text in os.environ.items() if name != "NO_COLOR"}
        self.process = subprocess.Popen(
            argv,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**unset, "TERM": "xterm", **(env or {})},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""
        """What it has printed so far."""

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *problem: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        """Type this."""
        os.write(self._ours, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until this has been printed."""
        deadline = time.monotonic() + MOST_SECONDS
        while text not in self.shown:
            assert self._read(deadline - time.monotonic()), f"{text!r} is not in {self.shown!r}"

    def wait(self) -> int:
        """Read to the end; returns the exit status."""
        deadline = time.monotonic() + MOST_SECONDS
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(0.0, deadline - time.monotonic()))

    def lines(self) -> list[str]:
        """The text that is on the screen at the end, without erased lines."""
        texts = self.shown.replace("\r\n", "\n").split("\n")
        return [text.rpartition("\r\x1b[K")[2] for text in texts]

    def waits(self) -> list[str]:
        """The things that the program said it was waiting for, in order."""
        return re.findall(r"\r\x1b\[K([^\r\n]+)(?=\r\x1b)", self.shown)

    def _read(self, seconds: float) -> bool:
        """Whether there was more."""
        if seconds <= 0 or not select.select([self._ours], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._ours, 65_536)
        except OSError as problem:
            if problem.errno != errno.EIO:  # which means: nobody has the other end open
                raise
            return False
        self.shown += data.decode()
        return bool(data)
