"""A host for the commands of a document: with folders of its own, and clients of the test CA."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..documents import ROOT
from .acme import Issued, Pebble, issued
from .netns import Namespace
from .proxy import PROGRAM
from .website import NAME

_TERMINAL = {"COLUMNS": "80", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
"""Variables of the shell's environment, the same wherever the tests run."""


@dataclass(frozen=True)
class Order:
    """A block that orders a certificate.

    @ivar certificate: the file that it is in afterwards; like C{account}, a pattern of sh.
    @ivar account: the file with the key of the ACME account.
    @ivar after: the block after which this one is run, for the same account.
    @ivar validations: the number of validations, with those of the block C{after}.
    @ivar names: the names in the certificate.
    @ivar reloads: the number of times that the web server loads a new certificate.
    """

    certificate: str
    account: str
    after: str = ""
    validations: int = 1
    names: tuple[str, ...] = (NAME,)
    reloads: int = 0


class Host:
    """A host as a reader of the documents has it, with a private F{/etc}, F{/var} and so on.

    These are gone after the last process, so the host of the tests does not change. The commands
    are the real clients, which ask the test CA instead of Let's Encrypt.
    """

    _SHELL = ("unshare", "--mount", "--propagation", "private", "sh")
    _PRIVATE = """
mount -t tmpfs tmpfs "$SCRATCH"
for folder in etc root usr/local var; do
    mkdir -p "$SCRATCH/$folder/upper" "$SCRATCH/$folder/work"
    mount -t overlay overlay "/$folder" \\
        -o "lowerdir=/$folder,upperdir=$SCRATCH/$folder/upper,workdir=$SCRATCH/$folder/work"
done
mount -t tmpfs tmpfs /run
cp "$AUTHORITY" /etc/ssl/certs/ca-certificates.crt
echo "CA=$CA KEYSIZE=2048" >/etc/dehydrated/conf.d/ca.sh
mkdir -p /etc/letsencrypt /etc/cron.d
printf 'server = %s\nforce-renewal\nno-random-sleep-on-renew\n' "$CA" >/etc/letsencrypt/cli.ini
cd "$WORK"
"""

    def __init__(self, namespace: Namespace, ca: Pebble, directory: Path) -> None:
        self._namespace = namespace
        self._ca = ca
        self._certificate = directory / "certificate.pem"
        self._account = directory / "account.pem"
        self._log = directory / "proxy.log"
        programs = directory / "programs"
        for folder in (programs, directory / "scratch", directory / "work"):
            folder.mkdir(parents=True)
        (directory / "work" / "examples").symlink_to(ROOT / "examples")
        for name, option in (("lego", "--server"), ("uacme", "-a")):
            command = programs / name
            command.write_text(f'#!/bin/sh\nexec {shutil.which(name)} {option} "$CA" "$@"\n')
            command.chmod(0o755)
        self._reloads = directory / "reloads"
        systemctl = programs / "systemctl"
        systemctl.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{self._reloads}\n')
        systemctl.chmod(0o755)
        for name in (PROGRAM.name, f"{PROGRAM.name}-hook", "certbot"):
            (programs / name).symlink_to(PROGRAM.with_name(name))
        self._env = {
            "AUTHORITY": str(ca.authority.certificate),
            "CA": ca.directory_url,
            "REQUESTS_CA_BUNDLE": str(ca.authority.certificate),
            "PATH": f"{programs}:{os.environ['PATH']}:/usr/sbin",
            "SCRATCH": str(directory / "scratch"),
            "WORK": str(directory / "work"),
        }

    def shell(self) -> subprocess.Popen[str]:
        """A shell that reads commands from a pipe, where nothing was ordered before."""
        process = subprocess.Popen(
            self._namespace.argv(*self._SHELL),
            env={**os.environ, **self._env, **_TERMINAL},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(f"{self._PRIVATE}rm -rf /etc/lego /var/log/acme-alpn-proxy.log*\n")
        return process

    def order(self, script: str, order: Order) -> Issued:
        """Run a script, every line of which has to succeed, and return what it has got."""
        keep = (
            f"cp {order.certificate} {self._certificate}\n"
            f"cp {order.account} {self._account}\n"
            f"cp /var/log/acme-alpn-proxy.log {self._log}\n"
        )
        self._namespace.run(*self._SHELL, "-euc", self._PRIVATE + script + keep, env=self._env)
        return issued(self._namespace, self._ca, self._certificate, self._account)

    @property
    def reloads(self) -> list[str]:
        """The arguments of each call of systemctl, which does nothing here."""
        return self._reloads.read_text().splitlines() if self._reloads.exists() else []

    @property
    def routed(self) -> list[str]:
        """What the proxy has logged of validations."""
        return [line for line in self._log.read_text().splitlines() if "to acme target" in line]
