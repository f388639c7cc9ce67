"""Draws a run: plots, and the figures in C{docs/performance.md}.

C{python -m bench.plot} draws the newest complete run in C{bench/results}.
"""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure as Drawing

from .contenders import OURS
from .measures import GROWTH, MANY
from .report import BYTES, GROWN, IDLE, LATENCY, TCP, TLS, Figure, Run, facts, figures, targets

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "performance.md"
BEGIN = "<!-- Figures: written by bench/plot.py -->"
END = "<!-- End of the figures -->"

_WIDTH = 4.8
"""Inches. On a phone the page shows a drawing at about three quarters of this size."""

_TEXT, _OURS_COLOUR, _OTHERS_COLOUR = "#010203", "#040506", "#7a8a96"
"""The page sets the first two, or F{_STYLE} if the drawing is shown alone."""

_IN_THE_FILE = {_TEXT: "currentColor", _OURS_COLOUR: "var(--accent)"}
_STYLE = """<style>
svg { color: #1f2328; --accent: #b93a08 }
@media (prefers-color-scheme: dark) { svg { color: #e6e6e6; --accent: #ff8f5f } }
</style>"""
_FONT = "system-ui, sans-serif"

_LINES = (("s", "-"), ("^", "--"), ("D", ":"))
"""Marker and dash of each other contender."""

_RC = {
    "svg.hashsalt": "acme-alpn-proxy",  # the same run gives the same file
    "svg.fonttype": "none",
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _TEXT),
    **dict.fromkeys(("xtick.color", "ytick.color"), _TEXT),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.titlelocation": "left",
    "savefig.transparent": True,
}

_PICTURES = {
    "connections": "CPU of the proxy for a connection, and latency",
    "bytes": "CPU of the proxy for a GB",
    "memory": f"Memory with {MANY:,} idle connections",
    "growth": "CPU of the proxy for a connection while others are open",
}


def draw(run: Run) -> None:
    """Write the plots below C{docs/} and the figures into the page, between L{BEGIN} and L{END}."""
    with rc_context(_RC):
        _bars(
            "connections",
            run,
            {"TCP: µs of CPU": TCP, "TLS: µs of CPU": TLS, "Latency, p50: µs": LATENCY},
        )
        _bars("bytes", run, {f"{each.title}: s of CPU per GB": each for each in BYTES.values()})
        _bars("memory", run, {f"MiB with {MANY:,} idle connections": IDLE})
        _growth(run)
    images = "\n\n".join(
        f"![{text}](performance-{name}.svg)\n\n*{text}. Lower is better.*"
        for name, text in _PICTURES.items()
    )
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    parts = [
        *(
            BEGIN,
            "## Limits that the bench checks",
            targets(run),
            "## Figures",
            images,
            figures(run),
        ),
        *("## Where", facts(run), END),
    ]
    PAGE.write_text(before + "\n\n".join(parts) + after)


def _bars(name: str, run: Run, panels: dict[str, Figure]) -> None:
    """One panel of bars for each figure, one below the other; the proxy's bars stand out."""
    found = {
        title: {
            each: value
            for each in reversed(run["contenders"])
            if (value := column.of(run, each)) is not None
        }
        for title, column in panels.items()
    }
    heights = [len(values) + 1.6 for values in found.values()]
    drawing = Drawing(figsize=(_WIDTH, 0.22 * sum(heights)), layout="constrained")
    axes = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flat
    for axis, (title, values) in zip(axes, found.items(), strict=True):
        colours = [_OURS_COLOUR if each.startswith(OURS) else _OTHERS_COLOUR for each in values]
        bars = axis.barh(list(values), list(values.values()), color=colours, height=0.7)
        axis.bar_label(bars, fmt=f"%.{panels[title].digits}f", padding=3)
        axis.margins(x=0.12)
        axis.set_title(title)
        axis.tick_params(length=0)
        axis.xaxis.set_visible(False)
        axis.spines["bottom"].set_visible(False)
    _save(drawing, name)


def _growth(run: Run) -> None:
    drawing = Drawing(figsize=(_WIDTH, 3), layout="constrained")
    axis = drawing.subplots()
    lines = iter(_LINES)
    for each in run["contenders"]:
        values = [GROWN[number].of(run, each) for number in GROWTH]
        if None not in values:
            colour = _OURS_COLOUR if each == OURS else _OTHERS_COLOUR
            marker, dash = ("o", "-") if each == OURS else next(lines)
            axis.plot(GROWTH, values, marker=marker, linestyle=dash, label=each, color=colour)
    axis.set_xscale("log")
    axis.set_xticks(GROWTH, [f"{number:,}" for number in GROWTH])
    axis.minorticks_off()
    axis.set_ylim(bottom=0, top=1.1 * axis.get_ylim()[1])
    axis.set_xlabel("open connections")
    axis.set_title("µs of CPU for one more connection")
    drawing.legend(loc="outside lower center", ncols=2)
    _save(drawing, "growth")


def _save(drawing: Drawing, name: str) -> None:
    """Write a drawing whose text takes the colour and the font of the page around it."""
    file = StringIO()
    drawing.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    for colour, shown in _IN_THE_FILE.items():
        text = text.replace(colour, shown)
    text = re.sub(r"(font: [\d.]+px )[^;\"]+", rf"\1{_FONT}", text)
    text = re.sub('<g id="[^"]+"', "<g", text)  # several drawings come into one page
    text = re.sub(r"(<svg [^>]+>)", rf"\1\n{_STYLE}", text, count=1)
    (DOCS / f"performance-{name}.svg").write_text(text)


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
