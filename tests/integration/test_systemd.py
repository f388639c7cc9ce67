"""The unit under a real systemd, and the messages that systemd receives."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .acme import Issued, Pebble, issued, pebble
from .machine import Machine, machine
from .netns import Street, terminate, wait_until
from .packages import ROOT, install
from .proxy import AT_ONCE, NET_RAW, NOBODY, Proxy, is_powerless
from .website import NAME, Website, steers, website

SERVICE = "acme-alpn-proxy.service"
STARTED = "Started: the proxy receives new connections to port 443"
UNIT = ROOT / "packaging" / "systemd" / SERVICE
SETTINGS = "/etc/default/acme-alpn-proxy"
DROP_IN = f"{SERVICE}.d/sk-lookup.conf"
EXAMPLES = "/usr/share/doc/acme-alpn-proxy/examples"

LEGO = "lego.service"
RELOADS = "/run/reloads"
NGINX = f"""[Service]
ExecStart=/bin/sh -c 'true >{RELOADS}; exec sleep infinity'
ExecReload=/bin/sh -c 'echo reloaded >>{RELOADS}'
"""
"""In place of a web server's unit: it notes that it was reloaded."""

ACME_SH = "acme-sh.service"
ACME_SH_PROGRAM = "/root/.acme.sh/acme.sh"


@pytest.mark.parametrize(("drop_in", "exposure"), [(None, "2.3"), (DROP_IN, "1.9")])
def test_exposure(tmp_path: Path, drop_in: str | None, exposure: str) -> None:
    """The unit is hardened: systemd rates it as docs/packages.md says, or better."""
    unit = tmp_path / SERVICE
    shutil.copy(UNIT, unit)
    if drop_in is not None:
        (tmp_path / drop_in).parent.mkdir()
        shutil.copy(UNIT.parent / "examples" / drop_in, tmp_path / drop_in)
    assert exposure in (ROOT / "docs" / "packages.md").read_text()
    threshold = ("--offline=true", f"--threshold={exposure.replace('.', '')}")
    command = ("systemd-analyze", "security", *threshold, unit)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# A process in the foreground


@pytest.fixture
def manager(proxy: Proxy, tmp_path: Path) -> Iterator[socket.socket]:
    """A socket at the address in the proxy's environment, in place of systemd's."""
    proxy.env["NOTIFY_SOCKET"] = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listener.bind(proxy.env["NOTIFY_SOCKET"])
        listener.settimeout(20)
        yield listener


def _told(manager: socket.socket) -> tuple[int, dict[str, str]]:
    """The next message: the PID of its sender, and its fields."""
    message, ancillary, *_ = manager.recvmsg(4096, socket.CMSG_SPACE(12))
    (_, _, credentials) = ancillary[0]
    pid, _, _ = struct.unpack("3i", credentials)
    return pid, dict(line.split("=", 1) for line in message.decode().splitlines())


def test_told(
    road: Street, site: Website, proxy: Proxy, manager: socket.socket, tmp_path: Path
) -> None:
    """With C{-n} the proxy sends its manager a message when it steers and when it stops, and says
    for how many connections it still waits."""
    words = proxy.start_words("-n", "--linger", "0.5", "--drain-timeout", "60")
    process = proxy.namespace.popen(proxy.program, *words, log=tmp_path / "log", env=proxy.env)
    try:
        started = {"STATUS": STARTED}
        assert _told(manager) == (process.pid, started)
        assert _told(manager) == (process.pid, {"READY": "1", "MAINPID": str(process.pid)})
        assert len(proxy.namespace.rules()) == 4
        host, visitor = road.host, road.visitor.namespace
        with site.visit(visitor, host.ipv4) as visit:
            assert visit.get().steered
            with site.visit(visitor, host.ipv6) as other:
                assert other.get().steered
                process.send_signal(signal.SIGTERM)
                stopping = {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "90500000"}
                assert _told(manager) == (process.pid, stopping)
                assert _told(manager)[1]["STATUS"].startswith("Stopped steering: ")
                assert _told(manager)[1] == {"STATUS": "Waiting for 2 open connections to end"}
            assert _told(manager)[1] == {"STATUS": "Waiting for 1 open connection to end"}
        assert _told(manager)[1]["STATUS"].startswith("Stopped:")
        assert process.wait(10) == 0
    finally:
        terminate(process)


