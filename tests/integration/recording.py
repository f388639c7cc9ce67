"""Records a command on a terminal, and writes what it printed into the documents.

C{python -m tests.integration.recording make demo} runs the command, keeps the recording in
F{docs/demo.cast}, draws it as F{docs/demo.svg}, and writes the text into F{docs/demo.md}. Without a
command it draws and writes what is kept.

The recording has the format of asciinema, version 2: a line about the whole, then one line for each
piece of output with its time in seconds. The drawing plays once. It shows the whole where there are
no animations, and where the reader does not want any.
"""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import sys
import time
from html import escape

from ..documents import ROOT

CAST, DRAWING, PAGE = (ROOT / "docs" / f"demo.{kind}" for kind in ("cast", "svg", "md"))

COLUMNS = 88
LONGEST_PAUSE = 3.0
"""The longest pause in the drawing, in seconds. Longer pauses are shortened; the times that are
printed stay."""
CHARACTER, LINE, MARGIN = 8.4, 20, 16
PROMPT = "# "

_STYLE = """\
text { font: 14px ui-monospace, "DejaVu Sans Mono", monospace; fill: #e6e6e6; white-space: pre }
.typed { fill: #ffb38f }
@keyframes wait { from { visibility: hidden } }
text { animation: wait step-end }
@media (prefers-reduced-motion: reduce) { text { animation: none } }"""

Event = tuple[float, str, str]
"""Seconds since the start, C{o} for output, the text."""


def record(command: list[str]) -> list[Event]:
    """Run a command on a terminal of its own; gives what it printed. Raises if it fails."""
    process, terminal = pty.fork()
    if not process:
        os.execvp(command[0], command)
    began = time.monotonic()
    events: list[Event] = []
    while True:
        select.select([terminal], [], [])
        try:
            output = os.read(terminal, 65536)
        except OSError:  # Linux: the other side has closed the terminal
            break
        events.append((round(time.monotonic() - began, 2), "o", output.decode()))
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status:
        printed = "".join(text for _, _, text in events)
        raise SystemExit(f"{printed}{shlex.join(command)} ended with {status}")
    return events


def pieces(events: list[Event]) -> list[tuple[float, int, int, str]]:
    """Each piece of text with its time and place: seconds, line, column, text without newlines."""
    found = []
    line = column = 0
    before = skipped = 0.0
    for real, _, text in events:
        skipped += max(0.0, real - before - LONGEST_PAUSE)
        before, seconds = real, round(real - skipped, 2)
        for number, part in enumerate(text.replace("\r\n", "\n").split("\n")):
            if number:
                line, column = line + 1, 0
            if part.strip():
                found.append((seconds, line, column, part))
            column += len(part)
    return found


def draw(events: list[Event], title: str) -> str:
    """The recording as SVG."""
    shown = pieces(events)
    width = round(COLUMNS * CHARACTER + 2 * MARGIN)
    height = (max(line for _, line, _, _ in shown) + 1) * LINE + 2 * MARGIN
    texts = []
    for seconds, line, column, text in shown:
        start = len(text) - len(text.lstrip())
        text = text.strip()
        x, y = MARGIN + (column + start) * CHARACTER, MARGIN + line * LINE + 15
        look = ' class="typed"' if text.startswith(PROMPT) else ""
        texts.append(
            f'<text{look} x="{x:.1f}" y="{y}" textLength="{len(text) * CHARACTER:.1f}"'
            f' style="animation-duration:{seconds}s">{escape(text)}</text>'
        )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE}\n</style>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#1b1d22"/>',
            *texts,
            "</svg>\n",
        ]
    )


def kept() -> tuple[str, list[Event]]:
    """The command that was recorded, and what it printed."""
    head, *events = map(json.loads, CAST.read_text().splitlines())
    return head["title"], events


def written(page: str, events: list[Event]) -> str:
    """A page with what was printed in its block C{text}."""
    before, fence, rest = page.partition("```text\n")
    text = "".join(output for _, _, output in events).replace("\r\n", "\n").rstrip()
    return f"{before}{fence}{text}\n```{rest.partition('```')[2]}"


def main() -> None:
    """Record if there is a command; draw and write."""
    if command := sys.argv[1:]:
        title = shlex.join(command)
        head = {"version": 2, "width": COLUMNS, "height": 30, "title": title}
        events = [(0.0, "o", f"{PROMPT}{title}\r\n"), *record(command)]
        CAST.write_text("".join(f"{json.dumps(line)}\n" for line in (head, *events)))
    title, events = kept()
    DRAWING.write_text(draw(events, title))
    PAGE.write_text(written(PAGE.read_text(), events))


if __name__ == "__main__":
    main()
