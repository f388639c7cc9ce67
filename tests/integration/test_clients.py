"""The commands of README.md and docs/clients.md, run as they stand, each with the real client.

Each block is one of these, which L{test_every_block} sees to: an order, run by L{test_order} or
L{test_visitors_notice_nothing}; the hooks, run by L{test_hooks}; one that tells the reader that it
is not tested; a synopsis or commands of make, looked at by F{tests/test_documents.py}.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..documents import CLIENTS, MAKE, README, ROOT, SYNOPSIS, fenced_blocks
from .acme import Issued, Pebble, issued, pebble
from .netns import CommandFailed, Namespace, Street, wait_until
from .proxy import PROGRAM
from .visitors import visitors
from .website import NAME, Website

BLOCKS = {
    name: text for document in (README, CLIENTS) for name, text in fenced_blocks(document).items()
}


@dataclass(frozen=True)
class Order:
    """A block by which a certificate is ordered.

    @ivar certificate: where it is afterwards; like C{account} a pattern of sh.
    @ivar account: where the key of the ACME account is.
    @ivar after: a block that is to be run before, for the same account.
    @ivar orders: how many there were, that one included.
    """

    certificate: str
    account: str
    after: str = ""
    orders: int = 1


def _lego(folder: str) -> tuple[str, str]:
    return f"{folder}/certificates/{NAME}.crt", f"{folder}/accounts/*/*/keys/*.key"


_UACME = (f"/etc/ssl/uacme/{NAME}/cert.pem", "/etc/ssl/uacme/private/key.pem")

README_RUN = f"{README}: Use it"
README_STEPS = f"{README}: Use it (2)"
LEGO = f"{CLIENTS}: lego"
RENEWAL = f"{CLIENTS}: lego, renewal"
UACME = f"{CLIENTS}: uacme"
UALPN = f"{CLIENTS}: uacme with its own hook"
DEHYDRATED = f"{CLIENTS}: dehydrated"
RUN = f"{CLIENTS}: One command"

ORDERS = {
    README_RUN: Order(*_lego(".lego")),
    README_STEPS: Order(*_lego(".lego")),
    RUN: Order(*_lego("/etc/lego")),
    RENEWAL: Order(*_lego("/etc/lego"), after=LEGO, orders=2),
    UACME: Order(*_UACME),
    UALPN: Order(*_UACME),
    DEHYDRATED: Order(
        f"/var/lib/dehydrated/certs/{NAME}/cert.pem",
        "/var/lib/dehydrated/accounts/*/account_key.pem",
    ),
}

HOOKS = f"{CLIENTS}: Any client with hooks"
NOT_TESTED = "(not tested)"


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
echo "CA=$CA KEYSIZE=2048" >/etc/dehydrated/conf.d/ca.sh
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
        for program in (PROGRAM, PROGRAM.with_name(f"{PROGRAM.name}-hook")):
            (programs / program.name).symlink_to(program)
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
def host(road: Street, site: Website, tmp_path: Path) -> Iterator[Host]:
    """The host, and a CA that asks it."""
    with pebble(road.visitor, road.host, tmp_path / "ca") as ca:
        yield Host(road.host.namespace, ca, tmp_path / "host")


def nothing_is_left(namespace: Namespace, before: list[int]) -> None:
    """All that was started has ended by itself, and no rule is left."""
    wait_until(lambda: set(namespace.pids()) <= set(before), "nothing runs any more")
    assert namespace.rules() == []


def paste(road: Street, host: Host, name: str) -> None:
    """Follow the document; what it promises holds, and nothing is left behind."""
    order = ORDERS[name]
    before = road.host.namespace.pids()
    brought = host.order(BLOCKS.get(order.after, "") + BLOCKS[name], order)
    nothing_is_left(road.host.namespace, before)
    assert brought.names == [NAME]
    assert brought.challenges == ["tls-alpn-01"] * order.orders
    assert host.routed


@pytest.mark.parametrize("name", [name for name in ORDERS if name != README_STEPS])
def test_order(road: Street, host: Host, name: str) -> None:
    """Who pastes the block has a certificate, by TLS-ALPN-01 through the proxy."""
    paste(road, host, name)


def test_visitors_notice_nothing(road: Street, site: Website, host: Host) -> None:
    """Who pastes the block of the README has a certificate, and every visitor was served."""
    with visitors(site, road.visitor, road.host) as crowd:
        paste(road, host, README_STEPS)
        report = crowd.leave()
    assert report.failed == 0, report
    assert report.steered > 0


def test_hooks(road: Street, host: Host) -> None:
    """A client that runs the two lines before and after its order gets its certificate; they may be
    run again at any time, and in the background as the original needed it."""
    before = road.host.namespace.pids()
    pre, post = BLOCKS[HOOKS].splitlines()
    rounds = f"{post}\n{pre}\n{post}\n{post}\n{pre} &\nwait $!\n{pre}\n"
    assert BLOCKS[LEGO].count(f"{pre}\n") == BLOCKS[LEGO].count(f"{post}\n") == 1
    brought = host.order(BLOCKS[LEGO].replace(f"{pre}\n", rounds), ORDERS[RUN])
    nothing_is_left(road.host.namespace, before)
    assert brought.challenges == ["tls-alpn-01"]


@pytest.mark.parametrize(
    ("name", "right", "wrong", "told"),
    [
        (RENEWAL, NAME, f"unknown.{NAME}", "is not registered"),
        (DEHYDRATED, "$(command -v acme-alpn-proxy-hook)", "/bin/true", "Challenge is invalid"),
    ],
    ids=[RENEWAL, DEHYDRATED],
)
def test_failed_order(
    road: Street, host: Host, name: str, right: str, wrong: str, told: str
) -> None:
    """Where the order fails the proxy lets go all the same: there is nothing to renew, or the
    responder is not where it should be."""
    before = road.host.namespace.pids()
    assert right in BLOCKS[name]
    with pytest.raises(CommandFailed, match=told):
        host.order(BLOCKS[name].replace(right, wrong), ORDERS[name])
    assert [rule for rule in road.host.namespace.rules() if " nat " in rule] == []
    nothing_is_left(road.host.namespace, before)


def test_every_block() -> None:
    """There is no block in README.md or docs/clients.md that no test runs or looks at, unless the
    reader is told so."""
    run = {HOOKS, *ORDERS, *(order.after for order in ORDERS.values() if order.after)}
    not_tested = {name for name in BLOCKS if name.endswith(NOT_TESTED)}
    assert set(BLOCKS) == run | not_tested | {MAKE, SYNOPSIS}
