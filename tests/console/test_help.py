"""The help, as a whole and of each command."""

from __future__ import annotations

import re
from typing import Any

import pytest

from acme_alpn_proxy.console.help import help_text, options
from acme_alpn_proxy.options import COMMANDS, TOPICS, ConsoleOptions

from .commands import program

LONGEST = 80


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_width(command: str) -> None:
    """The help fits a terminal of 80 columns."""
    text = help_text(command)
    assert [line for line in text.splitlines() if len(line) >= LONGEST] == []
    assert text.startswith("Usage: acme-alpn-proxy ")


def test_order() -> None:
    """The commands come first, with a line each; then two examples; then options by topic."""
    text = program("--help")
    parts = re.findall(r"^([A-Z].*):$", text, re.MULTILINE)
    assert parts[:2] == ["Commands", "Examples"]
    titles = [topic.title for topic in TOPICS]
    assert parts[2:-1] == titles
    commands = text.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in commands] == list(COMMANDS)
    examples = text.partition("Examples:\n")[2].partition("\n\n")[0]
    assert examples.count("  # ") == 2


def test_every_option() -> None:
    """The general help has every option; the help of a command has the options that it accepts."""
    known = {name.rstrip("=") for name in ConsoleOptions().longOpt if len(name) > 1}
    assert {option.long for option in options()} == known
    assert known <= set(re.findall("--([a-z0-9-]+)", help_text()))
    assert "--watch" in help_text("status")
    assert "--alpn ADDRESS" in help_text("start")
    assert "--alpn" not in help_text("stop")
    assert "--drain-timeout SECONDS" in help_text("stop")


def test_how_it_is_asked_for() -> None:
    """C{help}, C{--help} and C{-h} are one; C{help COMMAND} and C{COMMAND --help} are, too."""
    assert program("help") == program("--help") == program("-h") == help_text()
    assert program("help", "stop") == program("stop", "--help") == help_text("stop")
    assert program("help", "doctor") == help_text("check")


def test_option_without_a_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that names no topic is shown last."""
    new: list[Any] = [["new", None, "Something new"]]
    monkeypatch.setattr(ConsoleOptions, "optFlags", [*ConsoleOptions.optFlags, *new])
    assert "Other options:\n" in help_text()
    assert re.search("  --new +Something new\n", help_text().partition("Other options:\n")[2])
