"""The packages, made once for all tests, and a machine with the Debian package on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .machine import Machine

ROOT = Path(__file__).parent.parent.parent
CERTBOT = ROOT / ".cache" / "certbot"


def make_packages(directory: Path) -> Path:
    """Run C{make pyz deb} with separate folders, and return the folder with the packages."""
    folders = (f"VENV={directory / 'venv'}", f"DIST={directory / 'dist'}")
    command = ("make", *folders, f"PYTHON={sys.executable}", "pyz", "deb")
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return directory / "dist"


def install_certbot(booted: Machine) -> None:
    """Debian's certbot, as far as the host does not have it."""
    debs = sorted(CERTBOT.glob("*.deb"))
    if debs:
        booted.run("dpkg", "--install", *map(booted.copied, debs))


def install(booted: Machine, dist: Path) -> None:
    """The Debian package; the host has what it depends on."""
    (deb,) = dist.glob("*.deb")
    booted.run("dpkg", "--install", booted.copied(deb))
