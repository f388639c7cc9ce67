"""Lines for an operator, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from acme_alpn_proxy.console.terminal import coloured

from .pty import COLUMNS, OnTerminal

SHOW = """
from acme_alpn_proxy.console.terminal import Waiting, coloured, tell
import sys
tell("warning: careful")
tell("just so: it is")
with Waiting() as waiting:
    waiting.show("waiting for 3 of them")
    waiting.show("waiting for 3 of them")
    waiting.show("waiting for " + 100 * "very long ")
    waiting.tell("a line that stays")
    waiting.show("waiting for the end")
print(coloured("ok     ", sys.stdout), coloured("nothing", sys.stdout))
"""
ARGV = (sys.executable, "-c", SHOW)


def test_terminal() -> None:
    """On a terminal, each wait replaces the previous one, fits the line, and is erased at the
    end."""
    with OnTerminal(ARGV) as screen:
        assert screen.wait() == 0
    first, second, third = screen.waits()
    assert (first, third) == ("waiting for 3 of them", "waiting for the end")
    assert len(second) == COLUMNS - 1
    assert screen.lines() == [
        "acme-alpn-proxy: \x1b[33mwarning\x1b[m: careful",
        "acme-alpn-proxy: just so: it is",
        "acme-alpn-proxy: a line that stays",
        "\x1b[32mok     \x1b[m nothing",
        "",
    ]


def test_no_colour() -> None:
    """With NO_COLOR there is no colour; on a dumb terminal, no line is replaced either."""
    with OnTerminal(ARGV, {"NO_COLOR": "1"}) as screen:
        assert screen.wait() == 0
    assert "acme-alpn-proxy: warning: careful" in screen.lines()
    assert len(screen.waits()) == 3
    with OnTerminal(ARGV, {"TERM": "dumb"}) as screen:
        assert screen.wait() == 0
    assert "\x1b" not in screen.shown
    assert screen.waits() == []


def test_elsewhere() -> None:
    """Without a terminal, only the lines are printed."""
    done = subprocess.run(ARGV, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "ok      nothing\n"
    assert done.stderr == (
        "acme-alpn-proxy: warning: careful\n"
        "acme-alpn-proxy: just so: it is\n"
        "acme-alpn-proxy: a line that stays\n"
    )


def test_colour_of_what_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is no terminal, and C{None} in place of a stream, get no colours."""
    monkeypatch.setattr(os, "environ", {})
    assert coloured("ok", io.StringIO()) == coloured("ok", None) == "ok"
