"""Sphinx: the pages below docs/, README, CONTRIBUTING and CHANGELOG. A dead link is an error.

The pages are plain Markdown, so that they read well in the repository, too. Three things are added
here: drawings follow the theme of the site, marked sections become tabs, and the start page of the
build leads to docs/index.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx_design.shared import create_component

project = "acme-alpn-proxy"
extensions = ["myst_parser", "sphinx_copybutton", "sphinx_design"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md"]
exclude_patterns = [".*", "build"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# pydoctor writes the reference of the modules: [tap](api:acme_alpn_proxy.tap).
myst_url_schemes = {
    "http": None,
    "https": None,
    "mailto": None,
    "api": "../api/{{path}}.html",
}

html_theme = "furo"
html_title = "acme-alpn-proxy"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("tabs.js", {"defer": "defer"})]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#b93a08", "color-brand-content": "#b93a08"},
    "dark_css_variables": {"color-brand-primary": "#ff8f5f", "color-brand-content": "#ff8f5f"},
}
# The copy button copies only the commands of a terminal session, without prompt and output.
copybutton_exclude = ".linenos, .gp, .go"

BEGIN_TABS, END_TABS = "<!-- tabs -->", "<!-- end of tabs -->"
"""The sections between these are shown as tabs."""


def setup(app: Sphinx) -> None:
    """Sphinx asks for this."""
    # After Sphinx has collected the headings, so that the tabs are in the contents of the page.
    app.connect("doctree-read", _show_tabs, priority=900)
    app.connect("doctree-read", _box_drawings, priority=900)
    app.connect("build-finished", _add_index)


def _show_tabs(app: Sphinx, page: nodes.document) -> None:
    for begin in [mark for mark in page.findall(nodes.raw) if _says(mark, BEGIN_TABS)]:
        parent = begin.parent
        tabs = create_component("tab-set", classes=["sd-tab-set"])
        first = parent.index(begin)
        for section in parent[first + 1 :]:
            title, *content = section.children
            label = nodes.rubric("", "", *title.children, classes=["sd-tab-label"])
            label["ids"] = section["ids"]
            item = create_component("tab-item", classes=["sd-tab-item"])
            item += label
            item += create_component("tab-content", classes=["sd-tab-content"], children=content)
            tabs += item
            parent.remove(section)
            if content and _says(content[-1], END_TABS):
                break
        parent[first] = tabs


def _says(node: nodes.Node, mark: str) -> bool:
    return isinstance(node, nodes.raw) and node.astext().strip() == mark


def _box_drawings(app: Sphinx, page: nodes.document) -> None:
    """Each drawing gets a box, in which it scrolls on a narrow screen. A drawing that uses the
    colour of the text becomes part of the page, so that it follows the theme."""
    for image in list(page.findall(nodes.image)):
        file = Path(app.srcdir, image["uri"])
        if file.suffix != ".svg" or not file.exists():
            continue
        paragraph = image.parent
        while not isinstance(paragraph, nodes.paragraph):  # it may be a link's
            paragraph = paragraph.parent
        text = file.read_text()
        if "currentColor" in text:
            drawing = re.sub("<style>.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
            says = f'role="img" aria-label="{escape(image["alt"])}"'
            html = f'<div class="drawing"><svg {says}{drawing.removeprefix("<svg")}</div>'
            paragraph.parent.replace(paragraph, nodes.raw("", html, format="html"))
        else:
            paragraph["classes"].append("drawing")


def _add_index(app: Sphinx, problem: Exception | None) -> None:
    target = f"{root_doc}.html"
    if problem is None:
        Path(app.outdir, "index.html").write_text(
            f'<!doctype html><meta charset="utf-8"><title>{project}</title>\n'
            f'<meta http-equiv="refresh" content="0; url={target}">\n'
            f'<a href="{target}">{project}</a>\n'
        )
