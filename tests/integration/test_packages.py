"""The packages, on machines without the source: the one-file program, and Debian's package."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from acme_alpn_proxy import __version__

from .acme import pebble
from .certbot import ORDER, Certbot
from .machine import Machine, machine
from .netns import Namespace, Street, wait_until
from .packages import ROOT, install, install_certbot
from .proxy import AT_ONCE, Proxy, ends
from .visitors import visitors
from .website import NAME, Website, steers

AFTERWARDS = 4.0
"""Seconds after the end of steering within which certbot ends, if no visitor is live."""

# The one-file program


@pytest.fixture
def one_file(proxy: Proxy, dist: Path, tmp_path: Path) -> Proxy:
    """The one-file program with Debian's Python, and an environment of little more than HOME."""
    path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
    pid_file = f"ACME_ALPN_PROXY_PIDFILE={proxy.pid_file}"
    proxy.wrapper = ("env", "-i", path, f"HOME={tmp_path}", pid_file)
    proxy.program = dist / "acme-alpn-proxy.pyz"
    return proxy


def test_one_file(road: Street, site: Website, one_file: Proxy) -> None:
    """The one-file program shows its help, starts, steers, and stops."""
    assert one_file.run("--help").stdout.startswith("Usage: acme-alpn-proxy")
    one_file.start(*AT_ONCE)
    assert steers(road, site)
    one_file.stop(wait=True)
    assert not steers(road, site)
    assert one_file.namespace.rules() == []
    assert ends(one_file.pid, 0)


