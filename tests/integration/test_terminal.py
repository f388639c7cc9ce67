"""The commands as a waiting person sees them on a terminal, and as a script sees them."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from .. import hellos
from ..console.pty import OnTerminal
from .netns import Street, wait_until
from .proxy import AT_ONCE, PORT, Proxy
from .website import Website

ACME_HELLO = hellos.openssl_hello(b"acme-tls/1", server_name=b"site.example")


def on_terminal(proxy: Proxy, *words: str | Path) -> OnTerminal:
    """The console script on a terminal, in the namespace of the proxy."""
    return OnTerminal(proxy.namespace.argv(proxy.program, *words), proxy.env)


def open_files(pid: int) -> set[str]:
    """The files that a process has open."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def test_stop_counts_down(road: Street, site: Website, proxy: Proxy) -> None:
    """C{stop --wait} says how many connections it waits for, and when they are reset at last; it
    leaves nothing on the screen."""
    proxy.start(*AT_ONCE)
    with site.visit(road.visitor.namespace, road.host.ipv4) as first:
        assert first.get().steered
        with site.visit(road.visitor.namespace, road.host.ipv4) as second:
            assert second.get().steered
            with on_terminal(proxy, "stop", "--wait") as screen:
                screen.wait_for("waiting for 2 open connections of PID")
                second.close()
                screen.wait_for("waiting for 1 open connection of PID")
                first.close()
                assert screen.wait() == 0
    assert re.fullmatch(
        r"waiting for 2 open connections of PID \d+, reset in (3 min 0|2 min 5\d) s at most",
        screen.waits()[0],
    )
    assert screen.lines() == [""]


def test_stop_finds_one_that_drains(road: Street, site: Website, proxy: Proxy) -> None:
    """C{stop} shows instances that were stopped earlier, and C{stop --wait} waits for them."""
    proxy.start(*AT_ONCE)
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        proxy.stop()
        done = proxy.run("stop")
        assert done.stderr == (
            f"acme-alpn-proxy: no instance runs; PID {proxy.pid} was stopped earlier and still"
            " has 1 open connection (see: acme-alpn-proxy status)\n"
        )
        stop = proxy.namespace.popen(
            proxy.program, "stop", "--wait", log=proxy.log_file.with_name("out"), env=proxy.env
        )
        wait_until(lambda: "anon_inode:[pidfd]" in open_files(stop.pid), "it waits", 20)
        assert stop.poll() is None
    assert stop.wait(20) == 0
    assert proxy.log_file.with_name("out").read_text() == ""
    done = proxy.run("stop", "--wait")
    assert done.stderr == "acme-alpn-proxy: no instance runs\n"


def test_stop_waits_for_all(road: Street, site: Website, proxy: Proxy) -> None:
    """C{stop --wait} also waits for the instance before the one that it stops."""
    proxy.start(*AT_ONCE)
    first = proxy.pid
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        proxy.stop_and_start(*AT_ONCE)
        assert proxy.pid != first
        with on_terminal(proxy, "stop", "--wait") as screen:
            screen.wait_for(f"waiting for 1 open connection of PID {first}")
            assert screen.process.poll() is None
            visit.close()
            assert screen.wait() == 0


def test_start_says_what_it_waits_for(proxy: Proxy) -> None:
    """C{start} just after C{stop} waits until the other instance releases its port, and says so."""
    with (
        proxy.namespace.listen("127.0.0.1", PORT) as lingering,
        on_terminal(proxy, *proxy.start_words()) as screen,
    ):
        screen.wait_for("Waiting for port 21443: a stopped instance gives it back; 17 s at most")
        lingering.close()
        assert screen.wait() == 0
    assert screen.lines() == [""]
    assert "Waiting for port 21443" in proxy.log
    proxy.stop(wait=True)


def test_run_gives_an_account(road: Street, site: Website, proxy: Proxy) -> None:
    """C{run} ends with two lines: what it has steered for how long, and the validations."""
    words = ("run", *AT_ONCE, "--logfile", proxy.log_file, "--", "sh", "-c")
    with on_terminal(proxy, *words, "echo ready; read line; exit 7") as screen:
        screen.wait_for("ready")
        with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
            assert visit.get().steered
        with (
            proxy.namespace.listen("127.0.0.1", 31443) as responder,
            road.visitor.namespace.connect(road.host.ipv6, 443) as prober,
        ):
            prober.sendall(ACME_HELLO)
            with responder.accept()[0] as answering:
                answering.sendall(b"answer")
                assert prober.recv(6) == b"answer"
        screen.type("\n")
        assert screen.wait() == 7
    account = [line for line in screen.lines() if line.startswith("acme-alpn-proxy: ")]
    assert len(account) == 2
    assert re.fullmatch(r"acme-alpn-proxy: steered for \d+ s: 1 visitor, no failure", account[0]), (
        account
    )
    assert account[1] == f"acme-alpn-proxy: 1 validation from {road.visitor.ipv6}, no failure"


