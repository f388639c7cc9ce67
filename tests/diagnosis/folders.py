"""Folders of tests."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from twisted.trial.unittest import SynchronousTestCase


def folder_for(case: SynchronousTestCase) -> Path:
    """A folder of the test's own."""
    folder = TemporaryDirectory()
    case.addCleanup(folder.cleanup)
    return Path(folder.name)
