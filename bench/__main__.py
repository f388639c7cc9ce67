"""Runs the bench: the soak test, then every measurement on every contender, for many rounds.

It runs in network namespaces, which it makes and removes. Run it as root, in the checkout:
C{python -m bench}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from tests.integration.netns import CommandFailed, NotRoot, require_root
from tests.integration.website import NoWebServer

from .contenders import CONTENDERS, Contender
from .measures import FULL, MEASURES, QUICK, LoadFailed, Measure, Scale
from .plot import draw
from .report import Run, facts, figures, targets
from .soak import SIZE, SoakFailed, soak
from .stand import Stand, WrongRoute, build_load, cpus, on_cpus

RESULTS = Path(__file__).with_name("results")
DESCRIPTORS = 16_384
"""Enough descriptors for 5,000 pairs on each contender, and for its pipes."""


def main() -> int:
    """Run the measures that the options name; return 0 if all of them were taken."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go, too
    try:
        require_root()
        _raise_descriptors()
        build_load()
        with tempfile.TemporaryDirectory(prefix="acme-alpn-proxy-bench-") as directory:
            run = _bench(options, Path(directory))
    except SoakFailed as error:
        print(f"bench: the soak failed, nothing is measured: {error}", file=sys.stderr)
        return 1
    except (*(CommandFailed, LoadFailed, NoWebServer, NotRoot, OSError, WrongRoute),) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    RESULTS.mkdir(exist_ok=True)
    name = run["facts"]["time"].replace(":", "") if run["complete"] else "partial"
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{facts(run)}\n\n{figures(run)}\n\n**Must show**\n\n{targets(run)}\n")
    print(f"bench/results/{path.name}", end="")
    if run["complete"]:
        draw(run)
        print(", drawn in docs/performance.md", end="")
    print()
    return 0


def _options() -> argparse.Namespace:
    names = [measure.name for measure in MEASURES] + [each.name for each in CONTENDERS]
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, for a first look")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        choices=names,
        help=f"only this measure or contender; repeat for more: {', '.join(names)}",
    )
    return parser.parse_args()


def _raise_descriptors() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, max(most, DESCRIPTORS)))


def _bench(options: argparse.Namespace, directory: Path) -> Run:
    only = set(options.only)
    contenders = [each for each in CONTENDERS if each.name in only] or CONTENDERS
    measures = [each for each in MEASURES if each.name in only] or MEASURES
    scale = QUICK if options.quick else FULL
    began = time.monotonic()
    print(f"Soak: {SIZE // 1_000_000} MB each way, both ways at once, slow readers, all endings")
    soak(directory / "soak", SIZE)
    found: dict[str, dict[str, dict[str, list[float]]]] = {each.name: {} for each in measures}
    contender_cpus, other_cpus = cpus()
    with on_cpus(other_cpus):
        for tls in (False, True):
            some = [measure for measure in measures if measure.tls == tls]
            place = directory / ("tls" if tls else "plain")
            place.mkdir()
            with ExitStack() as stack:
                stands = [
                    stack.enter_context(
                        Stand.made(each, place / str(number), contender_cpus, tls=tls)
                    )
                    for number, each in enumerate(contenders)
                    if any(measure.takes_part(each) for measure in some)
                ]
                for measure in some:
                    _take(measure, stands, scale, found[measure.name])
    seconds = round(time.monotonic() - began)
    return {
        "complete": not options.quick and not only,
        "facts": _facts(contenders, scale, seconds),
        "contenders": [each.name for each in contenders],
        "measures": found,
    }


def _take(
    measure: Measure,
    stands: Sequence[Stand],
    scale: Scale,
    found: dict[str, dict[str, list[float]]],
) -> None:
    """Measure all contenders, for several rounds: in order, in reverse order, and so on."""
    stands = [stand for stand in stands if measure.takes_part(stand.contender)]
    print(f"{measure.name:<8}", end="", flush=True)
    began = time.monotonic()
    for number in range(min(scale.rounds, measure.rounds)):
        for stand in stands if number % 2 == 0 else reversed(stands):
            stand.quieten()
            for name, value in measure.take(stand, scale).items():
                found.setdefault(stand.contender.name, {}).setdefault(name, []).append(value)
            print(".", end="", flush=True)
    print(f" {time.monotonic() - began:.0f} s")


def _facts(contenders: Sequence[Contender], scale: Scale, seconds: int) -> dict[str, str | int]:
    processor = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=RESULTS.parent,
    )
    return {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": described.stdout.strip() or "unknown",
        "kernel": platform.release(),
        "processor": processor,
        "processors": os.cpu_count() or 1,
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
        **{each.name: each.version() for each in contenders if each.version()},
        "rounds at most": scale.rounds,
        "seconds taken": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
