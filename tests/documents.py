"""Reads the documents: blocks of commands, and commands within the text."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

README = "README.md"
CLIENTS = "docs/clients.md"
INSTALL = "docs/install.md"
RENEWAL = "docs/renewal.md"
TUTORIAL = "docs/tutorial.md"

MAKE = f"{README}: acme-alpn-proxy"
SYNOPSIS = f"{README}: Commands and options"

_FENCE = "```"


def fenced_blocks(document: str) -> dict[str, str]:
    """The fenced blocks of a document, each by C{document: heading}.

    Under one heading the second block is C{document: heading (2)}, and so on.
    """
    blocks: dict[str, str] = {}
    name, count = document, 0
    block: list[str] | None = None
    for line in (ROOT / document).read_text().splitlines():
        if line.lstrip().startswith(_FENCE):
            if block is None:
                block = []
                continue
            count += 1
            blocks[name if count == 1 else f"{name} ({count})"] = "\n".join(block) + "\n"
            block = None
        elif block is not None:
            block.append(line)
        elif line.startswith("#"):
            name, count = f"{document}: {line.lstrip('#').strip()}", 0
    return blocks


def spans(document: str) -> list[str]:
    """The code spans (between backticks) of a document, outside its blocks."""
    text = re.sub(
        rf"^ *{_FENCE}.*?^ *{_FENCE}", "", (ROOT / document).read_text(), flags=re.M | re.S
    )
    return [" ".join(span.split()) for span in re.findall("`([^`]+)`", text)]
