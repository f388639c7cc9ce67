"""C{run -- COMMAND}: what the command sees, what its caller gets, and what is left."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cryptography import x509

from .acme import EMAIL, LEGO_SECONDS, RESPONDER, pebble
from .netns import Namespace, Street, ended, pidfd, ready, wait_until
from .proxy import AT_ONCE, PORT, Proxy, kill
from .website import Website, steers


@pytest.fixture
def host(road: Street) -> Namespace:
    return road.host.namespace


def _words(proxy: Proxy, *words: str) -> list[str]:
    return ["run", *AT_ONCE, "--logfile", str(proxy.log_file), *words]


def _run(proxy: Proxy, *words: str) -> subprocess.CompletedProcess[str]:
    return proxy.run(*_words(proxy, *words), check=False)


def _running(
    proxy: Proxy, *words: str, end: str = "exit 7"
) -> AbstractContextManager[subprocess.Popen[str]]:
    """A C{run} whose command has begun; it ends as specified when a line is written to it."""
    process = subprocess.Popen(
        proxy.namespace.argv(
            proxy.program, *_words(proxy, *words, "--", "sh", "-c", f"echo ready; read line; {end}")
        ),
        env={**os.environ, **proxy.env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return ready(process)


def _go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.read()


def _nothing_is_left(proxy: Proxy) -> None:
    assert not [rule for rule in proxy.namespace.rules() if " nat " in rule]
    assert not proxy.pid_file.exists()
    wait_until(lambda: "Stopped: all connections have ended" in proxy.log, "the proxy has ended")
    assert proxy.namespace.rules() == []


def test_steers_while_the_command_runs(road: Street, site: Website, proxy: Proxy) -> None:
    """Visitors are steered from before the command begins until it has ended, and not afterwards.
    The exit status is the command's."""
    with _running(proxy) as process:
        assert steers(road, site)
        _go_on(process)
        assert process.wait(20) == 7
        assert _said(process) == ""
        assert not steers(road, site)
    _nothing_is_left(proxy)


def test_what_the_command_gets(proxy: Proxy) -> None:
    """The command gets the caller's environment, and variables with the address at which to answer
    the CA, also the one that lego 5 reads."""
    proxy.env["MINE"] = "yes"
    done = _run(proxy, "-alpn", "[::1]:5001", "--", "env")
    assert done.returncode == 0
    told = {f"{name}=[::1]:5001" for name in ("ACME_ALPN_PROXY_TARGET", "LEGO_TLS_ADDRESS")}
    assert {*told, "MINE=yes"} <= set(done.stdout.splitlines())
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "status", "why"),
    [
        ("no-such-command", 127, "no-such-command: command not found; name one that is on PATH"),
        (
            "/etc/passwd",
            126,
            "cannot run /etc/passwd: Permission denied; name a program that may be executed",
        ),
    ],
)
def test_no_command(proxy: Proxy, command: str, status: int, why: str) -> None:
    """If the command cannot be run, one line names it, and the proxy stops steering."""
    done = _run(proxy, "--", command)
    assert (done.returncode, done.stderr) == (status, f"acme-alpn-proxy: {why}\n")
    _nothing_is_left(proxy)


def test_command_ended_by_a_signal(proxy: Proxy) -> None:
    """A command that a signal ends gives 128 and its number; the proxy has stopped steering."""
    assert _run(proxy, "--", "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL
    _nothing_is_left(proxy)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_the_commands(proxy: Proxy, number: signal.Signals) -> None:
    """A signal to C{run} ends the command, and the proxy stops in order."""
    with _running(proxy) as process:
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert _said(process) == ""
    _nothing_is_left(proxy)


def test_killed(proxy: Proxy) -> None:
    """Even if C{run} is killed with SIGKILL, the proxy stops in order, by itself."""
    with _running(proxy) as process:
        daemon = int(proxy.pid_file.read_text())
        with pidfd(daemon) as descriptor:
            process.kill()
            assert ended(descriptor, 20)
    assert "Stopping: 'run' has ended" in proxy.log
    assert "Stopped: all connections have ended" in proxy.log
    assert proxy.namespace.rules() == []


def test_proxy_killed(proxy: Proxy) -> None:
    """If the proxy is killed in the meantime, C{run} says so when the command has ended."""
    with _running(proxy) as process:
        proxy.pid = int(proxy.pid_file.read_text())
        kill(proxy.guard)
        proxy.kill()
        _go_on(process)
        assert process.wait(20) == 7
        assert re.fullmatch(
            "acme-alpn-proxy: the proxy ended before the command, .*; see .*\n", _said(process)
        )
    assert proxy.namespace.rules() == []


def test_running_already(road: Street, site: Website, proxy: Proxy) -> None:
    """If an instance already runs, the command is not run, except with --shared."""
    proxy.start(*AT_ONCE)
    done = _run(proxy, "--", "echo", "done")
    assert (done.returncode, done.stdout) == (75, "")
    assert re.fullmatch(
        rf"acme-alpn-proxy: already running as PID {proxy.pid} \(.*\); .* add --shared, .*\n",
        done.stderr,
    )
    done = _run(proxy, "--shared", "--", "echo", "done")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert steers(road, site)
    assert int(proxy.pid_file.read_text()) == proxy.pid
    proxy.stop(wait=True)


def test_cannot_start(proxy: Proxy) -> None:
    """If the proxy cannot start, one line says why, and the command is not run."""
    with proxy.namespace.listen("127.0.0.1", PORT):
        done = _run(proxy, "--", "echo", "done")
    assert (done.returncode, done.stdout) == (os.EX_UNAVAILABLE, "")
    assert re.fullmatch(f"acme-alpn-proxy: port {PORT} is taken by .*\n", done.stderr)
    assert not proxy.pid_file.exists()


@pytest.mark.parametrize("wait", [(), ("--wait",)])
def test_visitors_go_on(road: Street, site: Website, proxy: Proxy, wait: tuple[str, ...]) -> None:
    """A visitor who is there when the command ends is still served; C{run} waits only with
    --wait."""
    with _running(proxy, *wait) as process, pidfd(process.pid) as descriptor:
        with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
            assert visit.get().steered
            _go_on(process)
            wait_until(lambda: "Waiting for 1 open connection" in proxy.log, "it drains")
            assert ended(descriptor, 0.3 if wait else 20) is not bool(wait)
            assert visit.get().steered
        assert process.wait(20) == 7
    _nothing_is_left(proxy)


def test_from_nothing_to_a_certificate(
    road: Street, site: Website, proxy: Proxy, tmp_path: Path
) -> None:
    """One command line takes a host from nothing to a certificate, and leaves nothing."""
    name = "site.example"
    with pebble(road.visitor, road.host, tmp_path / "pebble") as ca:
        lego = ["lego", "--server", ca.directory_url, "--email", EMAIL, "--accept-tos", "--tls"]
        lego += ["--path", str(tmp_path / "lego"), "--domains", name, "--tls.port"]
        line = f'exec {shlex.join(lego)} "$ACME_ALPN_PROXY_TARGET" run'
        done = proxy.namespace.run(
            proxy.program,
            *_words(proxy, "--", "sh", "-c", line),
            env={**proxy.env, "LEGO_CA_CERTIFICATES": str(ca.authority.certificate)},
            timeout=LEGO_SECONDS,
        )
    chain = (tmp_path / "lego" / "certificates" / f"{name}.crt").read_bytes()
    names = x509.load_pem_x509_certificates(chain)[0].extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == [name], done
    assert f"to acme target {RESPONDER}" in proxy.log
    _nothing_is_left(proxy)
