"""The commands that the documents tell people to run."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SHELL = ("", "sh", "shell", "bash", "console")


def shell_blocks(document: str) -> dict[str, str]:
    """The fenced shell blocks of a document, each by C{document: heading}.

    A fence that says no language is taken for the shell's. Under one heading the second block is
    C{document: heading (2)}, and so on.
    """
    blocks: dict[str, str] = {}
    name, count, block, is_shell = document, 0, None, False
    for line in (ROOT / document).read_text().splitlines():
        if line.startswith("```"):
            if block is None:
                block, is_shell = [], line.removeprefix("```").strip() in _SHELL
                continue
            if is_shell:
                count += 1
                blocks[name if count == 1 else f"{name} ({count})"] = "\n".join(block) + "\n"
            block = None
        elif block is not None:
            block.append(line)
        elif line.startswith("#"):
            name, count = f"{document}: {line.lstrip('#').strip()}", 0
    return blocks
