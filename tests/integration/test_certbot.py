"""certbot of today with the plugin, against the test CA; Debian's is in F{test_packages.py}."""

from __future__ import annotations

import ipaddress
import signal
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest
from cryptography import x509

from .acme import CERTIFICATE_SECONDS, SHORTLIVED_SECONDS, pebble
from .certbot import ORDER, SECONDS, Certbot
from .netns import Street, wait_until
from .proxy import AT_ONCE, PROGRAM, Proxy
from .test_clients import nothing_is_left
from .visitors import visitors
from .website import NAME, Website, steers

WWW = f"www.{NAME}"


@pytest.fixture
def certbot(road: Street, proxy: Proxy, tmp_path: Path) -> Iterator[Certbot]:
    """The certbot that is installed beside this Python; no proxy runs yet."""
    with pebble(road.visitor, road.host, tmp_path / "ca") as ca:
        proxy.env["REQUESTS_CA_BUNDLE"] = str(ca.authority.certificate)
        proxy.env["PATH"] = f"{PROGRAM.parent}:/usr/sbin:/usr/bin:/sbin:/bin"

        def run(*words: str) -> tuple[str, int]:
            done = proxy.namespace.run(*words, check=False, env=proxy.env, timeout=SECONDS)
            return done.stdout + done.stderr, done.returncode

        def read(pattern: str) -> str:
            (path,) = glob(pattern)
            return Path(path).read_text()

        folders = {kind: str(tmp_path / kind) for kind in ("config", "work", "logs")}
        given = tuple(f"--{kind}-dir={folder}" for kind, folder in folders.items())
        yield Certbot(proxy.namespace, ca, run, read, folders["config"], given)


def options(proxy: Proxy, *more: str) -> str:
    """The option of certbot with options for the proxy that the plugin starts."""
    words = [*AT_ONCE, "--logfile", str(proxy.log_file), *more]
    return f"--alpn-proxy-options={' '.join(words)}"


def test_order_and_renewal(road: Street, site: Website, proxy: Proxy, certbot: Certbot) -> None:
    """If no proxy runs, an order for two names starts one, and so does the renewal with the options
    that certbot has saved. The proxy steers only until these end, and every visitor is served."""
    before = road.host.namespace.pids()
    with visitors(site, road.visitor, road.host) as crowd:
        certbot.order("-d", NAME, "-d", WWW, options(proxy, "--redirect", "iptables,nftables"))
        assert not steers(road, site)
        steered = crowd.report().steered
        assert steered > 0
        first = certbot.brought(NAME)
        certbot.succeeds("renew", "--force-renewal", "--no-random-sleep-on-renew")
        assert not steers(road, site)
        report = crowd.leave()
    second = certbot.brought(NAME)
    nothing_is_left(road.host.namespace, before)
    assert first.names == second.names == [NAME, WWW]
    assert first.certificate.serial_number != second.certificate.serial_number
    assert second.challenges == ["tls-alpn-01"] * 4
    assert proxy.log.count("Started: the proxy receives new connections to port 443") == 2
    assert report.failed == 0, report
    assert report.steered > steered


def test_addresses(road: Street, site: Website, proxy: Proxy, certbot: Certbot) -> None:
    """A certificate can have IPv4 and IPv6 addresses; it is valid for as long as the profile says,
    if the CA knows profiles.

    The first identifier is a name: older pebbles also write the first one to the subject, where
    certbot accepts no IP address.
    """
    addresses = (road.host.ipv4, road.host.ipv6)
    words = [word for address in addresses for word in ("--ip-address", address)]
    certbot.order("-d", NAME, *words, "--preferred-profile", "shortlived", options(proxy))
    brought = certbot.brought(NAME)
    assert brought.challenges == ["tls-alpn-01"] * 3
    names = brought.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    found = names.value.get_values_for_type(x509.IPAddress)
    assert set(found) == set(map(ipaddress.ip_address, addresses))
    valid = brought.certificate.not_valid_after_utc - brought.certificate.not_valid_before_utc
    expected = SHORTLIVED_SECONDS if certbot.account().profiles else CERTIFICATE_SECONDS
    assert abs(valid.total_seconds() - expected) < 60


@pytest.mark.parametrize("on_demand", [(), ("--on-demand",)])
def test_running_one(
    road: Street, site: Website, proxy: Proxy, certbot: Certbot, on_demand: tuple[str, ...]
) -> None:
    """The plugin uses a running proxy, and does not stop it. An on-demand proxy steers during the
    order."""
    proxy.start(*AT_ONCE, *on_demand)
    assert steers(road, site) == (not on_demand)
    with visitors(site, road.visitor, road.host) as crowd:
        certbot.order("-d", NAME, "-d", WWW)
        report = crowd.leave()
    assert certbot.brought(NAME).challenges == ["tls-alpn-01"] * 2
    assert report.failed == 0, report
    assert report.steered > 0
    wait_until(lambda: steers(road, site) == (not on_demand), "it steers as before")
    assert int(proxy.pid_file.read_text()) == proxy.pid
    proxy.stop(wait=True)


def test_failing_order(road: Street, site: Website, proxy: Proxy, certbot: Certbot) -> None:
    """If the CA cannot reach the proxy, the operator reads the CA's words, and that nobody has
    asked this host; nothing is left."""
    before = road.host.namespace.pids()
    with visitors(site, road.visitor, road.host) as crowd:
        said = certbot.fails(*ORDER, "-d", NAME, options(proxy, "--redirect", "none"))
        report = crowd.leave()
    assert "The Certificate Authority reported these problems" in said
    assert f"{NAME}: no validation arrived." in said
    nothing_is_left(road.host.namespace, before)
    assert report.failed == 0, report


def test_proxy_does_not_start(road: Street, site: Website, proxy: Proxy, certbot: Certbot) -> None:
    """If no proxy can be started, certbot shows the proxy's error."""
    before = road.host.namespace.pids()
    said = certbot.fails(*ORDER, "-d", NAME, options(proxy, "--fallback", "127.0.0.1:444"))
    assert (
        "acme-alpn-proxy: no web server answers at 127.0.0.1:444, the address of --fallback" in said
    )
    nothing_is_left(road.host.namespace, before)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed(
    road: Street,
    site: Website,
    proxy: Proxy,
    certbot: Certbot,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    """If a signal ends certbot during an order, the proxy that it has started stops steering."""
    before = road.host.namespace.pids()
    words = certbot.words(*ORDER, "-d", NAME, options(proxy))
    process = proxy.namespace.popen(*words, log=tmp_path / "log", env=proxy.env)
    wait_until(lambda: steers(road, site), "it steers", 30)
    process.send_signal(number)
    assert process.wait(30) == -number
    wait_until(lambda: not steers(road, site), "it has let go")
    nothing_is_left(road.host.namespace, before)
