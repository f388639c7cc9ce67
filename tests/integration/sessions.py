"""The sessions on a terminal that pages show: run for real, and compared or written down.

A block C{console} of a page has commands, each after the prompt C{# }, and what they print. All
blocks of a page are one session, on a host of its own with a web server, an ACME client and a test
CA. C{python -m tests.integration.sessions} runs them all and writes what they print into the pages.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

from ..documents import README, ROOT
from .acme import pebble
from .netns import street, terminate
from .privatehost import Host
from .website import Visit, website

PAGES = (README, "docs/tutorial.md", "docs/commands.md")

_BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^# (?:.*\\\n)*.*\n", re.MULTILINE)
_END = "--- end of what it prints ---"

_SHOWN = {"10.88.0.2:14000": "ca.example", "10.88.0.2_14000": "ca.example"}
"""Replacements, in the pages, for addresses that exist only in this test."""

_Visit = Callable[[], AbstractContextManager[Visit]]


class Shell:
    """A shell on the host, as the reader of a page has it."""

    def __init__(self, process: subprocess.Popen[str], visit: _Visit) -> None:
        self._process = process
        self._visit = visit

    def run(self, command: str) -> str:
        """Run a command to its end; what it has printed. For a status, a visitor is there."""
        if " status" not in command:
            return self._run(command)
        with self._visit() as visitor:
            visitor.get()
            return self._run(command)

    def _run(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{{ {command}\n}} </dev/null 2>&1\necho '{_END}'\n")
        self._process.stdin.flush()
        printed = []
        for line in self._process.stdout:
            before, end, _ = line.partition(_END)
            printed.append(before)
            if end:
                break
        text = "".join(printed)
        for real, shown in _SHOWN.items():
            text = text.replace(real, shown)
        return text


@contextmanager
def session(directory: Path) -> Iterator[Shell]:
    """A host with a web server and a CA, and a visitor who is reading."""
    with ExitStack() as ends:
        road = ends.enter_context(street())
        site = ends.enter_context(website(road.host.namespace, directory / "site"))
        ca = ends.enter_context(pebble(road.visitor, road.host, directory / "ca"))
        process = Host(road.host.namespace, ca, directory / "host").shell()
        ends.callback(terminate, process)
        visit = partial(site.visit, road.visitor.namespace, road.host.ipv4)
        yield Shell(process, visit)


def run(page: str, directory: Path) -> str:
    """The text of a page with what its commands print now."""
    with session(directory) as shell:

        def run_block(block: re.Match[str]) -> str:
            return "".join(
                command + shell.run(command.removeprefix("# ").rstrip("\n"))
                for command in _COMMAND.findall(block[0])
            )

        return _BLOCK.sub(run_block, (ROOT / page).read_text())


def alike(text: str) -> list[str]:
    """The lines of a text without what differs each time: numbers, random names and addresses, and
    the spaces that make columns of them."""
    # Newer versions of pebble issue certificates without a subject.
    text = re.sub(r"(?m)^(subject=|X509v3 [\w ]+:).*", r"\1", text)
    text = re.sub(r"[\w-]{24,}", "X", text)
    text = re.sub(r"\b[\da-f]{1,4}(?::[\da-f]{0,4}){2,}", "N", text)
    text = re.sub(r"\b[\da-f]{6,}\b", "N", text)
    text = re.sub(r"\d+(?:[.:/-]\d+)*", "N", text)
    return ["".join(line.split()) for line in text.splitlines()]


def main() -> None:
    """Write into the pages what the commands print now."""
    for page in PAGES:
        with tempfile.TemporaryDirectory(prefix="acme-alpn-proxy-session-") as directory:
            (ROOT / page).write_text(run(page, Path(directory)))


if __name__ == "__main__":
    main()
