"""How long visitors wait during each attack, and without it: C{python -m bench.attacks}, as root.

It makes network namespaces: a host with nginx, the proxy and an ACME client that accepts and
never answers, and visitors and attackers connected by a veth pair. Every attack is also measured
without the proxy, because it costs the web server and the machine something, too.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.integration.netns import Namespace, Street, require_root, street, terminate
from tests.integration.proxy import Proxy
from tests.integration.website import website

from .attackers import ATTACKS, METRICS_PORT

ACME_PORT = 31443
LIMIT = 3.0
"""How many times longer visitors may wait during the attack with tiny records than without it."""

_BUILD_UP = 2.0


@dataclass(frozen=True)
class Visits:
    """The visits of one period; milliseconds from connect(2) to the end of a page."""

    took: Sequence[float]
    failed: int

    @property
    def p50(self) -> float:
        """The median."""
        return median(self.took)

    @property
    def p99(self) -> float:
        """The time within which 99 of 100 visits ended."""
        return sorted(self.took)[len(self.took) * 99 // 100]


def main() -> int:
    """Measure, and print a table in Markdown; return 0 if tiny records are within the limit."""
    parser = argparse.ArgumentParser(prog="python -m bench.attacks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="for each figure (8)")
    parser.add_argument("--redirect", default="iptables", help="the way to steer (iptables)")
    parser.add_argument(
        "--only", action="append", choices=[*ATTACKS], help="only this attack; repeat for more"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    require_root()
    found: dict[str, dict[str, Visits]] = {}
    with tempfile.TemporaryDirectory(prefix="acme-alpn-proxy-attacks-") as directory:
        for name in options.only or ATTACKS:
            place = Path(directory, name)
            with street() as road, website(road.host.namespace, place):
                found[name] = _measure(road, place, name, options)
            if name != "idle_metrics":  # without the proxy, no metrics
                with street() as road, website(road.host.namespace, place / "again"):
                    alone = _without_proxy(road, place, name, options.seconds)
                    found[name]["direct, attacked"] = alone
            print(f"{name}: {found[name]['attacked'].failed} visits failed", file=sys.stderr)
    print(table(found))
    tiny = found.get("tiny_records")
    return int(tiny is not None and tiny["attacked"].p99 > LIMIT * tiny["calm"].p99)


def table(found: dict[str, dict[str, Visits]]) -> str:
    """One line for each attack."""
    lines = [
        "| attack | p50, ms | p99, ms | p99 without attack, ms | ratio | failed |"
        " no proxy: p99, ms | no proxy: p99 without attack, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, each in found.items():
        attacked, calm, direct = each["attacked"], each["calm"], each["direct"]
        alone = each.get("direct, attacked")
        lines.append(
            f"| {name.replace('_', ' ')} | {attacked.p50:.1f} | {attacked.p99:.1f} |"
            f" {calm.p99:.1f} | {attacked.p99 / calm.p99:.1f} |"
            f" {attacked.failed} of {len(attacked.took)} |"
            f" {f'{alone.p99:.1f}' if alone else '-'} | {direct.p99:.1f} |"
        )
    return "\n".join(lines)


def _measure(
    road: Street, place: Path, name: str, options: argparse.Namespace
) -> dict[str, Visits]:
    """Measure without the attack first: after it, the web server may be busy for a long time."""
    host = road.host.namespace
    found = {"direct": _visits(road, options.seconds)}
    proxy = Proxy(host, place / "proxy")
    words = [f"--redirect={options.redirect}", "--linger=0", "--drain-timeout=2"]
    with host.listen("127.0.0.1", ACME_PORT) as responder:
        responder.listen(4_096)
        proxy.start(*words, f"--alpn=127.0.0.1:{ACME_PORT}", f"--metrics={METRICS_PORT}")
        try:
            found["calm"] = _visits(road, options.seconds)
            with _attack(road, place, name):
                found["attacked"] = _visits(road, options.seconds)
        finally:
            proxy.stop(wait=True)
    return found


def _without_proxy(road: Street, place: Path, name: str, seconds: float) -> Visits:
    with _attack(road, place, name):
        return _visits(road, seconds)


@contextmanager
def _attack(road: Street, place: Path, name: str) -> Iterator[None]:
    """The attack runs during the block; it has begun some seconds before."""
    where: Namespace = (road.host if name == "idle_metrics" else road.visitor).namespace
    process = where.popen(*_program(name, road), log=place / "attack.log")
    try:
        time.sleep(_BUILD_UP)
        yield
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended: {(place / 'attack.log').read_text()}")
    finally:
        terminate(process)


def _visits(road: Street, seconds: float) -> Visits:
    words = road.visitor.namespace.argv(*_program("visits", road), str(seconds))
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout)
    return Visits([1_000 * each for each in told["took"]], len(told["failures"]))


def _program(name: str, road: Street) -> list[str]:
    return [sys.executable, "-m", "bench.attackers", name, road.host.ipv4]


if __name__ == "__main__":
    sys.exit(main())
