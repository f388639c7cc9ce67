"""The commands of README.md and docs/clients.md, run as they stand, each with the real client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from acme_alpn_proxy.options import ConsoleOptions

from ..documents import ROOT, shell_blocks
from .acme import Issued, Pebble, issued, pebble
from .netns import COMMAND_SECONDS, Namespace, Street, wait_until
from .proxy import PROGRAM
from .visitors import Visitors, visitors
from .website import NAME, Website

DOCUMENTS = ("README.md", "docs/clients.md")
BLOCKS = {name: text for document in DOCUMENTS for name, text in shell_blocks(document).items()}


@dataclass(frozen=True)
class Order:
    """A block by which a certificate is ordered.

    @ivar certificate: where it is afterwards; like C{account} a pattern of sh.
    @ivar account: where the key of the ACME account is.
    @ivar after: a block that has to be run before.
    @ivar orders: how many there were, that one included.
    """

    certificate: str
    account: str
    after: str = ""
    orders: int = 1


def _lego(folder: str) -> tuple[str, str]:
    return f"{folder}/certificates/{NAME}.crt", f"{folder}/accounts/*/*/keys/*.key"


ORDERS = {
    "README.md: Use it": Order(*_lego(".lego")),
    "docs/clients.md: One command": Order(*_lego("/etc/lego")),
    "docs/clients.md: lego": Order(*_lego("/etc/lego")),
    "docs/clients.md: lego, renewal": Order(
        *_lego("/etc/lego"), after="docs/clients.md: lego", orders=2
    ),
    "docs/clients.md: uacme": Order(
        f"/etc/ssl/uacme/{NAME}/cert.pem", "/etc/ssl/uacme/private/key.pem"
    ),
    "docs/clients.md: dehydrated": Order(
        f"/var/lib/dehydrated/certs/{NAME}/cert.pem",
        "/var/lib/dehydrated/accounts/*/account_key.pem",
    ),
}

HOOKS = "docs/clients.md: Any client with hooks"
MAKE = "README.md: acme-alpn-proxy"

NOT_RUN = {
    "README.md: Use it (2)": "a synopsis",
    "docs/clients.md: acme.sh (not tested)": "the client is in no package",
}

COMMANDS = ConsoleOptions.longdesc.partition("Environment")[0]
NOT_YET = {
    "docs/clients.md: One command": "\nrun " not in COMMANDS,
}


class Host:
    """The host as whoever follows a document finds it: its own F{/etc}, F{/var} and so on.

    What is written there goes with the last process, so the host of the tests does not change. A
    command is the client's own, and asks the test CA where it would ask Let's Encrypt.
    """

    _PRIVATE = """
mount -t tmpfs tmpfs "$SCRATCH"
for folder in etc root usr/local var; do
    mkdir -p "$SCRATCH/$folder/upper" "$SCRATCH/$folder/work"
    mount -t overlay overlay "/$folder" \\
        -o "lowerdir=/$folder,upperdir=$SCRATCH/$folder/upper,workdir=$SCRATCH/$folder/work"
done
mount -t tmpfs tmpfs /run
cp "$AUTHORITY" /etc/ssl/certs/ca-certificates.crt
echo "CA=$CA" >/etc/dehydrated/conf.d/ca.sh
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
        (programs / PROGRAM.name).symlink_to(PROGRAM)
        self._env = {
            "AUTHORITY": str(ca.authority.certificate),
            "CA": ca.directory_url,
            "PATH": f"{programs}:{os.environ['PATH']}:/usr/sbin",
            "SCRATCH": str(directory / "scratch"),
            "WORK": str(directory / "work"),
        }

    def order(self, script: str, order: Order) -> Issued:
        """Run a script, every line of which has to succeed, and give what it brought home."""
        keep = (
            f"cp {order.certificate} {self._certificate}\n"
            f"cp {order.account} {self._account}\n"
            f"cp /var/log/acme-alpn-proxy.log {self._log}\n"
        )
        private = ("unshare", "--mount", "--propagation", "private", "sh", "-euc")
        self._namespace.run(*private, self._PRIVATE + script + keep, env=self._env)
        return issued(self._namespace, self._ca, self._certificate, self._account)

    @property
    def routed(self) -> list[str]:
        """What the proxy has logged of validations."""
        return [line for line in self._log.read_text().splitlines() if "to acme target" in line]


@pytest.fixture
def crowd(road: Street, site: Website) -> Iterator[Visitors]:
    """Visitors of the site, all the while."""
    with visitors(site, road.visitor, road.host) as running:
        yield running


@pytest.fixture
def host(road: Street, site: Website, tmp_path: Path) -> Iterator[Host]:
    """The host, and a CA that asks it."""
    with pebble(road.visitor, road.host, tmp_path / "ca") as ca:
        yield Host(road.host.namespace, ca, tmp_path / "host")


def nothing_is_left(namespace: Namespace, before: list[int]) -> None:
    """All that was started has ended by itself, and no rule is left."""
    wait_until(lambda: set(namespace.pids()) <= set(before), "nothing runs any more")
    assert namespace.rules() == []


@pytest.mark.parametrize("name", ORDERS)
def test_order(road: Street, host: Host, crowd: Visitors, name: str) -> None:
    """Who pastes the block has a certificate, by TLS-ALPN-01 through the proxy, and every visitor
    was served."""
    if NOT_YET.get(name):
        pytest.skip("there is no such command yet")
    order = ORDERS[name]
    before = road.host.namespace.pids()
    brought = host.order(BLOCKS.get(order.after, "") + BLOCKS[name], order)
    nothing_is_left(road.host.namespace, before)
    report = crowd.leave()
    assert brought.names == [NAME]
    assert brought.challenges == ["tls-alpn-01"] * order.orders
    assert host.routed
    assert report.failed == 0, report
    assert report.steered > 0


def test_hooks(road: Street, host: Host) -> None:
    """A client that runs the two lines before and after its order gets its certificate; they may be
    run again at any time, and in the background as the original needed it."""
    before = road.host.namespace.pids()
    pre, post = BLOCKS[HOOKS].splitlines()
    order = BLOCKS["docs/clients.md: lego"].partition("\n")[2].rpartition("acme-alpn-proxy")[0]
    script = f"{post}\n{pre}\n{pre}\n{order}\n{post}\n{post}\n{pre} &\nwait $!\n{post}\n"
    brought = host.order(script, ORDERS["docs/clients.md: lego"])
    nothing_is_left(road.host.namespace, before)
    assert brought.challenges == ["tls-alpn-01"]


def test_make() -> None:
    """Each make command of the README does something, and the demo shows what it is to show."""
    for line in BLOCKS[MAKE].splitlines():
        command = line.partition("#")[0].split()
        planned = subprocess.run(
            [*command, "--dry-run", "--always-make"], cwd=ROOT, capture_output=True, text=True
        )
        assert planned.returncode == 0, planned.stderr
        assert ".venv/bin/" in planned.stdout
    demo = [sys.executable, "-m", "tests.integration.demo"]
    shown = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert shown.returncode == 0, shown.stdout + shown.stderr


def test_every_block_is_run() -> None:
    """There is no shell block in README.md or docs/clients.md that these tests neither run nor name
    as one that is not run."""
    assert sorted(BLOCKS) == sorted([*ORDERS, HOOKS, MAKE, *NOT_RUN])
