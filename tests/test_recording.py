"""The recorded demo in the documents."""

from __future__ import annotations

import re

from .documents import ROOT
from .integration.recording import DRAWING, LONGEST_PAUSE, PAGE, draw, kept, pieces, written

OUTPUT = [(0.5, "o", "one "), (0.75, "o", "two\r\n"), (60.0, "o", "three\r\n")]


def test_the_documents_show_the_recording() -> None:
    """The drawing and the text are those of the recording."""
    title, events = kept()
    assert DRAWING.read_text() == draw(events, title)
    assert PAGE.read_text() == written(PAGE.read_text(), events)


def test_the_recording_is_of_this_demo() -> None:
    """Each step of the demo is in the recording."""
    source = (ROOT / "tests" / "integration" / "demo.py").read_text()
    steps = re.findall(r'_step\("(.+)"\)', source)
    assert len(steps) >= 6
    assert [step for step in steps if step not in PAGE.read_text()] == []


def test_places_and_times() -> None:
    """Each piece has the place that the terminal gave it. A long pause is shortened; pauses before
    it are not."""
    pause = 0.75 + LONGEST_PAUSE
    assert pieces(OUTPUT) == [(0.5, 0, 0, "one "), (0.75, 0, 4, "two"), (pause, 1, 0, "three")]