def test_check_prints_as_it_goes(site: Website, proxy: Proxy) -> None:
    """C{check --probe} shows its current step, colours its findings, and ends with one line."""
    words = ("check", "--probe", "--logfile", proxy.log_file)
    with on_terminal(proxy, *words) as screen:
        screen.wait_for("stopping: waiting for the open connections")
        assert "\x1b[32mok     \x1b[m probe validator IPv6\r\n" in screen.shown
        assert screen.wait() == 0
    assert "connecting to port 443 from a network namespace" in screen.waits()
    assert screen.lines()[-2] == "It would work here: 17 checks, all ok."


def test_check_into_a_pipe(site: Website, proxy: Proxy) -> None:
    """C{check | head -1} prints one line, and no complaint; so do the commands that print more."""
    for words, first in (
        ("check --probe", "ok      instance: none runs\n"),
        ("--help", "Usage: acme-alpn-proxy COMMAND [options]\n"),
        ("manual", '.TH ACME-ALPN-PROXY 8 "'),
        ("completion zsh", "#compdef acme-alpn-proxy acme-alpn-proxy.pyz\n"),
        ("status", "no instance runs\n"),
    ):
        line = f"{proxy.program} {words} --logfile {proxy.log_file} {' '.join(AT_ONCE)} | head -1"
        done = proxy.namespace.run("sh", "-c", line, env=proxy.env)
        assert done.stdout.startswith(first)
        assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert proxy.namespace.rules() == []


def test_nobody_reads(site: Website, proxy: Proxy) -> None:
    """If the reader of the output has gone, that is no failure."""
    line = f"{{ {proxy.program} --version; {proxy.program} --help; }} | :"
    done = proxy.namespace.run("sh", "-c", line, env=proxy.env)
    assert done.stderr == ""


def test_other_options(road: Street, site: Website, proxy: Proxy) -> None:
    """If the running instance has other options, C{start} lists the differences and fails; the
    instance goes on. The same options in another form are the same."""
    proxy.start(*AT_ONCE)
    for foreground in ((), ("-n",)):
        done = proxy.start(*AT_ONCE, "-alpn", "127.0.0.1:5001", *foreground, check=False)
        assert done.returncode == 75
        assert done.stderr == (
            f"acme-alpn-proxy: already running as PID {proxy.pid} ({proxy.pid_file}) with other"
            " options (running / requested): --alpn 127.0.0.1:31443 / 127.0.0.1:5001; stop that"
            " instance first, or use its options\n"
        )
    assert proxy.start("-linger=0.0", "-alpn=127.0.0.1:31443").returncode == 0
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
    proxy.stop(wait=True)


def test_one_log(road: Street, site: Website, proxy: Proxy) -> None:
    """An instance that drains and its successor log to one file: no line of either is lost."""
    proxy.start(*AT_ONCE)
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        proxy.stop_and_start(*AT_ONCE)
    wait_until(lambda: proxy.log.count("Stopped: all connections have ended") == 1, "one ended")
    proxy.stop(wait=True)
    assert proxy.log.count("Started: the proxy receives new connections to port 443") == 2
    assert proxy.log.count("Stopped: all connections have ended") == 2
    assert [
        line for line in proxy.log.splitlines() if not re.match(r"\d{4}-\d\d-\d\dT", line)
    ] == []


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_watch(proxy: Proxy, number: signal.Signals) -> None:
    """C{status --watch} leaves the terminal as it was, with the last text."""
    proxy.start(*AT_ONCE)
    with on_terminal(proxy, "status", "--watch") as screen:
        screen.wait_for("\x1b[32mrunning\x1b[m for ")
        screen.process.send_signal(number)
        assert screen.wait() == 128 + number
    shown = screen.shown.rpartition("\x1b[?1049l")[2]
    assert shown.startswith(f"PID {proxy.pid}  ")
    assert shown.endswith("no validation yet\r\n")
    proxy.stop(wait=True)
