"""The console script, run to its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NAME = "acme-alpn-proxy"


def run(*command: str | Path) -> str:
    """Run a command that must succeed without output on stderr; returns its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def program(*words: str) -> str:
    """The output of the console script."""
    return run(sys.executable, "-m", "acme_alpn_proxy", *words)
