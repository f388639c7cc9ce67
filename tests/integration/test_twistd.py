"""The proxy run with plain twistd, as a part of an application, and added to a running one."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .fakes import FakeIptables
from .netns import Namespace, Street, ended, pidfd, terminate, wait_until
from .proxy import PORT
from .website import PAGE, Website

TWISTD = Path(sys.executable).parent / "twistd"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "existing_application.tac"
SUBCOMMAND = ("acme-alpn-proxy", "--linger", "0")
STARTED = "Started: the proxy receives new connections to port 443"

SLOW_SECONDS = 1.0
RUNNING_APPLICATION = """
import sys
from twisted.application.service import MultiService
from twisted.internet import task, threads
from twisted.internet.defer import Deferred
from acme_alpn_proxy.tap import Options, makeService

application = MultiService()

def added():
    options = Options()
    options.parseOptions(["--linger", "0"])
    proxy = makeService(options)
    proxy.setServiceParent(application)
    return proxy

async def run(reactor):
    ticks = [reactor.seconds()]
    task.LoopingCall(lambda: ticks.append(reactor.seconds())).start(0.01)
    application.startService()
    await task.deferLater(reactor, 0.05)  # it runs by then
    proxy = added()
    try:
        await proxy.when_started()
    except Exception as problem:
        print(type(problem).__name__, flush=True)
    await proxy.disownServiceParent()
    print(max(after - before for before, after in zip(ticks, ticks[1:])), flush=True)
    proxy = added()
    await proxy.when_started()
    print("started", flush=True)
    await threads.deferToThread(sys.stdin.readline)
    await proxy.disownServiceParent()
    print("stopped", flush=True)
    await threads.deferToThread(sys.stdin.readline)

task.react(lambda reactor: Deferred.fromCoroutine(run(reactor)))
"""


@pytest.fixture
def host(road: Street) -> Namespace:
    return road.host.namespace


def _nothing_is_left(host: Namespace) -> None:
    assert host.rules() == []
    assert not host.accepts("127.0.0.1", PORT)


def _steers(road: Street, site: Website) -> None:
    with site.visit(road.visitor.namespace, road.host.ipv6) as visit:
        answer = visit.get()
    assert (answer.body, answer.steered) == (PAGE, True)


def test_daemon(road: Street, site: Website, host: Namespace, tmp_path: Path) -> None:
    """Plain twistd returns 0 once visitors are steered; its PID file names the process to stop."""
    pid_file, log = tmp_path / "twistd.pid", tmp_path / "twistd.log"
    host.run(TWISTD, f"--pidfile={pid_file}", f"--logfile={log}", *SUBCOMMAND)
    _steers(road, site)
    with pidfd(int(pid_file.read_text())) as descriptor:
        host.run("sh", "-c", f"kill $(cat {pid_file})")
        assert ended(descriptor, 10)
    assert not pid_file.exists()
    assert STARTED in log.read_text()
    _nothing_is_left(host)


def test_foreground_refusal(host: Namespace) -> None:
    """With C{-n} a refused start prints one line on stderr and no traceback, and has the exit
    status of its reason."""
    with host.listen("::", 443), host.listen("127.0.0.1", PORT):
        refused = host.run(TWISTD, "-n", "--pidfile=", *SUBCOMMAND, check=False)
    assert refused.returncode == os.EX_UNAVAILABLE
    assert re.fullmatch(
        rf"acme-alpn-proxy: port {PORT} is taken by another program; [^\n]*\n", refused.stderr
    )
    assert "Traceback" not in refused.stdout
    _nothing_is_left(host)


def test_daemon_refusal(host: Namespace, tmp_path: Path) -> None:
    """In the background a refused start has exit status 1; a part of its reason is on stderr, and
    all of it in the log."""
    pid_file, log = tmp_path / "twistd.pid", tmp_path / "twistd.log"
    with host.listen("::", 443), host.listen("127.0.0.1", PORT):
        refused = host.run(
            *(TWISTD, f"--pidfile={pid_file}", f"--logfile={log}", *SUBCOMMAND), check=False
        )
    assert refused.returncode == 1
    assert f"port {PORT} is taken" in refused.stderr
    assert "Cannot start: port 21443 is taken by another program; stop that" in log.read_text()
    wait_until(lambda: host.pids() == [], "it has ended")
    assert not pid_file.exists()
    _nothing_is_left(host)


def test_wrong_usage(host: Namespace) -> None:
    """Wrong options are refused before anything is done."""
    # The exit status depends on twistd: 0 with Twisted 22.4, 1 with later versions.
    refused = host.run(TWISTD, "-n", *SUBCOMMAND, "--redirect", "magic", check=False)
    assert "--redirect 'magic': choose one of" in refused.stdout
    _nothing_is_left(host)


def test_help(host: Namespace) -> None:
    """C{twistd --help} lists the plugin, and the plugin's C{--help} lists its options."""
    listed = host.run(TWISTD, "--help").stdout
    assert re.search(r"^ +acme-alpn-proxy +Get TLS certificates by TLS-ALPN-01", listed, re.M)
    assert "--fallback" in host.run(TWISTD, "acme-alpn-proxy", "--help").stdout


def test_example(road: Street, site: Website, host: Namespace, tmp_path: Path) -> None:
    """C{twistd -ny} runs the example of an application: its own service and the proxy."""
    log = tmp_path / "example.log"
    process = host.popen(TWISTD, "-ny", EXAMPLE, "--pidfile=", log=log)
    try:
        wait_until(lambda: STARTED in log.read_text(), "the example has started")
        _steers(road, site)
        assert _status_page(host) == b"all is well\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == -signal.SIGTERM, "twistd ends as its signal would have had it"
    finally:
        terminate(process)
    _nothing_is_left(host)


def _status_page(host: Namespace) -> bytes:
    client = http.client.HTTPConnection("127.0.0.1", 8080)
    client.sock = host.connect("127.0.0.1", 8080)
    try:
        client.request("GET", "/")
        return client.getresponse().read()
    finally:
        client.close()


def test_added_to_a_running_application(
    road: Street, site: Website, host: Namespace, tmp_path: Path
) -> None:
    """A proxy that is added to a running application does not block it, reports whether it has
    started, and can be stopped."""
    fake = FakeIptables(tmp_path / "fake")
    fake.instead(f"sleep {SLOW_SECONDS}; echo no; exit 4")
    fake.reset(failing=2)  # the first call only asks for the version
    process = subprocess.Popen(
        host.argv(sys.executable, "-c", RUNNING_APPLICATION),
        env={**os.environ, "PATH": fake.path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "StartError\n"
        longest_gap = float(process.stdout.readline())
        assert longest_gap < SLOW_SECONDS / 2, "the slow command blocked the application"
        assert process.stdout.readline() == "started\n"
        _steers(road, site)
        process.stdin.write("stop\n")
        process.stdin.flush()
        assert process.stdout.readline() == "stopped\n"
        assert process.poll() is None
        _nothing_is_left(host)
        process.stdin.write("end\n")
        process.stdin.flush()
        assert process.wait(10) == 0
    finally:
        terminate(process)