def test_background_is_silent(proxy: Proxy, manager: socket.socket) -> None:
    """If a hook in another service runs C{start}, the daemon sends that service's manager
    nothing."""
    proxy.start(*AT_ONCE)
    proxy.stop(wait=True)
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(1)


# The unit


@pytest.fixture
def debian(road: Street, dist: Path, tmp_path: Path) -> Iterator[Machine]:
    """A machine with the Debian package."""
    with machine(road.host.namespace, tmp_path / "machine") as booted:
        install(booted, dist)
        yield booted


def _shown(debian: Machine, name: str) -> str:
    shown = debian.run("systemctl", "show", f"--property={name}", "--value", SERVICE)
    return shown.stdout.strip()


def _settings(debian: Machine, options: str) -> None:
    debian.write(SETTINGS, f"ACME_ALPN_PROXY_OPTIONS={options}\n")


def test_units_are_sound(debian: Machine) -> None:
    """systemd finds no problem in the unit and in the examples."""
    for program in (ACME_SH_PROGRAM, "/usr/bin/lego"):
        debian.write(program, "#!/bin/sh\n", "755")
    debian.run("sh", "-c", f"cp -r {EXAMPLES}/* /etc/systemd/system")
    names = debian.run("sh", "-c", f"cd {EXAMPLES}; echo *.service *.timer").stdout.split()
    assert len(names) == 4
    verify = ("systemd-analyze", "--recursive-errors=no", "--man=yes", "verify")
    for name in (SERVICE, *names):
        assert debian.run(*verify, name).stdout == "", name


@pytest.mark.parametrize("redirect", ["sk-lookup", "iptables"])
def test_service(road: Street, site: Website, debian: Machine, redirect: str) -> None:
    """With each redirect, C{systemctl start} returns when the proxy steers, and C{systemctl stop}
    when the last visitor has left."""
    _settings(debian, f"--redirect {redirect} {' '.join(AT_ONCE)}")
    debian.run("systemctl", "start", SERVICE)
    assert _shown(debian, "StatusText") == STARTED
    pid = debian.run("cat", "/run/acme-alpn-proxy.pid").stdout.strip()
    assert _shown(debian, "MainPID") == pid
    assert bool(road.host.namespace.rules()) == (redirect == "iptables")
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        debian.run("systemctl", "stop", "--no-block", SERVICE)
        status = "Waiting for 1 open connection to end"
        wait_until(lambda: _shown(debian, "StatusText") == status, "it drains")
        assert _shown(debian, "ActiveState") == "deactivating"
        assert visit.get().steered
    debian.run("systemctl", "stop", SERVICE)
    assert _shown(debian, "Result") == "success"
    assert not steers(road, site)
    assert road.host.namespace.rules() == []


def test_without_settings(road: Street, site: Website, debian: Machine) -> None:
    """Without settings, the service starts with a redirect that makes no rule of iptables."""
    debian.run("systemctl", "start", SERVICE)
    assert steers(road, site)
    assert road.host.namespace.rules() == []


