"""The product in a namespace: its commands, its log, its process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .netns import Namespace, ended, pidfd

PORT = 21443
PROGRAM = Path(sys.executable).parent / "acme-alpn-proxy"
DRAIN_SECONDS = 30.0


class Proxy:
    """The console script, run in a namespace with PID file and log in a directory of the test's."""

    def __init__(
        self, namespace: Namespace, directory: Path, env: Mapping[str, str] | None = None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.namespace = namespace
        self.program = PROGRAM
        self.pid_file = directory / "proxy.pid"
        self.log_file = directory / "proxy.log"
        self.env = {"ACME_ALPN_PROXY_PIDFILE": str(self.pid_file), **(env or {})}
        self.pid = 0
        """The process of the last start that succeeded."""

    def start(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run C{start}; it has returned when visitors are steered."""
        done = self._run(*options, "--logfile", str(self.log_file), "start", check=check)
        if done.returncode == 0:
            self.pid = int(self.pid_file.read_text())
        return done

    def stop(self, *, wait: bool = False) -> None:
        """Run C{stop}, with C{--wait} if the process is to have ended, too."""
        self._run("stop", *(["--wait"] if wait else []))

    def stop_and_start(self, *options: str) -> None:
        """C{stop; start} as one line of a shell."""
        arguments = " ".join([*options, "--logfile", str(self.log_file)])
        line = f"{self.program} stop; {self.program} {arguments} start"
        self.namespace.run("sh", "-c", line, env=self.env)
        self.pid = int(self.pid_file.read_text())

    @property
    def log(self) -> str:
        """What the proxy has logged."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def kill(self) -> None:
        """SIGKILL the process."""
        with pidfd(self.pid) as descriptor:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            assert ended(descriptor, 5)

    def _run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.namespace.run(self.program, *arguments, check=check, env=self.env)


def ends(pid: int, seconds: float = DRAIN_SECONDS) -> bool:
    """Whether the process has ended, or does so in time."""
    try:
        with pidfd(pid) as descriptor:
            return ended(descriptor, seconds)
    except ProcessLookupError:
        return True
