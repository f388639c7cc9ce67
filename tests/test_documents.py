"""What the documents say of the project's files. That links lead somewhere is for Sphinx to see."""

from __future__ import annotations

import re

import pytest

from .documents import ROOT

FILE = re.compile(r"`((?:bench|docs|examples|newsfragments|packaging|src|tests)/[\w./-]+)`")
NAMED = {
    str(document.relative_to(ROOT)): files
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    if (files := FILE.findall(document.read_text()))
}


@pytest.mark.parametrize("document", NAMED)
def test_files_named(document: str) -> None:
    """Each file that a document names is there: the test that shows a promise, for one."""
    assert [name for name in NAMED[document] if not (ROOT / name).exists()] == []


def test_promises() -> None:
    """Each promise of the README names the test that shows it."""
    table = (ROOT / "README.md").read_text().partition("| promise | shown by |\n")[2]
    rows = table.partition("\n\n")[0].splitlines()[1:]
    assert len(rows) >= 12
    assert [row for row in rows if not re.search(r"\| `tests/[\w/]+\.py` \|$", row)] == []