@pytest.mark.parametrize("redirect", ["sk-lookup", "nftables", "iptables"])
def test_own_user(road: Street, site: Website, debian: Machine, redirect: str) -> None:
    """Once it steers, the service runs as a separate user and keeps only CAP_NET_RAW. Other users
    cannot suspend it; C{stop} as root ends it."""
    _settings(debian, f"--redirect {redirect} {' '.join(AT_ONCE)}")
    debian.run("systemctl", "start", SERVICE)
    assert steers(road, site)
    pid = _shown(debian, "MainPID")
    uid = debian.run("id", "-u", "acme-alpn-proxy").stdout.strip()
    status = debian.run("cat", f"/proc/{pid}/status").stdout
    assert re.search(rf"^Uid:(\t{uid}){{4}}$", status, re.MULTILINE)
    assert is_powerless(status, NET_RAW)
    stopped = debian.run(*NOBODY, "sh", "-c", f"kill -STOP {pid}", check=False)
    assert "not permitted" in stopped.stdout
    assert f"PID {pid}" in debian.run("acme-alpn-proxy", "status").stdout
    debian.run("acme-alpn-proxy", "stop", "--wait")
    assert _shown(debian, "Result") == "success"
    assert not steers(road, site)
    assert road.host.namespace.rules() == []
    assert debian.run("sh", "-c", "ls /run | grep acme-alpn-proxy.pid", check=False).stdout == ""


def test_sk_lookup_alone(road: Street, site: Website, debian: Machine) -> None:
    """With the drop-in, sk-lookup steers, and nothing else is tried."""
    _use_examples(debian, f"{SERVICE}.d")
    debian.run("systemctl", "start", SERVICE)
    assert steers(road, site)
    assert "redirect sk-lookup" in debian.run("acme-alpn-proxy", "status").stdout
    debian.run("systemctl", "stop", SERVICE)
    assert not steers(road, site)


@pytest.mark.parametrize("redirect", ["sk-lookup", "iptables"])
def test_watchdog(road: Street, site: Website, debian: Machine, redirect: str) -> None:
    """If the proxy is suspended (SIGSTOP), systemd ends it, and its rules are removed."""
    debian.write(f"/etc/systemd/system/{SERVICE}.d/soon.conf", "[Service]\nWatchdogSec=2\n")
    debian.run("systemctl", "daemon-reload")
    _settings(debian, f"--redirect {redirect}")
    debian.run("systemctl", "start", SERVICE)
    assert steers(road, site)
    debian.run("systemctl", "kill", "--kill-who=main", "--signal=STOP", SERVICE)
    wait_until(lambda: _shown(debian, "ActiveState") == "failed", "it is ended")
    assert _shown(debian, "Result") == "watchdog"
    wait_until(lambda: road.host.namespace.rules() == [], "its rules are removed")
    assert not steers(road, site)


def test_killed(road: Street, site: Website, debian: Machine) -> None:
    """If all processes of the service are killed, with the guard, another unit removes the rules,
    and visitors are served."""
    _settings(debian, "--redirect iptables")
    debian.run("systemctl", "start", SERVICE)
    assert road.host.namespace.rules() != []
    debian.run("systemctl", "kill", "--signal=KILL", SERVICE)
    wait_until(lambda: _shown(debian, "ActiveState") == "failed", "it has ended")
    assert _shown(debian, "Result") == "signal"
    wait_until(lambda: road.host.namespace.rules() == [], "the other unit has cleaned up")
    assert not steers(road, site)


def test_another_instance(road: Street, site: Website, debian: Machine) -> None:
    """While an instance of a hook runs, the service does not start, and that instance goes on."""
    debian.run("acme-alpn-proxy", "start")
    done = debian.run("systemctl", "start", SERVICE, check=False)
    assert done.returncode != 0
    log = debian.run("journalctl", "--unit", SERVICE).stdout
    assert re.search(r"already running as PID \d+", log)
    assert steers(road, site)


def test_web_server_outside(road: Street, debian: Machine, tmp_path: Path) -> None:
    """In a container whose web server is outside, iptables is refused, and another redirect
    steers."""
    with website(road.host.namespace, tmp_path / "outside") as site:
        alone = ("--redirect", "iptables")
        done = debian.run("acme-alpn-proxy", *alone, "start", check=False)
        assert done.returncode == os.EX_CONFIG
        assert "the web server runs outside this container" in done.stdout
        assert road.host.namespace.rules() == []
        for ways in ((), ("--redirect", "auto")):
            debian.run("acme-alpn-proxy", *AT_ONCE, *ways, "start")
            assert steers(road, site)
            debian.run("acme-alpn-proxy", "stop", "--wait")


