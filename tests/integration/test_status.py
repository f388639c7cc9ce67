"""C{status}: its output about instances that run, drain or were killed; and how little it loads."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from acme_alpn_proxy.responder.server import REFUSED, UNRECOGNIZED_NAME

from .. import hellos
from .netns import Street, pidfd, wait_until
from .netns import ended as ended_by
from .proxy import AT_ONCE, Proxy, kill
from .website import Website

MOST_MODULES = 200
"""The most modules that C{status} may load, without those of Python's start. It loads 130; a
reactor alone would load as many again."""
ACME_HELLO = hellos.openssl_hello(b"acme-tls/1", server_name=b"site.example")


def _status(proxy: Proxy, status: int = 0) -> list[dict[str, Any]]:
    done = proxy.run("status", "--json", check=False)
    assert (done.returncode, done.stderr) == (status, ""), done
    answer = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert answer["version"] == 1
    instances: list[dict[str, Any]] = answer["instances"]
    return instances


def _sockets(proxy: Proxy) -> list[Path]:
    return list(proxy.pid_file.parent.glob("*.sock"))


def test_not_running(proxy: Proxy) -> None:
    """If no instance runs, C{status} says so and exits with 3."""
    done = proxy.run("status", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "no instance runs\n", "")
    assert _status(proxy, 3) == []


def test_running(road: Street, site: Website, proxy: Proxy) -> None:
    """C{status} shows the visitors, by route, and the last validation."""
    proxy.start(*AT_ONCE)
    (path,) = _sockets(proxy)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    visitor = road.visitor.namespace
    with proxy.namespace.listen("127.0.0.1", 31443) as responder:
        with visitor.connect(road.host.ipv4, 443) as prober:
            prober.sendall(ACME_HELLO)
            with responder.accept()[0] as answering:
                (told,) = _status(proxy)
                assert told["last_validation"]["result"] == "under way"
                answering.sendall(b"answer")
                assert prober.recv(6) == b"answer"
        with site.visit(visitor, road.host.ipv6) as visit:
            assert visit.get().steered
            wait_until(lambda: not _status(proxy)[0]["routes"]["acme"]["live"], "it has ended")
            (told,) = _status(proxy)
    assert (told["version"], told["pid"], told["state"]) == (1, proxy.pid, "running")
    assert (told["redirect"], told["undecided"]) == ("iptables", 0)
    assert (told["options"]["--linger"], told["options"]["--uid"]) == ("0", "unset")
    assert told["routes"]["acme"] == {
        "target": "127.0.0.1:31443",
        "live": 0,
        "total": 1,
        "failures": 0,
        "cut_short": 0,
        "bytes_from_visitors": len(ACME_HELLO),
        "bytes_to_visitors": 6,
    }
    fallback = told["routes"]["fallback"]
    assert (fallback["live"], fallback["total"], sum(fallback["reasons"].values())) == (1, 1, 1)
    last = told["last_validation"]
    assert re.fullmatch(rf"{re.escape(road.visitor.ipv4)}:\d+", last["peer"])
    assert (last["server_name"], last["result"]) == ("site.example", "answered")
    done = proxy.run("status")
    assert done.stdout.startswith(f"PID {proxy.pid}  running for ")
    proxy.stop(wait=True)
    assert _sockets(proxy) == []


def test_unreachable(road: Street, proxy: Proxy) -> None:
    """A validation while no ACME client listened is shown as such."""
    proxy.start(*AT_ONCE)
    with road.visitor.namespace.connect(road.host.ipv4, 443) as prober:
        prober.sendall(ACME_HELLO)
        assert prober.recv(100) == UNRECOGNIZED_NAME
    (told,) = _status(proxy)
    assert told["routes"]["acme"]["total"] == 1
    assert told["last_validation"]["result"] == REFUSED
    proxy.stop(wait=True)


def test_draining_beside_its_successor(road: Street, site: Website, proxy: Proxy) -> None:
    """A draining instance is shown, too, and so is the next one as soon as it exists."""
    proxy.start(*AT_ONCE)
    first = proxy.pid
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        assert visit.get().steered
        proxy.stop()
        (told,) = _status(proxy)
        assert (told["pid"], told["state"]) == (first, "draining")
        proxy.start(*AT_ONCE)
        states = {told["pid"]: told["state"] for told in _status(proxy)}
        assert states == {first: "draining", proxy.pid: "running"}
    wait_until(lambda: len(_status(proxy)) == 1, "the first has ended")
    proxy.stop(wait=True)
    assert _sockets(proxy) == []


def test_killed(proxy: Proxy) -> None:
    """A killed instance is not shown, and the next start removes its socket."""
    proxy.start(*AT_ONCE)
    kill(proxy.pid)
    assert _status(proxy, 3) == []
    proxy.start(*AT_ONCE)
    assert len(_sockets(proxy)) == len(_status(proxy)) == 1
    proxy.stop(wait=True)


def test_not_root(proxy: Proxy) -> None:
    """Without root, it says so."""
    proxy.start(*AT_ONCE)
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    who_may_read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    unmeasured = [f"--unset={name}" for name in os.environ if "COVERAGE" in name]
    done = proxy.namespace.run(
        *("env", *unmeasured, *nobody, *who_may_read),
        *(proxy.program, "status"),
        check=False,
        env=proxy.env,
    )
    assert done.returncode == os.EX_NOPERM
    why = f"no permission to read the status of PID {proxy.pid}; run this as root"
    assert done.stderr == f"acme-alpn-proxy: {why}\n"
    proxy.stop(wait=True)


def test_watch(proxy: Proxy) -> None:
    """With --watch, it is shown again every second, until interrupted."""
    process = subprocess.Popen(
        [proxy.program, "status", "--watch"],
        env={**os.environ, **proxy.env},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process, pidfd(process.pid) as descriptor:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["no instance runs\n"] * 2
        process.send_signal(signal.SIGINT)
        assert ended_by(descriptor, 10)


def test_shared_run_has_its_target(proxy: Proxy) -> None:
    """C{run --shared} gives the command the ACME target of the running instance."""
    proxy.start(*AT_ONCE, "-alpn", "tcp:host=127.0.0.1:port=5001")
    done = proxy.run("run", "--shared", "--", "sh", "-c", "echo $ACME_ALPN_PROXY_TARGET")
    assert done.stdout == "127.0.0.1:5001\n"
    proxy.stop(wait=True)


def test_metrics(proxy: Proxy) -> None:
    """With --metrics Prometheus reads the numbers from a port of the loopback, until it stops; if
    another program has that port the proxy does not start."""
    with proxy.namespace.listen("127.0.0.1", 9443):
        done = proxy.start(*AT_ONCE, "--metrics", "9443", check=False)
        assert done.returncode == os.EX_UNAVAILABLE
        assert re.search("^acme-alpn-proxy: --metrics tcp:9443:.* in use.*\n\\Z", done.stderr, re.M)
        assert proxy.namespace.rules() == []
    proxy.start(*AT_ONCE, "--metrics", "9443")
    with proxy.namespace.connect("127.0.0.1", 9443) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        page = scraper.makefile().read()
    assert "\nacme_alpn_proxy_running 1.0\n" in page
    proxy.stop(wait=True)
    assert not proxy.namespace.accepts("127.0.0.1", 9443)
    assert "GET" not in proxy.log


def test_imports(proxy: Proxy) -> None:
    """Neither C{status} nor C{stop} loads a reactor, twistd, or anything of twisted.internet; they
    load few modules, which is nearly all the time that they take."""
    line = (
        "import sys; before = {*sys.modules};"
        " from acme_alpn_proxy.console.startup import load_lightly; load_lightly();"
        " from acme_alpn_proxy.console import cli; cli.run_command_line(sys.argv[1:]);"
        " print(*{*sys.modules} - before)"
    )
    for command in ("status", "stop"):
        words = [sys.executable, "-c", line, "--redirect", "none", command]
        done = subprocess.run(
            words, env={**os.environ, **proxy.env}, capture_output=True, text=True, check=True
        )
        loaded = done.stdout.splitlines()[-1].split()
        heavy = ("twisted.internet", "twisted.application", "twisted.scripts", "twisted.logger")
        assert not [name for name in loaded if name.startswith(heavy)]
        assert len(loaded) < MOST_MODULES
