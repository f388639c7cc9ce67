"""Every way to steer on every kind of host; and C{start} with default options, under load.

With C{CYCLES=20} in the environment, it starts and stops so often on each, instead of three times.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from acme_alpn_proxy.options import WAYS

from .kinds import KINDS, Host, Kind
from .netns import wait_until
from .proxy import AT_ONCE, Proxy, ends, no_way_back_is_left
from .visitors import STEERED

CYCLES = int(os.environ.get("CYCLES", "3"))

LIFETIME = 90.0
"""Seconds after which a redirect of iptables ends by itself, at the latest."""

BY_DEFAULT = "by default"
AUTO = ("sk-lookup", "nftables", "iptables")

CELLS = [
    (name, way)
    for name, kind in KINDS.items()
    for way in (*WAYS, *(["auto"] if "sk-lookup" in kind.refusals else []))
]

every_kind = pytest.mark.parametrize("name", KINDS, scope="module")


@pytest.fixture(scope="module")
def host(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host of that kind, for all tests of the kind: each leaves it as it was."""
    with KINDS[name].make(tmp_path_factory.mktemp("host")) as made:
        yield made


@pytest.fixture
def kind(name: str) -> Kind:
    return KINDS[name]


@pytest.fixture
def proxy(host: Host, tmp_path: Path) -> Iterator[Proxy]:
    """The proxy of this host, not started; at the end nothing of it may be left."""
    before = host.ruleset()
    proxy = host.proxy(tmp_path)
    yield proxy
    assert not proxy.pid or ends(proxy.pid)
    no_way_back_is_left(host.namespace)
    wait_until(lambda: host.ruleset() == before, "the firewall is as it was", 2)
    assert not host.steered()


@pytest.mark.parametrize(("name", "way"), CELLS, scope="module")
def test_way(host: Host, kind: Kind, proxy: Proxy, way: str) -> None:
    """The proxy steers all visitors until the stop; or it refuses, changes nothing, and names each
    redirect that works here."""
    done = proxy.start("--redirect", way, *AT_ONCE, *host.options, check=False)
    if way in kind.refusals:
        assert done.returncode in (os.EX_CONFIG, os.EX_UNAVAILABLE)
        assert re.search(kind.refusals[way], done.stderr)
        advised = re.findall("--redirect ([a-z-]+)", done.stderr.rpartition("; ")[2])
        assert advised == [each for each in WAYS if each not in kind.refusals]
        return
    assert done.returncode == 0, done.stderr
    if way == "auto":
        taken = next(each for each in AUTO if each not in kind.refusals)
        assert f"Steering with {taken}: sk-lookup cannot be used, because" in done.stderr
    assert host.steered()
    proxy.stop(wait=True)
    assert not proxy.pid_file.exists()


def start_by_default(host: Host, kind: Kind, proxy: Proxy) -> None:
    """Start without an option for steering; it says which way it takes if that is not the first."""
    done = proxy.start(*host.options)
    if kind.default == WAYS[0]:
        assert done.stderr == ""
    else:
        assert f"Steering with {kind.default}: {WAYS[0]} cannot be used" in done.stderr


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, BY_DEFAULT) for name in KINDS), *(("cold tracking", way) for way in WAYS[1:])],
    scope="module",
)
def test_cycles_under_load(
    host: Host, kind: Kind, proxy: Proxy, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Start and stop, again and again: no visitor fails."""
    with host.crowd() as crowd:
        for cycle in range(CYCLES):
            if way == BY_DEFAULT:
                start_by_default(host, kind, proxy)
            else:
                proxy.start("--redirect", way)
            crowd.wait_for(3, steered=True)
            proxy.stop(wait=cycle % 2 == 0)
        report = crowd.leave()
    with capsys.disabled():
        print(
            f"\n{way}, {CYCLES} cycles: {report.served} visitors, {report.steered} of them"
            f" steered, {report.failed} lost"
        )
    assert report.failed == 0, report
    if host.steered_from in STEERED:  # the web server is on loopback, and not in a container
        assert all(tally.seen == tally.steered for tally in report.families.values()), report


@every_kind
def test_killed(host: Host, kind: Kind, proxy: Proxy) -> None:
    """After SIGKILL of the proxy, visitors are served again within a second, and nothing is left.
    If the guard is killed, too, what is left expires within 90 s, and stop removes it at once."""
    start_by_default(host, kind, proxy)
    assert host.steered()
    proxy.kill()
    wait_until(lambda: _served(host), "the site serves again", 1)
    if kind.default != "iptables":  # there is no guard: that was all
        return
    wait_until(lambda: not _rules_of_ours(host), "the guard has removed the rules", 2)
    start_by_default(host, kind, proxy)
    proxy.kill_with_guard()
    redirects = [rule for rule in _rules_of_ours(host) if "REDIRECT" in rule]
    assert len(redirects) == 2
    assert all(0 < _ends_in(rule) <= LIFETIME for rule in redirects)
    proxy.run("stop")


def _rules_of_ours(host: Host) -> list[str]:
    return [rule for rule in host.namespace.rules() if "acme-alpn-proxy" in rule]


def _served(host: Host) -> bool:
    try:
        return not host.steered()
    except OSError:
        return False


def _ends_in(rule: str) -> float:
    """Seconds until a rule of iptables ends by itself."""
    (date,) = re.findall("--datestop ([-0-9T:]+)", rule)
    return datetime.fromisoformat(f"{date}+00:00").timestamp() - time.time()
