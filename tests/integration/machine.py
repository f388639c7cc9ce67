"""A throwaway machine: this host's files under an overlay, with a systemd of its own as PID 1.

What is installed or changed in there is in memory, and gone with it.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .netns import CommandFailed, Namespace, terminate, wait_until

_BOOT = r"""
base=$1
mount -t tmpfs machine "$base"
mkdir "$base/changes" "$base/work" "$base/root"
mount -t overlay -o "lowerdir=/,upperdir=$base/changes,workdir=$base/work" machine "$base/root"
cd "$base/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs run run
mount -t tmpfs dev dev
mkdir dev/net dev/shm dev/pts
while read -r name major minor; do mknod -m 666 "dev/$name" c "$major" "$minor"; done <<DEVICES
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
net/tun 10 200
ptmx 5 2
DEVICES
# None of the host's services, nor what sets the kernel up.
rm -rf etc/systemd/system/*.wants usr/lib/systemd/system/*.wants
mkdir etc/systemd/system/sysinit.target.wants
ln -s /usr/lib/systemd/system/systemd-journald.service etc/systemd/system/sysinit.target.wants
mount --bind "$base/changes" media
pivot_root . mnt
umount --lazy mnt
exec env -i container=docker PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --unit=basic.target --log-target=journal
"""

_serial = itertools.count(1)


@dataclass(frozen=True)
class Machine:
    """What runs in there has the network of a namespace of ours.

    @ivar init: the PID that its systemd has outside.
    """

    init: int

    def run(
        self, *command: str | Path, check: bool = True, stdin: Path = Path(os.devnull)
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in there to its end."""
        enter = ("nsenter", f"--target={self.init}", "--all", "--root", "--wd")
        path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
        with stdin.open("rb") as given:
            done = subprocess.run(
                [*enter, "env", "-i", path, "DEBIAN_FRONTEND=noninteractive", *map(str, command)],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
                check=False,
            )
        if check and done.returncode != 0:
            why = done.stdout
            if command[0] == "systemctl":
                why += self.run("journalctl", "--lines=20", "--output=cat").stdout
            raise CommandFailed(f"exit {done.returncode} of {command}:\n{why}")
        return done

    def copied(self, file: Path) -> str:
        """Copy a file of the host into the machine's /run, and return its path in the machine.

        What is mounted on the host, such as a tmpfs at /tmp, is not in the machine.
        """
        path = f"/run/{file.name}"
        self.run("sh", "-c", 'cat >"$1"', "sh", path, stdin=file)
        return path

    def write(self, path: str, text: str, mode: str = "644") -> None:
        """Write a file in the machine; make its folders if they are missing."""
        script = 'mkdir -p "${1%/*}"; printf %s "$2" >"$1"; chmod "$3" "$1"'
        self.run("sh", "-c", script, "sh", path, text, mode)

    def changed(self) -> set[str]:
        """Every file that is not the host's, except the records of dpkg and the like."""
        books = r"^(var/lib/(dpkg|systemd|apt)|var/cache|var/log/(dpkg.log|alternatives.log)|run)\b"
        # The boot script has bound the folder of the overlay's changes to this path.
        # In it, a character device stands for a file of the host's that was removed.
        types = ("-not", "-type", "d", "-not", "-type", "c")
        found = self.run("find", "/media", *types, "-printf", r"%P\n")
        return {path for path in found.stdout.splitlines() if not re.match(books, path)}


@contextmanager
def machine(namespace: Namespace, directory: Path) -> Iterator[Machine]:
    """A machine that has booted, on the network of C{namespace}, mounted at C{directory}."""
    group = _cgroups() / f"aap-{os.getpid()}-{next(_serial)}"
    group.mkdir()
    directory.mkdir()
    unshare = "unshare --mount --pid --uts --ipc --cgroup --fork --kill-child"
    script = f'echo $$ >"$1/cgroup.procs"; exec {unshare} sh -euc "$2" sh "$3"'
    # Not by ip netns exec, which hides the control groups.
    network = ("nsenter", f"--net=/run/netns/{namespace.name}")
    with directory.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [*network, "sh", "-euc", script, "sh", group, _BOOT, directory],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        wait_until(lambda: _init(process) is not None, "it boots")
        init = _init(process)
        assert init is not None
        booted = Machine(init)
        wait_until(lambda: _is_up(booted), f"it has booted, see {directory}.log", 30)
        yield booted
    finally:
        process.kill()
        terminate(process)
        wait_until(lambda: _removed(group), "its processes have ended")


def _is_up(booted: Machine) -> bool:
    return booted.run("systemctl", "is-active", "basic.target", check=False).returncode == 0


def _init(process: subprocess.Popen[str]) -> int | None:
    """Its PID 1, once that is systemd."""
    assert process.poll() is None, "it has not booted"
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
            return int(pid)
    return None


def _cgroups() -> Path:
    """Where this host has its control groups, version 2."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next(Path(where) for _, where, kind, *_ in mounts if kind == "cgroup2")


def _removed(group: Path) -> bool:
    try:
        for folder, *_ in os.walk(group, topdown=False):
            os.rmdir(folder)
    except OSError:
        return False
    return True
