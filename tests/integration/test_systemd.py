"""The unit under a real systemd, and what that is told."""

from __future__ import annotations

import re
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .machine import Machine, machine
from .netns import Street, terminate, wait_until
from .packages import ROOT, install, install_dependencies
from .proxy import Proxy
from .website import PAGE, Website

AT_ONCE = ("--linger", "0")
SERVICE = "acme-alpn-proxy.service"
UNIT = ROOT / "packaging" / "systemd" / SERVICE
SETTINGS = "/etc/default/acme-alpn-proxy"
EXPOSURE = 2.9


def test_exposure() -> None:
    """The unit is hardened: systemd's own judgement of it is below 3.0."""
    threshold = ("--offline=true", f"--threshold={EXPOSURE * 10:.0f}")
    command = ("systemd-analyze", "security", *threshold, UNIT)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# A process in the foreground


@pytest.fixture
def manager(proxy: Proxy, tmp_path: Path) -> Iterator[socket.socket]:
    """Listens where the proxy's environment says."""
    proxy.env["NOTIFY_SOCKET"] = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listener.bind(proxy.env["NOTIFY_SOCKET"])
        listener.settimeout(20)
        yield listener


def _told(manager: socket.socket) -> tuple[int, dict[str, str]]:
    """The next message: who sent it, and what it says."""
    message, ancillary, *_ = manager.recvmsg(4096, socket.CMSG_SPACE(12))
    (_, _, credentials) = ancillary[0]
    pid, _, _ = struct.unpack("3i", credentials)
    return pid, dict(line.split("=", 1) for line in message.decode().splitlines())


def test_told(
    road: Street, site: Website, proxy: Proxy, manager: socket.socket, tmp_path: Path
) -> None:
    """With -n, its manager is told when it steers, when it stops, and what it waits for."""
    words = proxy.start_words("-n", "--linger", "0.5", "--drain-timeout", "60")
    process = proxy.namespace.popen(proxy.program, *words, log=tmp_path / "log", env=proxy.env)
    try:
        started = {"STATUS": "Started: new connections to :443 are steered here"}
        assert _told(manager) == (process.pid, started)
        assert _told(manager) == (process.pid, {"READY": "1", "MAINPID": str(process.pid)})
        assert len(proxy.namespace.rules()) == 4
        with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
            assert visit.get().steered
            process.send_signal(signal.SIGTERM)
            stopping = {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "90500000"}
            assert _told(manager) == (process.pid, stopping)
            assert _told(manager)[1]["STATUS"].startswith("Let go of :443;")
            assert _told(manager)[1] == {"STATUS": "Draining 1 live connections"}
        assert _told(manager)[1]["STATUS"].startswith("Stopped:")
        assert process.wait(10) == 0
    finally:
        terminate(process)


def test_background_is_silent(proxy: Proxy, manager: socket.socket) -> None:
    """A hook's C{start} says nothing to the manager of whatever service the hook belongs to."""
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
        install_dependencies(booted)
        install(booted, dist)
        yield booted


def _shown(debian: Machine, name: str) -> str:
    shown = debian.run("systemctl", "show", f"--property={name}", "--value", SERVICE)
    return shown.stdout.strip()


def _steers(road: Street, site: Website) -> bool:
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        answer = visit.get()
    assert answer.body == PAGE
    return answer.steered


def _settings(debian: Machine, options: str) -> None:
    debian.write(SETTINGS, f"ACME_ALPN_PROXY_OPTIONS={options}\n")


def test_units_are_sound(debian: Machine) -> None:
    """systemd has nothing against the unit and the examples."""
    examples = "/usr/share/doc/acme-alpn-proxy/examples"
    for program in ("/root/.acme.sh/acme.sh", "/usr/bin/lego", "/usr/bin/certbot"):
        debian.write(program, "#!/bin/sh\n", "755")
    debian.write("/etc/systemd/system/certbot.service", "[Service]\nExecStart=/usr/bin/certbot\n")
    copy = f"cp -r {examples}/* /etc/systemd/system"
    debian.run("sh", "-c", copy)
    names = debian.run("sh", "-c", f"cd {examples}; echo *.service *.timer").stdout.split()
    assert len(names) == 4
    verify = ("systemd-analyze", "--recursive-errors=no", "--man=yes", "verify")
    for name in (SERVICE, "certbot.service", *names):
        assert debian.run(*verify, name).stdout == "", name


