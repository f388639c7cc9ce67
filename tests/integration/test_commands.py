"""The commands as an operator and a hook see them: exit status, stderr, and what is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .fakes import FakeIptables
from .netns import Namespace, Street, ended, pidfd, terminate, wait_until
from .proxy import AT_ONCE, NOBODY_WHO_MAY_WRITE, PORT, Proxy, ends
from .warm import Done, WarmProxy, warm_proxy
from .website import PAGE, Visit, Website

CALLS_BEFORE_THE_FIRST_RULE = 5
"""Commands of iptables: one that asks for its version, which may fail, and two listings for each
family."""
CALLS_UNTIL_THE_LAST_RULE = 9
"""The same, and those that make the keepers and the redirects."""
CALLS_OF_A_START = 11
"""The same, and two that check whether the redirects come first; these may fail, as the check is
repeated."""
MOMENTS = 20
IGNORED = (signal.SIGHUP, signal.SIGUSR2, signal.SIGPIPE)
REDIRECTS_AND_KEEPERS = 4
LOG_LINE = r"(?:\d{4}-\d\d-\d\dT[^\n]*\n)"


@pytest.fixture
def host(road: Street) -> Namespace:
    return road.host.namespace


@pytest.fixture
def warm(host: Namespace, proxy: Proxy) -> Iterator[WarmProxy]:
    """Runs commands faster, for tests with many starts."""
    with warm_proxy(host.argv(), proxy.env) as running:
        yield running


@pytest.fixture
def fake(proxy: Proxy, tmp_path: Path) -> FakeIptables:
    made = FakeIptables(tmp_path / "fake")
    proxy.env["PATH"] = made.path
    return made


def _nothing_is_left(proxy: Proxy) -> None:
    """No rule, no listener, no PID file of a living instance."""
    assert proxy.namespace.rules() == []
    assert not proxy.namespace.accepts("127.0.0.1", PORT)
    assert not proxy.pid_file.exists()


def _refused(done: Done, pattern: str, status: int) -> None:
    """Assert that the command failed and printed one line with C{pattern}: cause, then remedy."""
    assert done.returncode == status, done
    assert done.stdout == ""
    log = LOG_LINE + "*" if "-n" in done.args else ""
    assert re.fullmatch(rf"{log}acme-alpn-proxy: .*{pattern}.*\n", done.stderr), done.stderr


def _said(done: Done, pattern: str = "") -> None:
    """Assert that the command succeeded and printed one line with C{pattern}, or nothing."""
    assert done.returncode == 0, done
    assert re.fullmatch(rf"acme-alpn-proxy: {pattern}\n" if pattern else "", done.stderr), done


def _send(pid: int, *numbers: int) -> None:
    with pidfd(pid) as descriptor:
        for number in numbers:
            signal.pidfd_send_signal(descriptor, number)


def _steers(road: Street, site: Website) -> None:
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        answer = visit.get()
    assert (answer.body, answer.steered) == (PAGE, True)


def _was_reset(visit: Visit) -> None:
    """Read below TLS: Python's TLS cannot tell a reset from an end."""
    with socket.socket(fileno=os.dup(visit.sock.fileno())) as connection:
        connection.settimeout(5)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


# Exit status and PID file


def test_start_returns_once_steered(road: Street, site: Website, proxy: Proxy) -> None:
    """C{start} says nothing and exits 0, and the very next visitor is steered."""
    _said(proxy.start(*AT_ONCE))
    _steers(road, site)
    assert len(proxy.namespace.rules()) == REDIRECTS_AND_KEEPERS


def test_start_when_running(road: Street, site: Website, proxy: Proxy) -> None:
    """A second C{start} says that it runs already and exits 0; the first goes on untouched."""
    proxy.start(*AT_ONCE)
    first, rules = proxy.pid, proxy.namespace.rules()
    path = re.escape(str(proxy.pid_file))
    _said(proxy.start(*AT_ONCE), rf"already running as PID {first} \({path}\)")
    _said(proxy.start(*AT_ONCE, "-n"), rf"already running as PID {first} \({path}\)")
    assert (proxy.pid, proxy.namespace.rules()) == (first, rules)
    _steers(road, site)
    proxy.run("stop", "--wait")
    _nothing_is_left(proxy)


