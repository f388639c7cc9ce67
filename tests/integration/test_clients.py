"""The commands of README.md, docs/clients.md and docs/renewal.md, and the renewal of
docs/tutorial.md, run with the real clients.

Each block is one of these, which L{test_every_block} checks: an order, run by L{test_order} or
L{test_visitors_notice_nothing}; the hooks, run by L{test_hooks}; one that tells the reader that it
is not tested; a session on a terminal, run by F{test_sessions.py}; a synopsis or commands of make,
looked at by F{tests/test_documents.py}.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..documents import CLIENTS, MAKE, README, RENEWAL, SYNOPSIS, TUTORIAL, fenced_blocks
from .acme import pebble
from .netns import CommandFailed, Namespace, Street, wait_until
from .privatehost import Host, Order
from .visitors import visitors
from .website import NAME, Website

BLOCKS = {
    name: text
    for document in (README, CLIENTS, RENEWAL)
    for name, text in fenced_blocks(document).items()
}
TUTORIAL_RENEWAL = f"{TUTORIAL}: 5. Renew it"
BLOCKS[TUTORIAL_RENEWAL] = fenced_blocks(TUTORIAL)[TUTORIAL_RENEWAL]


def _lego(folder: str) -> tuple[str, str]:
    return f"{folder}/certificates/{NAME}.crt", f"{folder}/accounts/*/*/keys/*.key"


_UACME = (f"/etc/ssl/uacme/{NAME}/cert.pem", "/etc/ssl/uacme/private/key.pem")

WWW = f"www.{NAME}"
_LIVE = "/etc/letsencrypt"
_CERTBOT = (f"{_LIVE}/live/{NAME}/cert.pem", f"{_LIVE}/accounts/*/*/*/private_key.json")

README_RUN = f"{README}: Use it"
README_STEPS = f"{README}: Use it (2)"
README_SESSION = {f"{README}: Your first certificate{count}" for count in ("", " (2)")}
LEGO = f"{CLIENTS}: lego"
LEGO_RENEWAL = f"{CLIENTS}: lego, renewal"
CERTBOT = f"{CLIENTS}: certbot"
CERTBOT_RENEWAL = f"{CLIENTS}: certbot (2)"
ADDRESS = f"{RENEWAL}: An IP address"
UACME = f"{CLIENTS}: uacme"
UALPN = f"{CLIENTS}: uacme with its own hook"
DEHYDRATED = f"{CLIENTS}: dehydrated"
RUN = f"{CLIENTS}: One command"

ORDERS = {
    README_RUN: Order(*_lego("/etc/lego")),
    README_STEPS: Order(*_lego("/etc/lego")),
    RUN: Order(*_lego("/etc/lego")),
    LEGO_RENEWAL: Order(*_lego("/etc/lego"), after=LEGO, validations=2, reloads=1),
    TUTORIAL_RENEWAL: Order(*_lego("/etc/lego"), after=RUN, validations=2, reloads=1),
    CERTBOT_RENEWAL: Order(*_CERTBOT, after=CERTBOT, validations=4, names=(NAME, WWW), reloads=2),
    ADDRESS: Order(*_CERTBOT, validations=2),
    UACME: Order(*_UACME),
    UALPN: Order(*_UACME),
    DEHYDRATED: Order(
        f"/var/lib/dehydrated/certs/{NAME}/cert.pem",
        "/var/lib/dehydrated/accounts/*/account_key.pem",
    ),
}

ANY_ADDRESS = "192.0.2.1"
PRE_HOOK = f"{CLIENTS}: Any client with hooks"
POST_HOOK = f"{PRE_HOOK} (2)"
NOT_TESTED = "(not tested)"


@pytest.fixture
def host(road: Street, site: Website, tmp_path: Path) -> Iterator[Host]:
    """The host, and a CA that validates it."""
    with pebble(road.visitor, road.host, tmp_path / "ca") as ca:
        yield Host(road.host.namespace, ca, tmp_path / "host")


def nothing_is_left(namespace: Namespace, before: list[int]) -> None:
    """Assert that all processes that were started end by themselves, and that no rule is left."""
    wait_until(lambda: set(namespace.pids()) <= set(before), "nothing runs any more")
    assert namespace.rules() == []


def paste(road: Street, host: Host, name: str) -> None:
    """Run the block, and assert that its promises hold and that nothing is left."""
    order = ORDERS[name]
    before = road.host.namespace.pids()
    script = (BLOCKS.get(order.after, "") + BLOCKS[name]).replace(ANY_ADDRESS, road.host.ipv4)
    brought = host.order(script, order)
    nothing_is_left(road.host.namespace, before)
    assert tuple(brought.names) == order.names
    assert brought.challenges == ["tls-alpn-01"] * order.validations
    assert host.reloads == ["reload nginx"] * order.reloads
    assert host.routed


@pytest.mark.parametrize("name", [name for name in ORDERS if name != README_STEPS])
def test_order(road: Street, host: Host, name: str) -> None:
    """A reader who pastes the block gets a certificate, with TLS-ALPN-01 through the proxy."""
    paste(road, host, name)


def test_visitors_notice_nothing(road: Street, site: Website, host: Host) -> None:
    """A reader who pastes the block of the README gets a certificate, and every visitor is
    served."""
    with visitors(site, road.visitor, road.host) as crowd:
        paste(road, host, README_STEPS)
        report = crowd.leave()
    assert report.failed == 0, report
    assert report.steered > 0


def test_hooks(road: Street, host: Host) -> None:
    """A client that runs the two hooks before and after its order gets its certificate. The hooks
    may be run again at any time, also in the background, as the original program needed it."""
    before = road.host.namespace.pids()
    pre, post = (BLOCKS[name].rstrip("\n") for name in (PRE_HOOK, POST_HOOK))
    rounds = f"{post}\n{pre}\n{post}\n{post}\n{pre} &\nwait $!\n{pre}\n"
    assert BLOCKS[LEGO].count(f"{pre}\n") == BLOCKS[LEGO].count(f"{post}\n") == 1
    brought = host.order(BLOCKS[LEGO].replace(f"{pre}\n", rounds), ORDERS[RUN])
    nothing_is_left(road.host.namespace, before)
    assert brought.challenges == ["tls-alpn-01"]


@pytest.mark.parametrize(
    ("name", "right", "wrong", "told"),
    [
        (LEGO_RENEWAL, NAME, f"unknown.{NAME}", "is not registered"),
        (DEHYDRATED, "$(command -v acme-alpn-proxy-hook)", "/bin/true", "Challenge is invalid"),
    ],
    ids=[LEGO_RENEWAL, DEHYDRATED],
)
def test_failed_order(
    road: Street, host: Host, name: str, right: str, wrong: str, told: str
) -> None:
    """If the order fails, because there is nothing to renew or because the validation fails, the
    proxy still stops steering."""
    before = road.host.namespace.pids()
    assert right in BLOCKS[name]
    with pytest.raises(CommandFailed, match=told):
        host.order(BLOCKS[name].replace(right, wrong), ORDERS[name])
    assert [rule for rule in road.host.namespace.rules() if " nat " in rule] == []
    nothing_is_left(road.host.namespace, before)


def test_every_block() -> None:
    """Each block of the documents is run or checked by a test, or says that it is not tested."""
    run = {PRE_HOOK, POST_HOOK, *ORDERS, *(order.after for order in ORDERS.values() if order.after)}
    not_tested = {name for name in BLOCKS if name.endswith(NOT_TESTED)}
    assert set(BLOCKS) == run | not_tested | README_SESSION | {MAKE, SYNOPSIS}
