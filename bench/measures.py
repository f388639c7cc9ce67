"""What is measured: each measure is one function from a stand to a few named numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean

from .contenders import Contender, OursSteered, OursUnseen
from .stand import Stand

AT_ONCE = 16
MANY = 5_000
GROWTH = (10, 1_000, MANY)


@dataclass(frozen=True)
class Scale:
    """How much of each load to make."""

    rounds: int
    seconds: float
    mib: int


FULL = Scale(rounds=21, seconds=0.3, mib=512)
QUICK = Scale(rounds=1, seconds=0.5, mib=256)


class LoadFailed(Exception):
    """A load failed, so there is nothing to measure."""


def connections(stand: Stand, scale: Scale) -> dict[str, float]:
    """CPU for a connection that carries a hello and one byte back, and how many a second."""
    before = stand.cpu_seconds()
    told = stand.load("connect", AT_ONCE, scale.seconds)
    spent = stand.cpu_seconds() - before
    return _for_each(stand, spent, told["connections"], told["seconds"], told["failed"])


def handshakes(stand: Stand, scale: Scale) -> dict[str, float]:
    """CPU for a connection that carries a TLS handshake and a small page, and how many a second."""
    address, port = stand.address
    seconds = max(1, round(scale.seconds))  # wrk accepts only whole seconds
    before = stand.cpu_seconds()
    said = stand.visitor.namespace.run(
        *["wrk", "--threads", "1", "--connections", str(AT_ONCE), "--duration", f"{seconds}s"],
        *["--header", "Connection: close", f"https://{address}:{port}/"],
    ).stdout
    spent = stand.cpu_seconds() - before
    told = re.search(r"(\d+) requests in ([\d.]+)s", said)
    if told is None or "Non-2xx" in said:
        raise LoadFailed(f"{stand.contender.name}: {said}")
    errors = re.search(
        r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said
    )
    failed = sum(map(int, errors.groups())) if errors else 0
    return _for_each(stand, spent, int(told[1]), float(told[2]), failed)


def latency(stand: Stand, scale: Scale) -> dict[str, float]:
    """From connect(2) to the first byte, one connection at a time."""
    told = stand.load("latency", scale.seconds)
    _check(stand, told["failed"])
    return {"p50_us": told["p50_us"], "p99_us": told["p99_us"]}


def transfer(direction: str, streams: int) -> Callable[[Stand, Scale], dict[str, float]]:
    """CPU for a gigabyte, and gigabytes a second."""

    def measure(stand: Stand, scale: Scale) -> dict[str, float]:
        before = stand.cpu_seconds()
        told = stand.load("bytes", direction, streams, scale.mib)
        _check(stand, told["failed"])
        spent = stand.cpu_seconds() - before
        gigabytes = told["bytes"] / 1e9
        found = {"gb_per_s": gigabytes / told["seconds"]}
        return found | {"s_per_gb": spent / gigabytes} if stand.is_proxy else found

    return measure


def memory(*, silent: bool) -> Callable[[Stand, Scale], dict[str, float]]:
    """Memory of a fresh contender with many connections: established and idle, or silent."""

    def measure(stand: Stand, scale: Scale) -> dict[str, float]:
        stand.restart()
        base, descriptors = stand.memory_mib(), stand.descriptors()
        with stand.holding(MANY, silent=silent):
            held = stand.memory_mib()
            return {
                "base_mib": base,
                "mib": held,
                "kib_each": (held - base) * 1024 / MANY,
                "descriptors_each": (stand.descriptors() - descriptors) / MANY,
            }

    return measure


def growth(stand: Stand, scale: Scale) -> dict[str, float]:
    """CPU for a connection while few or many other connections are open and idle.

    The case with the fewest open connections is measured twice, before and after the others, so
    that a slow change of the machine does not look like an effect of the open connections.
    """
    longer = replace(scale, seconds=3 * scale.seconds)  # they take long to open
    found: dict[str, list[float]] = {}
    for number in (*GROWTH, GROWTH[0]):
        with stand.holding(number):
            spent = connections(stand, longer)["cpu_us"]
            found.setdefault(f"cpu_us_{number}", []).append(spent)
    return {name: mean(spent) for name, spent in found.items()}


def start(stand: Stand, scale: Scale) -> dict[str, float]:
    """How long C{acme-alpn-proxy start} takes until it steers."""
    return {"seconds": stand.restart()}


@dataclass(frozen=True)
class Measure:
    """A measure, the contenders that take part, and the most rounds."""

    name: str
    take: Callable[[Stand, Scale], dict[str, float]]
    takes_part: Callable[[Contender], bool]
    tls: bool = False
    rounds: int = 5


def _everybody(contender: Contender) -> bool:
    return True


def _dialled(contender: Contender) -> bool:
    return not isinstance(contender, OursSteered | OursUnseen)


def _can_hold_many(contender: Contender) -> bool:
    return _dialled(contender) and contender.most_open >= MANY


def _steers(contender: Contender) -> bool:
    return isinstance(contender, OursSteered)


MEASURES = (
    Measure("idle", memory(silent=False), _can_hold_many, rounds=1),
    Measure("silent", memory(silent=True), _can_hold_many, rounds=1),
    Measure("start", start, _steers, rounds=11),
    Measure("tcp", connections, _everybody, rounds=21),
    Measure("latency", latency, _everybody, rounds=21),
    Measure("down1", transfer("down", 1), _dialled),
    Measure("up1", transfer("up", 1), _dialled),
    Measure("down8", transfer("down", 8), _dialled),
    Measure("up8", transfer("up", 8), _dialled),
    Measure("growth", growth, _can_hold_many),
    Measure("tls", handshakes, _everybody, tls=True, rounds=21),
)


def _for_each(
    stand: Stand, spent: float, number: int, seconds: float, failed: int
) -> dict[str, float]:
    # The tables show a few failures of another contender. The proxy may have none.
    _check(stand, failed if stand.contender.ours else max(0, failed - number // 10))
    found = {"per_s": number / seconds, "failed_percent": 100 * failed / number}
    return found | {"cpu_us": spent / number * 1e6} if stand.is_proxy else found


def _check(stand: Stand, failed: int) -> None:
    if failed:
        raise LoadFailed(f"{stand.contender.name}: {failed} connections failed")