def test_two_starts_at_once(proxy: Proxy) -> None:
    """Of several C{start}s at the same time one wins, and all exit 0."""
    line = proxy.start_line(*AT_ONCE)
    racing = f"{line} & a=$!; {line} & b=$!; {line} & c=$!; wait $a && wait $b && wait $c"
    done = proxy.namespace.run("sh", "-c", racing, env=proxy.env)
    running = {int(proxy.pid_file.read_text()), proxy.guard, proxy.sweeper}
    assert set(proxy.namespace.pids()) == running
    assert done.stderr.count("already running as PID") == done.stderr.count("\n") == 2, done.stderr
    assert len(proxy.namespace.rules()) == REDIRECTS_AND_KEEPERS
    proxy.stop(wait=True)
    _nothing_is_left(proxy)


def test_stop_when_not_running(proxy: Proxy) -> None:
    """C{stop} where nothing runs says so and exits 0."""
    _said(proxy.run("stop"), "no instance runs")
    _said(proxy.run("stop", "--wait"), "no instance runs")


def test_stop_returns_when_it_has_let_go(road: Street, site: Website, proxy: Proxy) -> None:
    """C{stop} returns once the redirect and the PID file are gone, without waiting for visitors."""
    proxy.start(*AT_ONCE)
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        _said(proxy.run("stop"))
        assert not proxy.pid_file.exists()
        assert not any(" nat " in rule for rule in proxy.namespace.rules())
        assert visit.get().steered


def test_stop_wait_returns_when_drained(road: Street, site: Website, proxy: Proxy) -> None:
    """C{stop --wait} returns only when the last visitor has left; then the process is gone."""
    proxy.start(*AT_ONCE)
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        stop = proxy.namespace.popen(
            proxy.program, "stop", "--wait", log=proxy.log_file, env=proxy.env
        )
        with pidfd(stop.pid) as descriptor:
            wait_until(lambda: "Waiting for 1 open connection" in proxy.log, "it drains")
            assert not ended(descriptor, 0.2)
            assert visit.get().steered
    assert stop.wait(10) == 0
    assert ends(proxy.pid, 0)
    _nothing_is_left(proxy)


@pytest.mark.parametrize("content", ["", "garbage\n", "99999999\n", "-1\n", "{other}\n"])
def test_pid_file_that_means_nothing(
    host: Namespace, proxy: Proxy, warm: WarmProxy, tmp_path: Path, content: str
) -> None:
    """A PID file that is empty, stale, full of garbage, or has another program's PID does no
    harm."""
    other = host.popen("sleep", "60", log=tmp_path / "other.log")
    try:
        proxy.pid_file.write_text(content.format(other=other.pid))
        _said(warm.run("stop"), "no instance runs")
        _said(warm.run(*proxy.start_words(*AT_ONCE)))
        assert len(host.rules()) == REDIRECTS_AND_KEEPERS
        assert int(proxy.pid_file.read_text()) in host.pids()
        _said(warm.run("stop", "--wait"))
        _nothing_is_left(proxy)
        assert other.poll() is None, "the other program was ended"
    finally:
        terminate(other)


def test_stop_after_a_kill(proxy: Proxy) -> None:
    """After SIGKILL, also of the guard, C{stop} removes what was left, with and without a PID
    file."""
    proxy.start(*AT_ONCE)
    proxy.kill_with_guard()
    _said(proxy.run("stop"), "no instance runs; removed 4 rules of a killed instance")
    assert proxy.namespace.rules() == []
    _said(proxy.start(*AT_ONCE))
    proxy.stop(wait=True)
    _nothing_is_left(proxy)


# Hooks, descriptors, the foreground


