"""A text that is shown again and again."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from .pty import OnTerminal

WATCH = """
import itertools
from acme_alpn_proxy.console import watch
watch.WATCH_SECONDS = 0.01
numbers = itertools.count(1)
watch.watch(lambda: f"drawn {next(numbers)}\\nand that is all\\n")
"""
ARGV = (sys.executable, "-c", WATCH)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_terminal(number: signal.Signals) -> None:
    """On a terminal, each text replaces the previous one on the alternate screen; at the end, the
    terminal is as before, with the last text, and there is no traceback."""
    with OnTerminal(ARGV) as screen:
        screen.wait_for("drawn 3")
        screen.process.send_signal(number)
        assert screen.wait() == 128 + number
    before, after = screen.shown.split("\x1b[?25h\x1b[?1049l")
    assert before.startswith("\x1b[?1049h\x1b[?25l\x1b[Hdrawn 1\x1b[K\r\n")
    assert "all\x1b[K\r\n\x1b[J\x1b[Hdrawn 2\x1b[K\r\n" in before
    assert after.startswith("drawn ")
    assert after.endswith("\r\nand that is all\r\n")


def test_elsewhere() -> None:
    """Into a pipe the texts go one after the other."""
    with subprocess.Popen(ARGV, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        process.kill()
    assert lines == ["drawn 1\n", "and that is all\n", "drawn 2\n", "and that is all\n"]
