"""Fake commands that come before the real ones in PATH."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class FakeIptables:
    """Stands before the real commands on PATH and counts their calls.

    @ivar failing: at which call it fails, as iptables does; 0 is never.
    """

    def __init__(self, directory: Path, names: tuple[str, ...] = ("iptables", "ip6tables")) -> None:
        self.directory = directory
        self._count = directory / "count"
        self._failing = directory / "failing"
        directory.mkdir()
        self.reset(failing=0)
        for name in names:
            real = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
            script = directory / name
            script.write_text(
                f"#!/bin/sh\n"
                f"called=$(($(cat {self._count}) + 1))\n"
                f"echo $called >{self._count}\n"
                f"[ $called != $(cat {self._failing}) ] || . {directory}/instead\n"
                f'exec {real} "$@"\n'
            )
            script.chmod(0o755)
        self.instead("echo 'iptables: Resource temporarily unavailable.' >&2; exit 4")

    @property
    def path(self) -> str:
        """The PATH with it."""
        return f"{self.directory}:{os.environ['PATH']}"

    @property
    def calls(self) -> int:
        """How many there were since the last reset."""
        return int(self._count.read_text() or 0)  # empty while it is written

    def reset(self, *, failing: int) -> None:
        """Count anew."""
        self._count.write_text("0\n")
        self._failing.write_text(f"{failing}\n")

    def instead(self, line: str) -> None:
        """Let the failing call run a line of sh, and then, if the line does not exit, the real
        command."""
        (self.directory / "instead").write_text(f"{line}\n")
