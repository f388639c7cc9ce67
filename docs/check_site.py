"""Looks at the built site: C{python docs/check_site.py build/docs}.

Checks that every link leads to a file, and to a place in it: Sphinx does not check links to the
pages that pydoctor makes. Checks that nothing is loaded from another host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, what it loads, and the names of its places."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """As the base class asks."""
        found = {name: value for name, value in attrs if value}
        self.places |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif url := found.get("src") or found.get("href"):
            self.loaded.append(url)


read = cache(Page)


def problems(file: Path) -> Iterator[str]:
    """What is wrong with a page, a line each."""
    page = read(file)
    for url in page.links + page.loaded:
        parts = urlsplit(url)
        if parts.scheme or parts.netloc:
            if url in page.loaded and parts.scheme != "data":
                yield f"loads {url}"
            continue
        target = file.parent / unquote(parts.path) if parts.path else file
        if not target.is_file():
            yield f"{url}: no such file"
        elif parts.fragment and unquote(parts.fragment) not in read(target.resolve()).places:
            yield f"{url}: no such place"


def main() -> None:
    """Print what is wrong; 1 if anything is."""
    root = Path(sys.argv[1]).resolve()
    found = [
        f"{file.relative_to(root)}: {problem}"
        for file in (*root.glob("*.html"), *root.glob("docs/*.html"))
        for problem in problems(file)
    ]
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
