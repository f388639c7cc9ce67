"""The man page, as man(1) shows it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from acme_alpn_proxy.console.help import ENVIRONMENT, EXIT_STATUSES
from acme_alpn_proxy.options import COMMANDS, ConsoleOptions

from .commands import NAME, program, run
from .pty import OnTerminal

LONG_OPTIONS = {f"--{name.rstrip('=')}" for name in ConsoleOptions().longOpt if len(name) > 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the command C{manual}."""
    path = tmp_path_factory.mktemp("manual") / "acme-alpn-proxy.8"
    path.write_text(program("manual"))
    return path


@pytest.fixture(scope="module")
def page(source: Path) -> dict[str, str]:
    """The rendered page, by headings."""
    text = run("man", "--warnings", "-l", source)
    parts = re.split(r"^([A-Z][A-Z ]+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def terms(section: str) -> set[str]:
    """The terms that a section explains: the lines that begin at its margin."""
    margin = min(len(line) - len(line.lstrip()) for line in section.splitlines() if line.strip())
    lines = [line[margin:] for line in section.splitlines()]
    return {re.split(r"  +", line)[0] for line in lines if line[:1].strip()}


def test_everything_is_there(page: dict[str, str]) -> None:
    """The page has every option, command, variable and exit status, and the usual sections."""
    assert set(re.findall(r"--[a-z0-9-]+", page["OPTIONS"])) >= LONG_OPTIONS
    assert set(COMMANDS) <= {term.split()[0] for term in terms(page["COMMANDS"])}
    assert set(ENVIRONMENT) <= terms(page["ENVIRONMENT"])
    assert set(EXIT_STATUSES) <= terms(page["EXIT STATUS"])
    assert "SIGUSR1" in terms(page["SIGNALS"])
    assert "/var/run/acme-alpn-proxy.pid" in page["FILES"]
    assert "acme-alpn-proxy run -- \\\n" in page["EXAMPLES"]
    assert "iptables(8)" in page["SEE ALSO"]


def test_sound(source: Path) -> None:
    """mandoc, which is stricter than man, reports no problem."""
    assert run("mandoc", "-T", "lint", source) == ""


def test_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal man(1) shows it; where there is none, the source is printed."""
    argv = (sys.executable, "-m", "acme_alpn_proxy", "manual")
    with OnTerminal(argv, {"MANPAGER": "cat"}) as screen:
        assert screen.wait() == 0
    assert "RFC 8737 (TLS-ALPN-01)" in screen.shown
    assert ".SH" not in screen.shown
    with OnTerminal(argv, {"PATH": str(tmp_path)}) as screen:
        assert screen.wait() == 0
    assert screen.shown.startswith(f".TH {NAME.upper()} 8 ")
