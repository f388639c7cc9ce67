"""Tables of a run in Markdown: its figures, and its ratios to HAProxy beside their limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from .contenders import HAPROXY, OURS, SPLICING, STEERED, UNSEEN
from .measures import GROWTH, MANY

Run = dict[str, Any]
"""The JSON that a run has written: C{measures} has the measure, the contender, the name of the
figure and its values in all rounds."""


@dataclass(frozen=True)
class Figure:
    """One named figure of a measure, as a column of a table."""

    measure: str
    name: str
    title: str
    digits: int = 0

    def rounds(self, run: Run, contender: str) -> list[float]:
        """One value for each round; empty if the contender did not take part."""
        found: dict[str, list[float]] = run["measures"].get(self.measure, {}).get(contender, {})
        return found.get(self.name, [])

    def of(self, run: Run, contender: str) -> float | None:
        """The median over the rounds; L{None} if the contender did not take part."""
        rounds = self.rounds(run, contender)
        return median(rounds) if rounds else None


TCP = Figure("tcp", "cpu_us", "TCP, µs CPU")
TLS = Figure("tls", "cpu_us", "TLS, µs CPU")
LATENCY = Figure("latency", "p50_us", "p50, µs")
BYTES = {
    kind: Figure(kind, "s_per_gb", f"{streams} {direction}", 2)
    for kind, streams, direction in (
        ("down1", "1 stream", "down"),
        ("up1", "1 stream", "up"),
        ("down8", "8 streams", "down"),
        ("up8", "8 streams", "up"),
    )
}
IDLE = Figure("idle", "mib", "idle, MiB", 1)
IDLE_EACH = Figure("idle", "kib_each", "idle, KiB each", 2)
GROWN = {n: Figure("growth", f"cpu_us_{n}", f"{n:,} open, µs CPU") for n in GROWTH}
START = Figure("start", "seconds", "start, s", 2)

TABLES: tuple[tuple[str, tuple[Figure, ...]], ...] = (
    (
        "Connections: CPU of the proxy for each (lower is better), and how many a second",
        (
            TCP,
            Figure("tcp", "per_s", "TCP, 1/s"),
            Figure("tcp", "failed_percent", "TCP, failed %", 1),
            TLS,
            Figure("tls", "per_s", "TLS, 1/s"),
            Figure("tls", "failed_percent", "TLS, failed %", 1),
        ),
    ),
    (
        "Latency: from connect to the first byte (lower is better)",
        (LATENCY, Figure("latency", "p99_us", "p99, µs")),
    ),
    ("Bytes: seconds of CPU of the proxy for a GB (lower is better)", tuple(BYTES.values())),
    (
        "Bytes: GB a second (higher is better)",
        tuple(Figure(kind, "gb_per_s", each.title, 2) for kind, each in BYTES.items()),
    ),
    (
        f"Memory (PSS) with {MANY:,} connections (lower is better)",
        (
            Figure("idle", "base_mib", "no connection, MiB", 1),
            IDLE,
            IDLE_EACH,
            Figure("idle", "descriptors_each", "descriptors each", 1),
            Figure("silent", "mib", "silent, MiB", 1),
            Figure("silent", "kib_each", "silent, KiB each", 2),
        ),
    ),
    (
        "CPU of the proxy for a connection while others are open (lower is better)",
        tuple(GROWN.values()),
    ),
    ("acme-alpn-proxy start, until it steers (lower is better)", (START,)),
)


@dataclass(frozen=True)
class Target:
    """A figure of the proxy, or its ratio to another contender's, and the limit for it.

    A disturbance affects both figures of a round, so the ratio is computed within each round.
    """

    what: str
    most: float
    figure: Figure
    ratio_to: tuple[Figure, str] | None = None
    contender: str = OURS

    def rounds(self, run: Run) -> list[float]:
        """The measured values, one for each round; empty if the run did not measure this."""
        ours = self.figure.rounds(run, self.contender)
        if self.ratio_to is None or not ours:
            return ours
        other, contender = self.ratio_to
        theirs = other.rounds(run, contender)
        return [mine / his for mine, his in zip(ours, theirs, strict=True)] if theirs else []


def _bytes_targets() -> Iterable[Target]:
    for contender, most in ((HAPROXY, 0.5), (SPLICING, 1.1)):
        for figure in BYTES.values():
            what = f"CPU for 1 GB, {figure.title}, divided by that of {contender}"
            yield Target(what, most, figure, (figure, contender))


TARGETS = (
    Target("CPU for a TCP connection, divided by HAProxy's", 1.5, TCP, (TCP, HAPROXY)),
    Target("CPU for a TLS connection, divided by HAProxy's", 1.3, TLS, (TLS, HAPROXY)),
    Target(
        "CPU for a TCP connection, divided by that with --visitor-address off",
        1.1,
        TCP,
        (TCP, UNSEEN),
    ),
    Target(
        "CPU for a TLS connection, divided by that with --visitor-address off",
        1.1,
        TLS,
        (TLS, UNSEEN),
    ),
    *_bytes_targets(),
    Target("p50 latency, divided by HAProxy's", 1.25, LATENCY, (LATENCY, HAPROXY)),
    Target(f"KiB for each of {MANY:,} idle pairs", 2.5, IDLE_EACH),
    Target(f"MiB with {MANY:,} idle pairs", 52, IDLE),
    Target(
        f"CPU for a connection while {GROWTH[-1]:,} are open, divided by that for {GROWTH[0]}",
        1.1,
        GROWN[GROWTH[-1]],
        (GROWN[GROWTH[0]], OURS),
    ),
    Target("seconds until start steers", 0.5, START, contender=STEERED),
)


def figures(run: Run) -> str:
    """All figures: one table for each subject, with one line for each contender."""
    found = []
    for title, columns in TABLES:
        lines = []
        for contender in run["contenders"]:
            values = [column.of(run, contender) for column in columns]
            if any(value is not None for value in values):
                lines.append([contender, *map(_shown, columns, values)])
        if lines:
            heads = ["", *(column.title for column in columns)]
            found.append(f"**{title}**\n\n{_table(heads, lines)}")
    return "\n\n".join(found)


def targets(run: Run) -> str:
    """The limits for the proxy, its figures, and whether each limit is met."""
    lines = []
    for target in TARGETS:
        rounds = target.rounds(run)
        if rounds:
            value = median(rounds)
            met = "met" if value <= target.most else "**not met**"
            lines.append([target.what, f"{value:.2f}", f"{target.most:g}", met, _spread(rounds)])
    return _table(["", "is", "at most", "", "middle half of the rounds"], lines) if lines else ""


def _spread(rounds: Sequence[float]) -> str:
    """The range of the middle half of the values."""
    if len(rounds) < 4:
        return "-"
    low, _, high = quantiles(rounds, method="inclusive")
    return f"{low:.2f} to {high:.2f}"


def facts(run: Run) -> str:
    """The machine and the programs of the run."""
    return _table(["", ""], [[name, str(value)] for name, value in run["facts"].items()])


def _shown(figure: Figure, value: float | None) -> str:
    return "-" if value is None else f"{value:,.{figure.digits}f}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        first, *others = cells
        shown = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        return f"| {' | '.join(shown)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([row(heads), row(rule), *map(row, lines)])
