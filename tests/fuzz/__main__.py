"""Fuzzes all targets, or some, one after the other, for a number of seconds in all."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

from . import keep, kept, names, target

SECONDS_FOR_AN_INPUT = 10
LONGEST_KEPT = 3_000
"""The longest input to keep, in bytes; longer ones would be most of the corpus."""
MIB = 512
"""Memory of a target; one whose buffers grow is stopped there."""


def main() -> int:
    """Status 0: nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for all together (60)")
    parser.add_argument(
        "--keep", action="store_true", help="write the inputs that reach most to tests/fuzz/corpus"
    )
    parser.add_argument("--only", action="append", choices=names(), help="again for more")
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print(
            "fuzz: atheris is missing. It is there for CPython 3.11 to 3.13 on x86-64:"
            " pip install atheris",
            file=sys.stderr,
        )
        return 1
    chosen = options.only or names()
    seconds = max(1, options.seconds // len(chosen))
    return max([_fuzz(name, seconds, write=options.keep) for name in chosen])


def _fuzz(name: str, seconds: int, *, write: bool) -> int:
    """Fuzz a target; 1 if there is a finding, which is shown."""
    with tempfile.TemporaryDirectory(prefix="acme-alpn-proxy-fuzz-") as directory:
        inputs, least, finding = (Path(directory, each) for each in ("inputs", "least", "finding"))
        inputs.mkdir()
        least.mkdir()
        for data in [*target(name).SEEDS, *kept(name)]:
            (inputs / sha256(data).hexdigest()).write_bytes(data)
        options = [f"-max_total_time={seconds}", f"-exact_artifact_path={finding}"]
        status, output = _run(name, *options, "-print_final_stats=1", str(inputs))
        number = re.search(r"number_of_executed_units: (\d+)", output)
        print(f"fuzz: {name}: {number and number[1]} inputs in {seconds} s", flush=True)
        if status == 0 and write:
            status, output = _run(name, "-merge=1", str(least), str(inputs))
            found = {path.read_bytes() for path in least.iterdir()} - set(target(name).SEEDS)
            short = [data for data in found if len(data) <= LONGEST_KEPT]
            keep(name, [*kept(name), *short])  # a finding stays, even if it reaches nothing new
        if status != 0:
            print(output)
        if finding.exists():
            data = finding.read_bytes()
            print(f"fuzz: {name}: a finding; a line for its corpus:\n{data.hex()}", flush=True)
    return min(status, 1)


def _run(name: str, *options: str) -> tuple[int, str]:
    """Exit status and output of the target under atheris."""
    limits = [f"-timeout={SECONDS_FOR_AN_INPUT}", f"-rss_limit_mb={MIB}", "-verbosity=0"]
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.one", *limits, *options],
        env=os.environ | {"FUZZ_TARGET": name},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return abs(done.returncode), done.stdout


if __name__ == "__main__":
    sys.exit(main())