def test_one_file_uses_nothing_of_the_machine(one_file: Proxy, tmp_path: Path) -> None:
    """The one-file program does not use Python packages of the machine, which may be of any age,
    nor those that Python has loaded already when the program starts."""
    script = "import site; print(site.getusersitepackages())"
    home = one_file.namespace.run(*one_file.wrapper, "python3", "-c", script).stdout.strip()
    package = Path(home, "zope")
    package.mkdir(parents=True)
    (package / "interface.py").write_text("raise SystemExit('the wrong one')")
    Path(home, "zope.pth").write_text(
        f"import sys, types; sys.modules['zope'] = types.ModuleType('zope');"
        f" sys.modules['zope'].__path__ = ['{package}']\n"
    )
    others = tmp_path / "lib" / "dist-packages"
    (others / "twisted").mkdir(parents=True)
    (others / "twisted" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    one_file.wrapper += (f"PYTHONPATH={others}",)
    assert one_file.run("--version").stdout == f"acme-alpn-proxy {__version__}\n"


def test_one_file_and_an_old_python(one_file: Proxy, tmp_path: Path) -> None:
    """With a Python that is too old, the program prints one line, with the remedy."""
    old = tmp_path / "old.py"
    old.write_text(
        "import runpy, sys; sys.version_info = (3, 9, 2); sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = one_file.namespace.run(
        *one_file.wrapper, "python3", old, one_file.program, "--version", check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "acme-alpn-proxy: this is Python 3.9, but 3.11 or newer is needed;"
    )
    assert done.stderr.count("\n") == 1


# The Debian package

ACCOUNTS = {"etc/.pwd.lock"} | {
    f"etc/{name}{backup}"
    for name in ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")
    for backup in ("", "-")
}
"""The files of user accounts: the package adds a user to them."""

PLUGINS = "usr/lib/python3/dist-packages/twisted/plugins/dropin.cache"
"""Debian's list of Twisted's plugins: a trigger of python3-twisted keeps it."""


@pytest.fixture
def host(road: Street) -> Namespace:
    return road.host.namespace


@pytest.fixture
def debian(host: Namespace, tmp_path: Path) -> Iterator[Machine]:
    """A machine without the package."""
    with machine(host, tmp_path / "machine") as booted:
        yield booted


def test_lintian(dist: Path) -> None:
    """Debian's checker of packages finds no error in ours, and has no warning."""
    (deb,) = dist.glob("*.deb")
    command = ("lintian", "--allow-root", "--pedantic", deb)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_installed(debian: Machine, dist: Path) -> None:
    """After the installation both programs, the man pages and the completions are there, and the
    package names its maintainer."""
    install(debian, dist)
    told = debian.run("dpkg-query", "-W", "-f", "${Maintainer}", "acme-alpn-proxy").stdout
    (author,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["authors"]
    assert re.fullmatch(rf"{author['name']} <\S+@\S+>", told)
    assert debian.run("acme-alpn-proxy", "--version").stdout == f"acme-alpn-proxy {__version__}\n"
    assert (
        "TYPE IDENT TOKEN AUTH" in debian.run("acme-alpn-proxy-hook", "begin", check=False).stdout
    )
    assert "Get TLS certificates" in debian.run("twistd3", "--help").stdout
    for page in ("acme-alpn-proxy", "acme-alpn-proxy-hook"):
        assert "--fallback=ADDRESS" in debian.run("man", page).stdout
    complete = "source /usr/share/bash-completion/completions/acme-alpn-proxy; complete -p"
    assert "_acme_alpn_proxy acme-alpn-proxy" in debian.run("bash", "-c", complete).stdout
    assert debian.run("dpkg", "--verify", "acme-alpn-proxy").stdout == ""
    user = debian.run("getent", "passwd", "acme-alpn-proxy").stdout
    assert user.rstrip().endswith(":/nonexistent:/usr/sbin/nologin")


def test_pages(debian: Machine, dist: Path) -> None:
    """The pages and the examples are in the package, and the links between them work as in the
    source."""
    install(debian, dist)
    place = "/usr/share/doc/acme-alpn-proxy"
    found = debian.run("find", place, "-type", "f", "-printf", r"%P\n").stdout.splitlines()
    pages = [Path(name) for name in found if name.endswith(".md")]
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= {*map(str, pages)}
    missing = set()
    for page in pages:
        links = re.findall(r"\]\(([^):#]+)[)#]", (ROOT / page).read_text())
        missing |= {os.path.normpath(page.parent / link) for link in links} - {*found}
    # The licence has the name that Debian gives it, and the rest is about changing the source.
    assert missing <= {"LICENSE"}, missing


def test_upgrade(road: Street, site: Website, debian: Machine, dist: Path, tmp_path: Path) -> None:
    """An upgrade leaves a running proxy alone, and the settings as the operator has them."""
    install(debian, dist)
    debian.write("/etc/default/acme-alpn-proxy", "ACME_ALPN_PROXY_DISABLEV6=y\n")
    debian.run("acme-alpn-proxy", *AT_ONCE, "start")
    (deb,) = dist.glob("*.deb")
    newer = tmp_path / "newer"
    subprocess.run(["dpkg-deb", "--raw-extract", deb, newer], check=True)
    control = newer / "DEBIAN" / "control"
    control.write_text(control.read_text().replace(f"Version: {__version__}", "Version: 99"))
    subprocess.run(["dpkg-deb", "--build", newer], check=True, stdout=subprocess.DEVNULL)
    debian.run("dpkg", "--install", debian.copied(tmp_path / "newer.deb"))
    assert debian.run("dpkg-query", "-W", "-f", "${Version}", "acme-alpn-proxy").stdout == "99"
    settings = debian.run("cat", "/etc/default/acme-alpn-proxy").stdout
    assert settings == "ACME_ALPN_PROXY_DISABLEV6=y\n"
    assert steers(road, site)
    debian.run("acme-alpn-proxy", "stop", "--wait")
    assert not steers(road, site)


def test_removed(road: Street, site: Website, debian: Machine, dist: Path) -> None:
    """If the package is purged while the proxy steers, only its user is left: no rule, no process
    and no file."""
    before, processes = debian.changed(), set(road.host.namespace.pids())
    install(debian, dist)
    debian.run("twistd3", "--help")
    debian.run("acme-alpn-proxy", *AT_ONCE, "start")
    assert steers(road, site)
    assert debian.changed() > before
    debian.run("dpkg", "--purge", "acme-alpn-proxy")
    assert not steers(road, site)
    assert road.host.namespace.rules() == []
    assert set(road.host.namespace.pids()) == processes
    assert debian.changed() - before <= ACCOUNTS | {PLUGINS}
    assert before <= debian.changed()
    assert debian.run("grep", "-c", "acme", f"/{PLUGINS}", check=False).stdout == "0\n"
    assert debian.run("ls", "/run/acme-alpn-proxy.pid", check=False).returncode != 0


@pytest.fixture
def certbot(road: Street, debian: Machine, dist: Path, tmp_path: Path) -> Iterator[Certbot]:
    """Debian's certbot, which finds the plugin in our package."""
    install(debian, dist)
    install_certbot(debian)

    def run(*words: str) -> tuple[str, int]:
        done = debian.run(*words, check=False)
        return done.stdout, done.returncode

    with pebble(road.visitor, road.host, tmp_path / "ca") as ca:
        debian.write("/etc/ssl/certs/ca-certificates.crt", ca.authority.certificate.read_text())
        yield Certbot(
            road.host.namespace, ca, run, lambda path: debian.run("sh", "-c", f"cat {path}").stdout
        )


def test_certbot(road: Street, site: Website, debian: Machine, certbot: Certbot) -> None:
    """Debian's certbot orders a certificate for two names, and the service of its timer renews it.
    If the CA cannot reach the proxy, an order fails, and certbot shows what this host has seen.
    After each order no visitor is steered; every visitor is served."""
    www = f"www.{NAME}"
    with visitors(site, road.visitor, road.host) as crowd:
        certbot.order("-d", NAME, "-d", www)
        assert not steers(road, site)
        first = certbot.brought(NAME)
        debian.run("systemctl", "start", "certbot.service")
        assert not steers(road, site)
        second = certbot.brought(NAME)
        said = certbot.fails(*ORDER, "-d", www, "--alpn-proxy-options=--redirect none")
        report = crowd.leave()
    assert first.names == second.names == [NAME, www]
    assert first.certificate.serial_number != second.certificate.serial_number
    assert second.challenges == ["tls-alpn-01"] * 4
    assert "The Certificate Authority reported these problems" in said
    assert f"{www}: no validation arrived." in said
    assert report.failed == 0, report
    assert report.steered > 0
    assert road.host.namespace.rules() == []


def test_certbot_service(road: Street, site: Website, debian: Machine, certbot: Certbot) -> None:
    """When certbot ends, systemd ends all processes of its service; so the service of certbot's
    timer waits while the proxy that the plugin has started serves a visitor."""
    certbot.order("-d", NAME)
    debian.run("systemctl", "start", "--no-block", "certbot.service")
    wait_until(lambda: steers(road, site), "it steers", 30)
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        wait_until(lambda: not steers(road, site), "it has let go", 30)
        with pytest.raises(TimeoutError):
            wait_until(lambda: _state(debian) != "activating", "it ends too early", AFTERWARDS)
        assert visit.get().steered
    wait_until(lambda: _state(debian) == "inactive", "the service has ended", 30)


def _state(debian: Machine) -> str:
    shown = debian.run("systemctl", "show", "--property=ActiveState", "--value", "certbot.service")
    return shown.stdout.strip()
