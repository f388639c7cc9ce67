"""The real ufw and firewalld, unpacked below .cache/, at work in a namespace of the tests'."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .netns import CommandFailed, Namespace, terminate, wait_until

_UNPACKED = Path(__file__).resolve().parents[2] / ".cache" / "firewalls"
_MODULES = "usr/lib/python3/dist-packages"
_PYTHON = "/usr/bin/python3"  # Debian's, for which the modules are

_BUS = """\
<busconfig>
  <listen>unix:path={directory}/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
</busconfig>
"""


class NoFirewalls(RuntimeError):
    """The packages are not unpacked."""


def _copy(directory: Path) -> Path:
    """A copy of the packages that may be written to."""
    if not _UNPACKED.exists():
        raise NoFirewalls("ufw and firewalld are missing: run tests/install-debian-packages")
    return Path(shutil.copytree(_UNPACKED, directory / "firewalls", symlinks=True))


class Ufw:
    """ufw, not enabled yet."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        self._namespace = namespace
        self._root = _copy(directory)
        for rules in (self._root / "usr/share/ufw").iterdir():  # as its installation does
            if rules.suffix in (".rules", ".init", ".conf"):
                shutil.copy(rules, self._root / "etc/ufw")
        # With --rootdir it looks for ufw-init in /lib, which is /usr/lib on an installed Debian;
        # Debian 13 has moved it in the package, too.
        if not (self._root / "lib").exists():
            (self._root / "lib").symlink_to("usr/lib")

    def run(self, *arguments: str) -> None:
        """Run a command of ufw's."""
        program = self._root / "usr/sbin/ufw"
        folders = (f"--rootdir={self._root}", f"--datadir={self._root}")
        env = {"PYTHONPATH": str(self._root / _MODULES)}
        self._namespace.run(_PYTHON, program, *folders, *arguments, env=env)


class Firewalld:
    """A running firewalld."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        self._namespace = namespace
        self._directory = directory
        self._root = _copy(directory)
        self._env = {
            "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={directory}/bus",
            "PYTHONPATH": str(self._root / _MODULES),
        }

    def run(self, *arguments: str) -> None:
        """Run C{firewall-cmd}."""
        program = self._root / "usr/bin/firewall-cmd"
        self._namespace.run(_PYTHON, program, *arguments, env=self._env)

    @contextmanager
    def running(self) -> Iterator[None]:
        """firewalld on a separate bus; its rules stay until the namespace is gone."""
        configuration = self._directory / "bus.conf"
        configuration.write_text(_BUS.format(directory=self._directory))
        log = self._directory / "firewalld.log"
        bus = self._namespace.popen(
            "dbus-daemon", "--nofork", f"--config-file={configuration}", log=log
        )
        daemon: subprocess.Popen[str] | None = None
        try:
            wait_until((self._directory / "bus").exists, "the bus is there")
            daemon = self._namespace.popen(
                *(_PYTHON, self._root / "usr/sbin/firewalld", "--nofork", "--nopid"),
                *("--system-config", self._root / "etc/firewalld"),
                *("--default-config", self._root / "usr/lib/firewalld"),
                *("--log-target", "console"),
                log=log,
                env=self._env,
            )
            wait_until(self._answers, "firewalld runs", seconds=30)
            yield
        finally:
            for process in (daemon, bus):
                if process is not None:
                    terminate(process)

    def _answers(self) -> bool:
        try:
            self.run("--state")
        except CommandFailed:
            return False
        return True