# The examples


def _use_examples(debian: Machine, *names: str) -> None:
    copies = [f"{EXAMPLES}/{name}" for name in names]
    debian.run("cp", "-r", *copies, "/etc/systemd/system")
    debian.run("systemctl", "daemon-reload")
    _settings(debian, " ".join(AT_ONCE))


def _has_let_go(road: Street, site: Website, debian: Machine) -> None:
    wait_until(lambda: _shown(debian, "ActiveState") == "inactive", "the proxy has ended")
    assert not steers(road, site)
    assert road.host.namespace.rules() == []


def test_acme_sh_example(road: Street, site: Website, debian: Machine) -> None:
    """The proxy steers only while acme.sh (here a stand-in) runs, whether that succeeds or
    fails."""
    _use_examples(debian, ACME_SH)
    for status in (0, 1):
        script = f"#!/bin/sh\nsystemctl is-active {SERVICE} >/was-active-{status}\nexit {status}\n"
        debian.write(ACME_SH_PROGRAM, script, "755")
        assert debian.run("systemctl", "start", ACME_SH, check=False).returncode == status
        assert debian.run("cat", f"/was-active-{status}").stdout == "active\n"
        _has_let_go(road, site, debian)


def test_lego_example(road: Street, site: Website, debian: Machine, tmp_path: Path) -> None:
    """The example's service of lego renews, with TLS-ALPN-01 through the proxy, a certificate that
    was ordered by hand as the example says; the web server loads it. Its timer is active."""
    with pebble(road.visitor, road.host, tmp_path / "ca") as ca:
        debian.run("mv", "/usr/bin/lego", "/usr/bin/real-lego")
        asks_the_test_ca = f'#!/bin/sh\nexec real-lego --server {ca.directory_url} "$@"\n'
        debian.write("/usr/bin/lego", asks_the_test_ca, "755")
        debian.write("/etc/ssl/certs/ca-certificates.crt", ca.authority.certificate.read_text())
        _use_examples(debian, "lego.service", "lego.timer")
        debian.write("/etc/systemd/system/nginx.service", NGINX)
        debian.run("systemctl", "daemon-reload")
        debian.run("systemctl", "start", "nginx")

        commands = dict(
            line.split("=", 1)
            for line in debian.run("systemctl", "cat", LEGO).stdout.splitlines()
            if line.startswith("Exec")
        )
        order = commands["ExecStart"].partition(" renew ")[0] + " run"
        for command in (commands["ExecStartPre"], order, commands["ExecStopPost"]):
            debian.run(*command.split())
        _has_let_go(road, site, debian)
        first = _brought_home(road, ca, debian, tmp_path)
        assert first.challenges == ["tls-alpn-01"]
        assert debian.run("cat", RELOADS).stdout == ""

        debian.run("systemctl", "start", LEGO)
        _has_let_go(road, site, debian)
        second = _brought_home(road, ca, debian, tmp_path)
    assert second.names == [NAME]
    assert second.challenges == ["tls-alpn-01"] * 2
    assert second.certificate.serial_number != first.certificate.serial_number
    assert debian.run("cat", RELOADS).stdout == "reloaded\n"

    debian.run("systemctl", "enable", "--now", "lego.timer")
    shown = ("systemctl", "show", "--property=Unit,NextElapseUSecRealtime", "lego.timer")
    timer = dict(line.split("=", 1) for line in debian.run(*shown).stdout.splitlines())
    assert timer["Unit"] == LEGO
    assert timer["NextElapseUSecRealtime"] != ""


def _brought_home(road: Street, ca: Pebble, debian: Machine, directory: Path) -> Issued:
    """The certificate and the challenges of lego, from its folder in the machine."""
    files = []
    for name in (f"certificates/{NAME}.crt", "accounts/*/*/keys/*.key"):
        files.append(directory / name.rpartition(".")[2])
        text = debian.run("sh", "-c", f"cat /etc/lego/{name}").stdout
        files[-1].write_text(text)
    return issued(road.host.namespace, ca, *files)
