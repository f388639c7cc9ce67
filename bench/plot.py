"""Draws a run: plots, and the figures in C{docs/performance.md}.

By itself it draws the newest complete run that is kept: C{python -m bench.plot}.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure as Drawing

from .contenders import OURS
from .measures import GROWTH, MANY
from .report import BYTES, GROWN, IDLE, LATENCY, TCP, TLS, Figure, Run, facts, figures, targets

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "performance.md"
BEGIN = "<!-- Figures: written by bench/plot.py -->"

_OURS_COLOUR, _OTHERS_COLOUR = "#c1440e", "#8899a6"


def draw(run: Run) -> None:
    """Write the plots below C{docs/} and the figures at the end of the page."""
    rcParams["svg.hashsalt"] = "acme-alpn-proxy"  # the same run gives the same file
    _bars("connections", run, {"µs of CPU, TCP": TCP, "µs of CPU, TLS": TLS, "µs, p50": LATENCY})
    _bars("bytes", run, {f"s of CPU per GB, {each.title}": each for each in BYTES.values()})
    _bars("memory", run, {f"MiB, {MANY:,} idle pairs": IDLE})
    _growth(run)
    pictures = {
        "connections": "CPU of the proxy for a connection, and latency",
        "bytes": "CPU of the proxy for a GB",
        "memory": f"Memory with {MANY:,} idle pairs",
        "growth": "CPU of the proxy for a connection beside open ones",
    }
    images = "\n\n".join(f"![{text}](performance-{name}.svg)" for name, text in pictures.items())
    parts = [
        *(BEGIN, "## What must be shown", targets(run), "## Figures", images, figures(run)),
        *("## Where", facts(run)),
    ]
    head = PAGE.read_text().partition(BEGIN)[0]
    PAGE.write_text(head + "\n\n".join(parts) + "\n")


def _bars(name: str, run: Run, panels: dict[str, Figure]) -> None:
    """One panel of horizontal bars a figure; the proxy's stand out."""
    drawing = Drawing(figsize=(3.4 * len(panels), 2.8), layout="constrained")
    axes = drawing.subplots(1, len(panels), squeeze=False).flat
    for axis, (title, column) in zip(axes, panels.items(), strict=True):
        values = {
            each: value
            for each in reversed(run["contenders"])
            if (value := column.of(run, each)) is not None
        }
        colours = [_OURS_COLOUR if each.startswith(OURS) else _OTHERS_COLOUR for each in values]
        bars = axis.barh(list(values), list(values.values()), color=colours)
        axis.bar_label(bars, fmt=f"%.{column.digits}f", padding=2, fontsize=8)
        axis.margins(x=0.18)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    _save(drawing, name)


def _growth(run: Run) -> None:
    drawing = Drawing(figsize=(5, 3), layout="constrained")
    axis = drawing.subplots()
    for each in run["contenders"]:
        values = [GROWN[number].of(run, each) for number in GROWTH]
        if None not in values:
            colour = _OURS_COLOUR if each == OURS else None
            axis.plot(GROWTH, values, marker="o", label=each, color=colour)
    axis.set_xscale("log")
    axis.set_xticks(GROWTH, [f"{number:,}" for number in GROWTH])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("open connections", fontsize=9)
    axis.set_ylabel("µs of CPU for one more", fontsize=9)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    _save(drawing, "growth")


def _save(drawing: Drawing, name: str) -> None:
    drawing.savefig(DOCS / f"performance-{name}.svg", metadata={"Date": None})


def main() -> None:
    """Draw the newest complete run."""
    paths = sorted(Path(__file__).with_name("results").glob("*.json"), reverse=True)
    runs = (json.loads(path.read_text()) for path in paths)
    run = next((each for each in runs if each["complete"]), None)
    if run is None:
        raise SystemExit("there is no complete run in bench/results: make bench")
    draw(run)


if __name__ == "__main__":
    main()