@pytest.mark.parametrize("ampersand", ["", " &"])
def test_hook_is_not_held(host: Namespace, proxy: Proxy, ampersand: str) -> None:
    """A program that waits for the end-of-file of a hook's pipes gets it while the daemon runs."""
    hook = subprocess.Popen(
        host.argv("sh", "-c", f"exec 9>&1; {proxy.start_line(*AT_ONCE)}{ampersand}"),
        env={**os.environ, **proxy.env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert hook.stdin is not None
    assert hook.stdout is not None
    try:
        assert hook.stdout.read() == b""  # returns at the end-of-file
        assert hook.wait(10) == 0
        with pytest.raises(BrokenPipeError):
            os.write(hook.stdin.fileno(), b"is anybody there?")
    finally:
        hook.stdin.close()
        hook.stdout.close()
    daemon = int(proxy.pid_file.read_text())
    standard = [os.readlink(f"/proc/{daemon}/fd/{number}") for number in range(3)]
    assert standard == ["/dev/null"] * 3
    proxy.stop(wait=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_foreground(host: Namespace, proxy: Proxy, tmp_path: Path, number: int) -> None:
    """With C{-n} the proxy stays in the foreground and logs to stderr; SIGTERM and SIGINT end it,
    with status 0."""
    stderr = tmp_path / "stderr"
    process = host.popen(
        proxy.program, *proxy.start_words(*AT_ONCE, "-n"), log=stderr, env=proxy.env
    )
    wait_until(lambda: "Started: the proxy receives" in stderr.read_text(), "it has started")
    assert int(proxy.pid_file.read_text()) == process.pid
    assert len(host.rules()) == REDIRECTS_AND_KEEPERS
    process.send_signal(number)
    assert process.wait(10) == 0
    assert "Stopped: all connections have ended" in stderr.read_text()
    assert proxy.log == ""
    _nothing_is_left(proxy)


@pytest.mark.parametrize("foreground", [[], ["-n"]])
def test_sigint_inherited_as_ignored(
    host: Namespace, proxy: Proxy, tmp_path: Path, foreground: list[str]
) -> None:
    """With C{start &} in a script the proxy inherits SIGINT as ignored; SIGINT still stops it."""
    line = proxy.start_line(*AT_ONCE, *foreground)
    shell = host.popen("sh", "-c", f"{line} & wait $!", log=tmp_path / "shell", env=proxy.env)
    try:
        wait_until(lambda: len(host.rules()) == REDIRECTS_AND_KEEPERS, "it steers")
        pid = int(proxy.pid_file.read_text())
        with pidfd(pid) as descriptor:
            _wait_until_it_runs(proxy, tmp_path / "shell")
            signal.pidfd_send_signal(descriptor, signal.SIGINT)
            assert ended(descriptor, 10)
        assert shell.wait(10) == 0
    finally:
        terminate(shell)
    _nothing_is_left(proxy)


def _wait_until_it_runs(proxy: Proxy, stderr: Path) -> None:
    wait_until(lambda: "Started: " in proxy.log + stderr.read_text(), "it has started")


# Signals


def test_signals_that_do_not_end_it(road: Street, site: Website, proxy: Proxy) -> None:
    """SIGHUP, SIGUSR2 and SIGPIPE change nothing."""
    proxy.start(*AT_ONCE)
    _send(proxy.pid, *IGNORED)
    _steers(road, site)
    assert not ends(proxy.pid, 0)
    proxy.stop(wait=True)
    _nothing_is_left(proxy)


def test_log_file_moved_aside(proxy: Proxy) -> None:
    """After SIGUSR1 the proxy logs to a new file, as logrotate needs it."""
    proxy.start(*AT_ONCE, "--log-format", "json", "--log-level", "info")
    aside = proxy.log_file.rename(proxy.log_file.with_suffix(".1"))
    _send(proxy.pid, signal.SIGUSR1)
    wait_until(proxy.log_file.exists, "there is a new one")
    proxy.stop(wait=True)
    told = [json.loads(line) for line in proxy.log.splitlines()]
    assert "Stopped: all connections have ended" in [event["message"] for event in told]
    assert "Started: the proxy receives" in aside.read_text()
    assert "Stopped: " not in aside.read_text()


def test_second_signal_ends_the_wait(road: Street, site: Website, proxy: Proxy) -> None:
    """A second SIGTERM resets the remaining visitors, and it ends, with its rules removed."""
    proxy.start()
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        proxy.stop()
        assert not ends(proxy.pid, 0.2)
        _send(proxy.pid, signal.SIGTERM)
        assert ends(proxy.pid, 2), "it lingers or drains"
        _was_reset(visit)
    assert "Not waiting any longer" in proxy.log
    _nothing_is_left(proxy)


def test_drain_timeout(road: Street, site: Website, proxy: Proxy) -> None:
    """Visitors that are still there after --drain-timeout are reset, and it ends."""
    proxy.start(*AT_ONCE, "--drain-timeout", "0.3")
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        _said(proxy.run("stop", "--wait"))
        _was_reset(visit)
    _nothing_is_left(proxy)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("hit", ["start", "daemon"])
def test_signal_at_any_moment_of_the_start(
    host: Namespace, proxy: Proxy, warm: WarmProxy, hit: str, number: int
) -> None:
    """If a signal hits C{start} or the daemon at any moment, C{start} ends, and C{stop} leaves
    nothing behind."""
    start = proxy.start_words(*AT_ONCE)
    moments = warm.moments(MOMENTS, *start, hit=hit)
    warm.run("stop", "--wait")
    for moment in moments:
        done = warm.run(*start, hit=hit, number=number, moment=moment)
        when = f"at call {moment}, the last of {moments[-1]}: {done}"
        if hit == "daemon" and done.returncode == 1:
            assert re.fullmatch(r"acme-alpn-proxy: the proxy process ended .*\n", done.stderr), when
            assert host.rules() == [], when
        elif hit == "daemon":
            assert (done.returncode, done.stderr) == (0, ""), when
        else:
            assert done.returncode in (0, -number), when
        assert warm.run("stop", "--wait").returncode == 0, when
        # A daemon whose start was killed notices when it has started, and stops.
        wait_until(lambda: host.pids() == [warm.pid], f"it has ended, hit {when}")
        assert host.rules() == [], when


def test_killed_while_it_runs_iptables(proxy: Proxy, fake: FakeIptables) -> None:
    """If the guard is killed while the kernel inserts a rule, another guard takes that over."""
    fake.instead("kill -KILL $PPID; sleep 0.2")  # then the real iptables runs
    with warm_proxy(proxy.namespace.argv(), proxy.env) as warm:
        for call in range(CALLS_BEFORE_THE_FIRST_RULE + 1, CALLS_UNTIL_THE_LAST_RULE + 1):
            fake.reset(failing=call)
            done = warm.run(*proxy.start_words(*AT_ONCE))
            _said(
                done,
                "warning: The guard, which removes the iptables rules, .* starts a new one",
            )
            assert len(proxy.namespace.rules()) == 4
            _said(warm.run("stop", "--wait"))
            assert proxy.namespace.rules() == []
            assert proxy.namespace.pids() == [warm.pid]


# Errors


def test_port_taken(host: Namespace, proxy: Proxy) -> None:
    """If another program has port 21443, C{start} says so, and how to find it."""
    with host.listen("127.0.0.1", PORT) as other:
        done = proxy.start(*AT_ONCE, check=False)
        why = rf"port {PORT} is taken by another program; stop that one \(see: ss .*\)"
        _refused(done, why, os.EX_UNAVAILABLE)
        _refused(proxy.start(*AT_ONCE, "-n", check=False), why, os.EX_UNAVAILABLE)
        assert host.rules() == []
        assert not proxy.pid_file.exists()
        _said(proxy.run("stop"), "no instance runs")
        assert other.getsockname()[1] == PORT
    assert host.pids() == []


@pytest.mark.parametrize("foreground", [[], ["-n"]])
def test_pid_file_in_a_folder_that_is_not_there(
    proxy: Proxy, tmp_path: Path, foreground: list[str]
) -> None:
    """If the PID file cannot be written, C{start} says why, and which variable to set."""
    proxy.env["ACME_ALPN_PROXY_PIDFILE"] = path = str(tmp_path / "missing" / "pid")
    done = proxy.start(*AT_ONCE, *foreground, check=False)
    why = f"cannot write the PID file {path}: No such file.*; .*ACME_ALPN_PROXY_PIDFILE"
    _refused(done, why, os.EX_CANTCREAT)
    _nothing_is_left(proxy)


def test_log_file_not_writable(proxy: Proxy, tmp_path: Path) -> None:
    """If the log cannot be written, C{start} and C{run} say why, and name C{--logfile}."""
    proxy.log_file = tmp_path / "missing" / "log"
    why = f"cannot write the log file {proxy.log_file}: No such file.*; .*--logfile"
    _refused(proxy.start(*AT_ONCE, check=False), why, os.EX_CANTCREAT)
    done = proxy.run("run", "--logfile", str(proxy.log_file), "--", "echo", "ran", check=False)
    _refused(done, why, os.EX_CANTCREAT)
    _nothing_is_left(proxy)


def test_log_file_that_nobody_reads(proxy: Proxy, tmp_path: Path) -> None:
    """C{start} does not wait for a reader of a FIFO in place of the log."""
    proxy.log_file = tmp_path / "fifo"
    os.mkfifo(proxy.log_file)
    _refused(proxy.start(*AT_ONCE, check=False), "cannot write the log file", os.EX_CANTCREAT)
    _nothing_is_left(proxy)


def test_not_root(host: Namespace, proxy: Proxy) -> None:
    """Without root, C{start} and C{stop} say so."""
    command = (*NOBODY_WHO_MAY_WRITE, proxy.program)
    start = host.run(*command, *proxy.start_words(*AT_ONCE), check=False, env=proxy.env)
    why = "failed with status 1: Operation not permitted .*; run this as root"
    _refused(start, why, os.EX_NOPERM)
    _nothing_is_left(proxy)
    stop = host.run(*command, "stop", check=False, env=proxy.env)
    _refused(stop, "run this as root", os.EX_NOPERM)
    proxy.start(*AT_ONCE)
    stop = host.run(*command, "stop", check=False, env=proxy.env)
    _refused(stop, f"no permission to signal PID {proxy.pid}; run this as root", os.EX_NOPERM)
    proxy.stop(wait=True)


@pytest.mark.parametrize(
    ("missing", "words", "pattern"),
    [
        (
            "net_admin",
            [],
            "cannot read the firewall rules: .*; run this as root .*CAP_NET_ADMIN",
        ),
        ("net_admin", ["--force"], "failed with status .*; run this as root .*CAP_NET_ADMIN"),
        ("net_admin", ["--redirect", "sk-lookup"], "; run this as root .*CAP_NET_ADMIN"),
        (
            "setuid",
            ["--uid", "nobody"],
            "no permission to change to another user or group; run this as root",
        ),
        (
            "setgid",
            ["--gid", "nogroup"],
            "no permission to change to another user or group; run this as root",
        ),
    ],
)
@pytest.mark.parametrize("foreground", [[], ["-n"]])
def test_root_who_may_not(
    proxy: Proxy, missing: str, words: list[str], pattern: str, foreground: list[str]
) -> None:
    """If root in a container lacks a capability, the error says what it may not do, and no visitor
    is steered."""
    proxy.wrapper = ("setpriv", f"--bounding-set=-{missing}", f"--inh-caps=-{missing}")
    done = proxy.start(*AT_ONCE, *words, *foreground, check=False)
    _refused(done, pattern, os.EX_NOPERM)
    _nothing_is_left(proxy)


@pytest.mark.parametrize("option", ["--uid", "--gid"])
def test_user_that_is_not_there(proxy: Proxy, option: str) -> None:
    """A user or a group that does not exist, by name or by number, is refused at once."""
    for value in ("no-such", "4294967294"):
        done = proxy.start(*AT_ONCE, option, value, check=False)
        _refused(done, f"{option} '{value}': there is no such .*; list the", os.EX_NOUSER)
    _nothing_is_left(proxy)


@pytest.mark.parametrize("foreground", [[], ["-n"]])
def test_user_of_another_namespace(proxy: Proxy, foreground: list[str]) -> None:
    """In a user namespace where the user does not exist, C{start} fails, and the proxy ends."""
    proxy.wrapper = ("unshare", "--user", "--map-root-user")
    options = ("--redirect", "none", "--uid", "nobody", *foreground)
    _refused(proxy.start(*AT_ONCE, *options, check=False), "no permission to change", os.EX_NOPERM)
    assert proxy.run("status", check=False).stdout == "no instance runs\n"
    wait_until(lambda: proxy.namespace.pids() == [], "it has ended")


@pytest.mark.parametrize("foreground", [[], ["-n"]])
def test_few_descriptors(proxy: Proxy, foreground: list[str]) -> None:
    """With almost no open files allowed, the error says where to look, and no process is left."""
    line = f"ulimit -n 10; exec {proxy.start_line(*AT_ONCE, *foreground)}"
    for redirect in ("none", "sk-lookup"):
        command = f"{line} --redirect {redirect} --force"
        done = proxy.namespace.run("sh", "-c", command, check=False, env=proxy.env)
        assert done.returncode == os.EX_OSERR, done
        last = done.stderr.splitlines()[-1]
        assert re.fullmatch(r"acme-alpn-proxy: .*Too many open files.*; .*ulimit -a.*", last), done
        assert "Traceback" not in done.stderr
    assert proxy.namespace.pids() == []


def test_standard_descriptors_are_closed(proxy: Proxy) -> None:
    """C{start} and C{stop} work with all three standard descriptors closed, as some daemons call
    them."""
    closed = "0<&- 1>&- 2>&-"
    for line in (proxy.start_line(*AT_ONCE), f"{proxy.program} stop --wait --linger 0"):
        proxy.namespace.run("sh", "-c", f"{line} {closed}", env=proxy.env)
        assert bool(proxy.namespace.rules()) == ("start" in line)
    _nothing_is_left(proxy)


def test_iptables_missing(host: Namespace, proxy: Proxy) -> None:
    """If iptables is not on PATH, C{start} says so. By default it takes another redirect."""
    without = ("env", "PATH=/nowhere", proxy.program)
    by_default = proxy.start_words(*AT_ONCE)
    done = host.run(*without, *by_default, env=proxy.env)
    _said(
        done,
        "Steering with nftables: iptables cannot be used, because .*ip6tables: not found on PATH",
    )
    proxy.stop(wait=True)
    words = proxy.start_words(*AT_ONCE, "--redirect", "iptables")
    done = host.run(*without, *words, check=False, env=proxy.env)
    why = "ip6tables: not found on PATH; use .*install ip6tables, .*on PATH"
    _refused(done, why, os.EX_UNAVAILABLE)
    _nothing_is_left(proxy)
    _said(host.run(*without, "stop", env=proxy.env), "no instance runs")


def test_any_iptables_command_fails(proxy: Proxy, fake: FakeIptables) -> None:
    """If any iptables command of a start fails, one line says so, and earlier steps are undone."""
    with warm_proxy(proxy.namespace.argv(), proxy.env) as warm:
        for call in range(2, CALLS_UNTIL_THE_LAST_RULE + 1):
            fake.reset(failing=call)
            done = warm.run(*proxy.start_words(*AT_ONCE))
            why = "tables .*' failed with status 4: iptables: Resource .*; run 'ip"
            _refused(done, why, os.EX_OSERR)
            _nothing_is_left(proxy)
        fake.reset(failing=CALLS_OF_A_START + 1)
        _said(warm.run(*proxy.start_words(*AT_ONCE)))
        wait_until(lambda: fake.calls == CALLS_OF_A_START, "the guard has looked")
        # The first attempt to let go fails; the next does not.
        _said(warm.run("stop", "--wait"))
        _nothing_is_left(proxy)
    assert "the proxy still serves visitors and tries again: 'ip6tables" in proxy.log


def test_ipv6_rule_fails(proxy: Proxy, fake: FakeIptables) -> None:
    """If the IPv6 rules cannot be made, no visitor is steered, and the remedy is named."""
    (fake.directory / "iptables").unlink()
    fake.reset(failing=4)
    done = proxy.start(*AT_ONCE, check=False)
    _refused(done, "'ip6tables .*-I PREROUTING.*ACME_ALPN_PROXY_DISABLEV6=y", os.EX_OSERR)
    _nothing_is_left(proxy)


def test_lock_of_iptables_is_held(host: Namespace, proxy: Proxy, tmp_path: Path) -> None:
    """If another program holds the lock of iptables for long, C{start} says so."""
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    for name in ("iptables", "ip6tables"):
        real = shutil.which(f"{name}-legacy", path=f"{os.environ['PATH']}:/usr/sbin")
        assert real is not None
        (legacy / name).symlink_to(real)
    lock = tmp_path / "lock"
    proxy.env |= {"PATH": f"{legacy}:{os.environ['PATH']}", "XTABLES_LOCKFILE": str(lock)}
    done = host.run("flock", lock, proxy.program, *proxy.start_words(), check=False, env=proxy.env)
    why = "failed with status 4: .*lock.*; another program holds the lock.* try again"
    _refused(done, why, os.EX_TEMPFAIL)
    _nothing_is_left(proxy)


def test_rulespec_that_iptables_refuses(proxy: Proxy) -> None:
    """A rulespec that iptables, or a shell, does not understand is shown, with the variable."""
    proxy.env["ACME_ALPN_PROXY_RULESPEC"] = "-p tcp --dport 443 -j NOSUCH"
    done = proxy.start(*AT_ONCE, check=False)
    why = "failed with status 2: .*NOSUCH.*; .*see whether ACME_ALPN_PROXY_RULESPEC"
    _refused(done, why, os.EX_CONFIG)
    proxy.env["ACME_ALPN_PROXY_RULESPEC"] = "-p tcp 'open"
    done = proxy.start(*AT_ONCE, check=False)
    _refused(done, "ACME_ALPN_PROXY_RULESPEC: .*'open\"; quote as in a shell", os.EX_CONFIG)
    _nothing_is_left(proxy)


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--nosuch", "start"], r"option --nosuch not recognized \(see .*--help\)"),
        (
            ["-fallback", "127.0.0.1:21443", "start"],
            "is the proxy's own port, .*; give the address of",
        ),
        (["-alpn=[::1]:21443", "start"], "is the proxy's own port, .*; give the address of"),
        (["-fallback", "nonsense", "start"], "--fallback 'nonsense'"),
        (["restart"], "one command is needed, start, .* or manual, not 'restart'"),
        ([], "one command is needed, start, stop, run, status, check, explain, hook"),
    ],
)
def test_wrong_usage(proxy: Proxy, warm: WarmProxy, words: list[str], pattern: str) -> None:
    """Wrong usage is one line and exit status 2."""
    _refused(warm.run(*words), pattern, status=2)
    _nothing_is_left(proxy)


# Hosts


def test_ipv6_disabled(road: Street, site: Website, proxy: Proxy) -> None:
    """With ACME_ALPN_PROXY_DISABLEV6=y there is no IPv6 rule, and IPv6 visitors are not steered."""
    proxy.env["ACME_ALPN_PROXY_DISABLEV6"] = "y"
    proxy.start(*AT_ONCE)
    assert [rule.split()[0] for rule in proxy.namespace.rules()] == ["ip", "ip"]
    _steers(road, site)
    with site.visit(road.visitor.namespace, road.host.ipv6) as visit:
        assert not visit.get().steered
    proxy.stop(wait=True)
    _nothing_is_left(proxy)


def test_host_without_ipv6(road: Street, site: Website, proxy: Proxy) -> None:
    """On a host without any IPv6, only IPv4 is steered, and one line of the log says so."""
    proxy.namespace.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    _said(proxy.start(*AT_ONCE))
    assert [rule.split()[0] for rule in proxy.namespace.rules()] == ["ip", "ip"]
    assert proxy.log.count("IPv6") == 1
    _steers(road, site)
    proxy.stop(wait=True)
    _nothing_is_left(proxy)


def test_small_connection_tracking_table(road: Street, proxy: Proxy, tmp_path: Path) -> None:
    """If connection tracking was idle and the host's connections fill half its table, C{start}
    warns."""
    # So that the kernel has connection tracking at all; in the visitor's namespace it is idle.
    road.visitor.namespace.run("iptables", "-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID")
    limit = tmp_path / "limit"
    limit.write_text("8\n")  # the kernel's own is for all namespaces: seen by this process alone
    mount = f"mount --bind {limit} /proc/sys/net/netfilter/nf_conntrack_max"
    with ExitStack() as stack:
        listener = stack.enter_context(proxy.namespace.listen("127.0.0.1", 8443))
        for _ in range(5):
            stack.enter_context(proxy.namespace.connect("127.0.0.1", 8443))
            stack.enter_context(listener.accept()[0])
        line = f"{mount} && {proxy.start_line(*AT_ONCE, '--redirect', 'iptables')}"
        done = proxy.namespace.run("sh", "-c", line, env=proxy.env)
    _said(
        done, r"warning: The redirect has switched on .* \(8 entries\).*; raise .*nf_conntrack_max"
    )
    proxy.stop(wait=True)


def test_web_server_down(road: Street, proxy: Proxy) -> None:
    """Without a web server, C{start} refuses. If the web server goes down later, visitors are
    reset, as from a closed port, and one line says why."""
    start = proxy.start(*AT_ONCE, "--fallback", "127.0.0.1:444", check=False)
    _refused(
        start, "no web server answers at 127.0.0.1:444, .*; start the web server", os.EX_CONFIG
    )
    with road.host.namespace.listen("127.0.0.1", 444):
        proxy.start(*AT_ONCE, "--fallback", "127.0.0.1:444")
    with road.visitor.namespace.connect(road.host.ipv4, 443) as visitor:
        visitor.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            visitor.recv(1)
    lines = [line for line in proxy.log.splitlines() if "Cannot connect to" in line]
    assert len(lines) == 1, proxy.log
    assert re.search(r"Cannot connect to the web server \(127\.0\.0\.1:444\): .*refused", lines[0])
    proxy.stop(wait=True)
    _nothing_is_left(proxy)
