"""What the pages show of a terminal is what the commands print."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..documents import ROOT
from .sessions import PAGES, alike, run


@pytest.mark.parametrize("page", PAGES)
def test_session(tmp_path: Path, page: str) -> None:
    """A reader who types the commands sees what the page shows, but for numbers and the like."""
    assert alike(run(page, tmp_path)) == alike((ROOT / page).read_text())
