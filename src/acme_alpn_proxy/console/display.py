"""An instance's answer, for people: a table, and the texts of C{run} and C{stop}."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Final, Literal

from ..monitoring.status import SILENT, Answer, FallbackStatus, InstanceStatus
from ..wording import counted
from .terminal import coloured

_REASONS: Final = {
    "no_acme_alpn": "TLS",
    "not_tls": "not TLS",
    "deadline": "without a complete ClientHello in time",
    "end_of_file": "closed before a complete ClientHello",
    "crowded": "with an incomplete ClientHello, because the proxy held too many",
}
"""For each reason why connections went to the fallback: the text after their count."""

_HEADS: Final = ("route", "target", "open", "all", "not reached", "received", "sent")
_BINARY: Final = ("KiB", "MiB", "GiB", "TiB")

_MOST_CALLERS: Final = 5
"""How many addresses are shown; a CA validates from about as many."""


def table(answers: Sequence[Answer], now: float) -> str:
    """All instances; several lines, each with its line end.

    @param now: in seconds since the epoch.
    """
    return "\n".join(_instance(answer, now) for answer in answers) or "no instance runs\n"


def _instance(answer: Answer, now: float) -> str:
    state = coloured(answer["state"], sys.stdout)
    if answer["state"] == SILENT:
        return f"PID {answer['pid']}  {state}: it runs but does not answer; see its log\n"
    lines = [
        f"PID {answer['pid']}  {state} for {duration(now - answer['since'])}, since"
        f" {_when(answer['since'])}, redirect {answer['redirect']}",
        *(f"  {line}" for line in _aligned(_rows(answer))),
    ]
    reasons = answer["routes"]["fallback"]["reasons"].items()
    taken = [f"{count} {_REASONS.get(reason, reason)}" for reason, count in reasons if count]
    if taken:
        lines.append(f"  sent to the web server: {', '.join(taken)}")
        lines.append(f"  source address at the web server: {_seen(answer['routes']['fallback'])}")
    if answer["undecided"]:
        lines.append(
            f"  {counted(answer['undecided'], 'connection')} without a complete ClientHello yet"
        )
    last = answer["last_validation"]
    lines.append(
        "  no validation yet"
        if last is None
        else f"  last validation: {_when(last['at'])} from {last['peer']} for"
        f" {_printable(last['server_name'])}: {last['result']}"
    )
    lines += [
        f"  pending: {_printable(each['identifier'])}, {duration(each['seconds_left'])} left,"
        f" validations answered: {each['answered']}, requested by {_printable(each['asked_by'])}"
        for each in answer["pending"]
    ]
    if len(answer["pending"]) < answer["pending_count"]:
        lines.append(f"  pending in all: {answer['pending_count']}")
    return "".join(f"{line}\n" for line in lines)


def _seen(fallback: FallbackStatus) -> str:
    """How often the web server saw a visitor's own address, and how often one of this host."""
    visitors, host = fallback["from_visitor_address"], fallback["from_host_address"]
    return f"the visitor's in {counted(visitors, 'connection')}, this host's in {host}"


def _rows(answer: InstanceStatus) -> Iterator[Sequence[str]]:
    yield _HEADS
    routes = answer["routes"]
    named = [(f"acme for {name}", route) for name, route in routes["acme_for"].items()]
    for name, route in (("acme", routes["acme"]), *named, ("fallback", routes["fallback"])):
        counts = (route["live"], route["total"], route["failures"])
        sizes = (route["bytes_from_visitors"], route["bytes_to_visitors"])
        yield (name, route["target"], *map(str, counts), *map(size, sizes))


def _aligned(rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """The rows as lines: the first two columns aligned left, numbers right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        cells = [f"{row[0]:<{widths[0]}}", f"{row[1]:<{widths[1]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join(cells)


def account(answer: InstanceStatus, now: float) -> list[str]:
    """What has arrived while it steered, in two lines.

    @param now: in seconds since the epoch.
    """
    fallback, total = answer["routes"]["fallback"], _of_validations(answer, "total")
    visitors = f"steered for {duration(now - answer['since'])}:"
    visitors += f" {counted(fallback['total'], 'visitor')}, "
    visitors += _failed(fallback["failures"], f"the web server ({fallback['target']})")
    if not total:
        none = "no validation arrived: the CA did not connect to port 443 of this host"
        return [visitors, f"{none}; see: acme-alpn-proxy explain NAME"]
    peers = [each["peer"].rpartition(":")[0].strip("[]") for each in answer["validations"]]
    callers = list(dict.fromkeys(peers))[:_MOST_CALLERS]
    asked = ", ".join(callers) + ", and others" * (len(set(peers)) > len(callers))
    validations = counted(total, "validation") + f" from {asked}" * bool(asked)
    failures = _of_validations(answer, "failures")
    return [visitors, f"{validations}, {_failed(failures, 'the ACME client')}"]


def _of_validations(answer: InstanceStatus, field: Literal["live", "total", "failures"]) -> int:
    """The sum of a number over the routes for validations, those for certain names included."""
    routes = answer["routes"]
    return sum(route[field] for route in (routes["acme"], *routes["acme_for"].values()))


def _failed(failures: int, target: str) -> str:
    return f"{failures} did not reach {target}" if failures else "no failure"


def draining(answer: InstanceStatus) -> str:
    """A text about an instance that was stopped earlier."""
    return (
        f"PID {answer['pid']} was stopped earlier and still has {_open(answer)} (see:"
        " acme-alpn-proxy status)"
    )


def _open(answer: InstanceStatus) -> str:
    live = _of_validations(answer, "live") + answer["routes"]["fallback"]["live"]
    live += answer["undecided"]
    return counted(live, "open connection")


def drain(answer: InstanceStatus | None, pid: int, now: float) -> str:
    """A text about what C{stop --wait} waits for.

    @param answer: L{None} if the instance does not answer.
    """
    if answer is None:
        return f"waiting for PID {pid}"
    text = f"waiting for {_open(answer)} of PID {pid}"
    try:
        patience = sum(float(answer["options"][name]) for name in ("--linger", "--drain-timeout"))
        left = duration(answer["since"] + patience - now)
    except (KeyError, OverflowError, ValueError):  # another release, or another program
        return text
    return f"{text}, reset in {left} at most"


def duration(seconds: float) -> str:
    """A duration as C{42 s}, C{5 min 3 s}, C{2 h 0 min} or C{3 d 4 h}."""
    whole = max(0, round(seconds))
    for unit, smaller, length, part in (("d", "h", 86_400, 3_600), ("h", "min", 3_600, 60)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def size(count: int) -> str:
    """A number of bytes as C{512 B}, C{1.5 KiB} and so on."""
    if count < 1_024:
        return f"{count} B"
    power = next((at for at in range(1, 4) if count < 1_000 * 1_024**at), 4)
    return f"{count / 1_024**power:.1f} {_BINARY[power - 1]}"


def _when(seconds: float) -> str:
    """Local time, with the name of its zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def _printable(text: str | None) -> str:
    """Escape control characters: a peer may have sent some to change the terminal."""
    return "no name" if text is None else ascii(text)[1:-1]
