"""The product in a namespace: its commands, its log, its process."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .netns import Namespace, ended, pidfd, wait_until

PORT = 21443
PROGRAM = Path(sys.executable).parent / "acme-alpn-proxy"
DRAIN_SECONDS = 30.0
GUARD = "acme-alpn-proxy-guard"
NET_RAW = 1 << 13
"""CAP_NET_RAW in a set of capabilities."""
SWEEPER = "acme-alpn-proxy-sweeper"

AT_ONCE = ("--linger", "0")
"""For tests in which the linger does not matter."""

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
"""Words before a command that is to run as the user nobody."""
NOBODY_WHO_MAY_WRITE = (*NOBODY, "--inh-caps=+dac_override", "--ambient-caps=+dac_override")
"""The same, with the right to read and write any file, so that only other rights are missing."""


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
        self.wrapper: tuple[str, ...] = ()
        """Words that come before the program's name: a command that runs the program."""
        self.pid = 0
        """The process of the last start that succeeded."""

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the console script to its end."""
        command: list[str | Path] = [*self.wrapper, self.program, *words]
        return self.namespace.run(*command, check=check, env=self.env)

    def start_words(self, *options: str) -> list[str]:
        """The words after the program's name that start the proxy."""
        return [*options, "--logfile", str(self.log_file), "start"]

    def start_line(self, *options: str) -> str:
        """The command line that starts the proxy, for a shell."""
        return shlex.join([str(self.program), *self.start_words(*options)])

    def start(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run C{start}; it has returned when visitors are steered."""
        done = self.run(*self.start_words(*options), check=check)
        if done.returncode == 0:
            self.pid = int(self.pid_file.read_text())
        return done

    def stop(self, *, wait: bool = False) -> None:
        """Run C{stop}, with C{--wait} if the process is to have ended, too."""
        self.run("stop", *(["--wait"] if wait else []))

    def stop_and_start(self, *options: str) -> None:
        """C{stop; start} as one line of a shell."""
        line = f"{self.program} stop; {self.start_line(*options)}"
        self.namespace.run("sh", "-c", line, env=self.env)
        self.pid = int(self.pid_file.read_text())

    @property
    def log(self) -> str:
        """What the proxy has logged."""
        return self.log_file.read_text() if self.log_file.exists() else ""

    def kill(self) -> None:
        """SIGKILL the process."""
        kill(self.pid)

    @property
    def guard(self) -> int:
        """The PID of the guard, the process that removes the rules if the proxy dies."""
        pids = [pid for pid in self.namespace.pids() if _argument(pid, 5) == GUARD]
        (guard,) = [pid for pid in pids if _leads_its_session(pid)]  # not what it forks meanwhile
        return guard

    @property
    def sweeper(self) -> int:
        """The PID of the sweeper, the process that removes the routing rule if the proxy dies."""
        (sweeper,) = [pid for pid in self.namespace.pids() if _argument(pid, 5) == SWEEPER]
        return sweeper

    def kill_with_guard(self) -> None:
        """Kill the guard and then the proxy, so that no process removes the rules."""
        kill(self.guard)
        self.kill()


def _leads_its_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:  # it has ended
        return False


def _argument(pid: int, number: int) -> str:
    """A word of the command line of a process; empty if there is none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except FileNotFoundError:  # it has ended
        return ""
    return words[number] if len(words) > number else ""


def way_back(namespace: Namespace) -> list[str]:
    """What exists of a way back: devices, their routes in any table, and routing rules."""
    found = [
        *namespace.ip("-o link show").splitlines(),
        *namespace.ip("-4 route show table all").splitlines(),
        *namespace.ip("-6 route show table all").splitlines(),
        *namespace.ip("rule show").splitlines(),
        *namespace.ip("-6 rule show").splitlines(),
    ]
    return [line for line in found if "acme-alpn" in line or "iif lo ipproto tcp sport" in line]


def no_way_back_is_left(namespace: Namespace) -> None:
    """Assert that within a second nothing is left of the way back."""
    wait_until(lambda: way_back(namespace) == [], "the way back is gone", 1)


def kill(pid: int) -> None:
    """SIGKILL a process of ours, and wait for its end."""
    with pidfd(pid) as descriptor:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        assert ended(descriptor, 5)


def is_powerless(status: str, kept: int = 0) -> bool:
    """Whether a process has only the capabilities C{kept}, a bit each, and can get no other
    (/proc/PID/status, proc(5))."""
    sets = dict(re.findall(r"^(Cap\w+):\t(\w+)$", status, re.MULTILINE))
    assert len(sets) == 5
    expected = {"CapInh": 0, "CapPrm": kept, "CapEff": kept, "CapBnd": 0, "CapAmb": 0}
    found = {name: int(value, 16) for name, value in sets.items()}
    return "\nNoNewPrivs:\t1\n" in status and found == expected


def ends(pid: int, seconds: float = DRAIN_SECONDS) -> bool:
    """Whether the process has ended, or does so in time."""
    try:
        with pidfd(pid) as descriptor:
            return ended(descriptor, seconds)
    except ProcessLookupError:
        return True
