"""Whether the documents name existing commands, options and files, as far as that can be checked
without running them. Sphinx checks the links."""

from __future__ import annotations

import itertools
import re
import subprocess
from typing import Any

import pytest
from twisted.application.service import IServiceCollection

from acme_alpn_proxy import __version__
from acme_alpn_proxy.options import COMMANDS, ConsoleOptions
from acme_alpn_proxy.service import ProxyService

from .documents import (
    CLIENTS,
    INSTALL,
    MAKE,
    README,
    RENEWAL,
    ROOT,
    SYNOPSIS,
    fenced_blocks,
    spans,
)
from .integration.sessions import PAGES

RECIPES = {
    "demo": "python -m tests.integration.demo",
    "test": "tox run",
    "bench": "python -m bench",
    "pyz": "dist/acme-alpn-proxy.pyz",
    "deb": "dist",
}
"""How the last command ends that make runs for it."""

FILE = re.compile(r"(?:bench|docs|examples|newsfragments|packaging|src|tests)/[\w./-]+")
NAMED = {
    document: files
    for document in (README, "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
    if (files := [span for span in spans(document) if FILE.fullmatch(span)])
}


@pytest.mark.parametrize("document", NAMED)
def test_files(document: str) -> None:
    """Each file that a document names is there."""
    assert [name for name in NAMED[document] if not (ROOT / name).exists()] == []


def test_promises() -> None:
    """Each promise of the README names the test that shows it."""
    table = (ROOT / README).read_text().partition("| promise | shown by |\n")[2]
    rows = table.partition("\n\n")[0].splitlines()[1:]
    assert len(rows) >= 12
    assert [row for row in rows if not re.search(r"\| `tests/[\w/]+\.py` \|$", row)] == []


def test_threats() -> None:
    """Each row of the threat model names its evidence: files, or tests that exist."""
    table = (ROOT / "docs/security.md").read_text().partition("| shown by |\n")[2]
    rows = table.partition("\n\n")[0].splitlines()[1:]
    tests = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    named = [re.findall(r"`([^`]+)`", row.split("|")[-2]) for row in rows]
    assert [row for row, names in zip(rows, named, strict=True) if not names] == rows[-1:]
    for name in itertools.chain(*named):
        assert (ROOT / name).exists() if "/" in name else f"def {name}(" in tests, name


def understood(line: str) -> set[str]:
    """Parse a line of a synopsis, once for each command in it; returns these commands."""
    line = re.sub(r"[][]|\.\.\.", "", line).replace("HOST:PORT", "127.0.0.1:8443")
    commands = set()
    for words in itertools.product(*(word.split("|") for word in line.split()[1:])):
        options = ConsoleOptions()
        options.parseOptions(words)
        commands.add(options["command"])
    return commands


def test_synopsis() -> None:
    """Each line of the README's synopsis is understood, and no command is missing."""
    lines = fenced_blocks(README)[SYNOPSIS].splitlines()
    assert set().union(*map(understood, lines)) == set(COMMANDS)


@pytest.mark.parametrize("document", [CLIENTS, INSTALL, RENEWAL, *PAGES])
def test_commands_in_the_text(document: str) -> None:
    """Each command of the proxy that is named in the text is understood."""
    lines = [span for span in spans(document) if span.startswith("acme-alpn-proxy ")]
    for line in lines:
        if line != "acme-alpn-proxy --help":
            assert understood(line)


def test_each_command_has_a_section() -> None:
    """No command is missing in docs/commands.md."""
    headings = re.findall("^## (.+)$", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
    assert set(COMMANDS) <= set(headings)


def test_options_in_the_text() -> None:
    """Each option that the README names is there, spelt like that."""
    options = ConsoleOptions()
    known = {name.rstrip("=") for name in options.longOpt} | set(options.shortOpt)
    named = [span.split()[0].lstrip("-") for span in spans(README) if span.startswith("-")]
    assert len(named) >= 7
    assert set(named) <= known


def test_make() -> None:
    """Each make command of README and docs/install.md exists, and does what is tested."""
    lines = fenced_blocks(README)[MAKE].splitlines()
    lines += [span for span in spans(README) if span.startswith("make ")]
    blocks = "".join(fenced_blocks(INSTALL).values())
    lines += [line for line in blocks.splitlines() if line.startswith("make ")]
    targets = [line.partition("#")[0].split()[1] for line in lines]
    assert set(targets) == set(RECIPES)
    for target in targets:
        planned = subprocess.run(
            ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True
        )
        assert planned.returncode == 0, planned.stderr
        assert planned.stdout.rstrip().endswith(RECIPES[target])


def test_version() -> None:
    """Both changelogs begin with the version that the program tells."""
    for changelog in ("CHANGELOG.md", "debian/changelog"):
        newest = re.search(r"\d+\.\d+\.\d+", (ROOT / changelog).read_text())
        assert newest is not None
        assert newest[0] == __version__


def test_library() -> None:
    """The lines for other applications put a proxy into the application."""
    (block,) = fenced_blocks("docs/library.md").values()
    names: dict[str, Any] = {}
    exec(block, names)
    (service,) = IServiceCollection(names["application"])
    assert isinstance(service, ProxyService)