@pytest.mark.parametrize("redirect", ["sk-lookup", "iptables"])
def test_service(road: Street, site: Website, debian: Machine, redirect: str) -> None:
    """By either redirect: start returns when it steers, stop when the last visitor has left."""
    _settings(debian, f"--redirect {redirect} {' '.join(AT_ONCE)}")
    debian.run("systemctl", "start", SERVICE)
    assert _shown(debian, "StatusText") == "Started: new connections to :443 are steered here"
    pid = debian.run("cat", "/run/acme-alpn-proxy.pid").stdout.strip()
    assert _shown(debian, "MainPID") == pid
    assert bool(road.host.namespace.rules()) == (redirect == "iptables")
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        debian.run("systemctl", "stop", "--no-block", SERVICE)
        status = "Draining 1 live connections"
        wait_until(lambda: _shown(debian, "StatusText") == status, "it drains")
        assert _shown(debian, "ActiveState") == "deactivating"
        assert visit.get().steered
    debian.run("systemctl", "stop", SERVICE)
    assert _shown(debian, "Result") == "success"
    assert not _steers(road, site)
    assert road.host.namespace.rules() == []


def test_without_settings(road: Street, site: Website, debian: Machine) -> None:
    """Just installed, it starts, and takes the redirect that leaves no rule where it can."""
    debian.run("systemctl", "start", SERVICE)
    assert _steers(road, site)
    assert road.host.namespace.rules() == []


def test_killed(road: Street, site: Website, debian: Machine) -> None:
    """Killed with all its processes, guard and all, it leaves no rule: visitors are served."""
    _settings(debian, "--redirect iptables")
    debian.run("systemctl", "start", SERVICE)
    assert road.host.namespace.rules() != []
    debian.run("systemctl", "kill", "--signal=KILL", SERVICE)
    wait_until(lambda: _shown(debian, "ActiveState") == "failed", "it has ended")
    assert _shown(debian, "Result") == "signal"
    assert road.host.namespace.rules() == []
    assert not _steers(road, site)


def test_another_instance(road: Street, site: Website, debian: Machine) -> None:
    """While a hook's instance runs the service does not start, and leaves that one alone."""
    debian.run("acme-alpn-proxy", "start")
    done = debian.run("systemctl", "start", SERVICE, check=False)
    assert done.returncode != 0
    log = debian.run("journalctl", "--unit", SERVICE).stdout
    assert re.search(r"already running as PID \d+", log)
    assert _steers(road, site)


def test_certbot_example(road: Street, site: Website, debian: Machine) -> None:
    """With the drop-in the proxy steers while certbot runs, and no longer."""
    certbot = "#!/bin/sh\nsystemctl is-active acme-alpn-proxy >/was-active\n"
    debian.write("/usr/bin/certbot", certbot, "755")
    unit = "[Service]\nType=oneshot\nExecStart=/usr/bin/certbot\n"
    debian.write("/etc/systemd/system/certbot.service", unit)
    drop_in = "/usr/share/doc/acme-alpn-proxy/examples/certbot.service.d"
    debian.run("cp", "-r", drop_in, "/etc/systemd/system")
    _settings(debian, " ".join(AT_ONCE))
    debian.run("systemctl", "daemon-reload")
    debian.run("systemctl", "start", "certbot.service")
    assert debian.run("cat", "/was-active").stdout == "active\n"
    wait_until(lambda: _shown(debian, "ActiveState") == "inactive", "the proxy has ended")
    assert not _steers(road, site)
