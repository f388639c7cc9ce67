"""Sphinx: README.md and the pages it leads to, as they stand, as HTML. A dead link is an error."""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

project = "acme-alpn-proxy"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md"]
exclude_patterns = [".*", "build"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
html_theme = "alabaster"
html_copy_source = False

_CONTENTS = """
```{toctree}
:hidden:
:glob:
docs/*
CONTRIBUTING
CHANGELOG
```
"""


def setup(app: Sphinx) -> None:
    """The README is the first page, with all others beside it."""
    app.connect("source-read", _add_contents)
    app.connect("build-finished", _add_index)


def _add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    if page == root_doc:
        source[0] += _CONTENTS


def _add_index(app: Sphinx, problem: Exception | None) -> None:
    if problem is None:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))
