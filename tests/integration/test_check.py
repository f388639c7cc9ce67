"""C{check} as an operator sees it: its findings, its exit status, and that nothing is left."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .netns import Namespace, Street, wait_until
from .proxy import AT_ONCE, NOBODY_WHO_MAY_WRITE, PORT, Proxy
from .visitors import visitors
from .warm import WarmProxy, warm_proxy
from .website import Website

REDIRECTS = ("iptables", "sk-lookup")
CALLS = [f"probe {who} {family}" for family in ("IPv4", "IPv6") for who in ("visitor", "validator")]
MOMENTS = 12

both_redirects = pytest.mark.parametrize("redirect", REDIRECTS)


@pytest.fixture
def host(road: Street) -> Namespace:
    return road.host.namespace


@pytest.fixture
def warm(host: Namespace, proxy: Proxy) -> Iterator[WarmProxy]:
    """For tests of many probes."""
    with warm_proxy(host.argv(), proxy.env) as running:
        yield running


def check(proxy: Proxy, *words: str) -> subprocess.CompletedProcess[str]:
    """Run it; it says nothing on stderr."""
    done = proxy.run("check", "--logfile", str(proxy.log_file), *AT_ONCE, *words, check=False)
    assert done.stderr == ""
    return done


def levels(output: str) -> dict[str, str]:
    """The level of each check, by its name, from the output lines."""
    found = {}
    *lines, verdict = output.splitlines()
    assert re.match("It would( not)? work here", verdict), output
    for line in lines:
        match = re.fullmatch(r"(ok|warning|failed) +([^:]+)(?:: .+)?", line)
        assert match is not None, line
        found[match[2]] = match[1]
    return found


def line_of(output: str, name: str) -> str:
    """The line of this check."""
    (line,) = [line for line in output.splitlines() if re.match(rf"\w+ +{name}(:|$)", line)]
    return line


def _nothing_is_left(host: Namespace) -> None:
    """No rule, listener, link or file; a namespace's links go when it does."""
    wait_until(lambda: "aap" not in host.ip("-brief link"), "the link is gone", 5)
    wait_until(lambda: host.rules() == [], "the rules are gone", 1)
    assert not host.accepts("127.0.0.1", PORT)
    assert "169.254" not in host.ip("address")


def _no_process_is_left(host: Namespace, *others: int) -> None:
    """Only the web server and these runs exist."""

    def strangers() -> set[int]:
        return {
            pid
            for pid in set(host.pids()) - set(others)
            if "nginx" not in Path(f"/proc/{pid}/comm").read_text()
        }

    wait_until(lambda: not strangers(), "its processes have ended", 5)


@both_redirects
def test_all_is_well(site: Website, proxy: Proxy, redirect: str) -> None:
    """On a host where it works each line is ok, and it exits 0; no file is made."""
    done = check(proxy, "--redirect", redirect)
    assert set(levels(done.stdout).values()) == {"ok"}, done.stdout
    assert done.returncode == 0
    assert not proxy.pid_file.exists()
    assert not proxy.log_file.exists()
    _nothing_is_left(proxy.namespace)


@pytest.mark.parametrize("redirect", [*REDIRECTS, "auto"])
def test_probe(site: Website, proxy: Proxy, redirect: str) -> None:
    """A visitor and a validator reach their targets by both families, and nothing is left."""
    done = check(proxy, "--probe", "--redirect", redirect)
    found = levels(done.stdout)
    assert set(found.values()) == {"ok"}, done.stdout
    assert [name for name in found if name.startswith("probe ")] == CALLS
    assert ("Steering with sk-lookup" in done.stdout) == (redirect == "auto")
    assert done.returncode == 0
    assert "aap" not in proxy.namespace.ip("-brief link"), "the link is gone at once"
    _nothing_is_left(proxy.namespace)
    _no_process_is_left(proxy.namespace)


@both_redirects
def test_visitors_do_not_notice_a_probe(
    road: Street, site: Website, proxy: Proxy, redirect: str
) -> None:
    """While visitors come and go it probes, and none of them fails."""
    with visitors(site, road.visitor, road.host) as crowd:
        crowd.wait_for(20)
        done = check(proxy, "--probe", "--redirect", redirect, "--linger", "1")
        crowd.wait_for(20)
        report = crowd.leave()
    assert done.returncode == 0, done.stdout
    assert report.failed == 0, report
    assert report.steered > 0, "it did not steer"


def test_ipv6_left_alone(site: Website, proxy: Proxy) -> None:
    """With ACME_ALPN_PROXY_DISABLEV6=y C{check} says so, and connects only over IPv4."""
    proxy.env["ACME_ALPN_PROXY_DISABLEV6"] = "y"
    done = check(proxy, "--probe")
    assert done.returncode == 0, done.stdout
    assert "DISABLEV6" in line_of(done.stdout, "IPv6")
    assert not [name for name in levels(done.stdout) if name in [*CALLS[2:], "ip6tables"]]


def test_no_ipv6(host: Namespace, site: Website, proxy: Proxy) -> None:
    """On a host without IPv6 that is no fault."""
    host.run("sysctl", "-qw", *(f"net.ipv6.conf.{each}.disable_ipv6=1" for each in ("all", "lo")))
    host.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    done = check(proxy, "--probe", "--redirect", "sk-lookup")
    assert done.returncode == 0, done.stdout
    assert line_of(done.stdout, "IPv6") == "ok      IPv6: this host has none"


def test_new_interfaces_without_ipv6(host: Namespace, site: Website, proxy: Proxy) -> None:
    """If new interfaces have no IPv6, so that the probe cannot connect over it, C{check} warns."""
    host.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    done = check(proxy, "--probe")
    assert done.returncode == 0, done.stdout
    assert levels(done.stdout)["probe"] == "warning"
    assert [levels(done.stdout)[call] for call in CALLS[:2]] == ["ok"] * 2


def test_json(site: Website, proxy: Proxy) -> None:
    """C{--json} prints one document with the same; C{doctor} is the same command."""
    done = proxy.run("doctor", "--json", "--probe", *AT_ONCE, "--logfile", str(proxy.log_file))
    document = json.loads(done.stdout)
    assert document["verdict"] == "ok"
    assert [each["name"] for each in document["checks"]][-4:] == CALLS
    for each in document["checks"]:
        assert sorted(each) == ["cause", "name", "remedy", "verdict"]


def test_port_taken(host: Namespace, site: Website, proxy: Proxy) -> None:
    """If another program has port 21443, over IPv4 or over IPv6, the check fails, and nothing is
    steered."""
    for address in ("127.0.0.1", "::1"):
        with host.listen(address, PORT):
            done = check(proxy, "--probe")
        assert done.returncode == 1
        assert line_of(done.stdout, "port") == (
            "failed  port: port 21443 is taken by another program;"
            " stop that one (see: ss -ltnp 'sport = :21443')"
        )
        assert levels(done.stdout)["probe"] == "warning"


def test_web_server_down(host: Namespace, proxy: Proxy) -> None:
    """If the fallback does not answer TLS, that is a failure, with a remedy; JSON has the same."""
    done = check(proxy, "--probe", "--fallback", "127.0.0.1:444")
    assert done.returncode == 1
    assert re.fullmatch(
        r"failed +fallback: 127\.0\.0\.1:444 does not answer TLS: .*refused.*; start the web .*",
        line_of(done.stdout, "fallback"),
    )
    document = json.loads(check(proxy, "--json", "--fallback", "127.0.0.1:444").stdout)
    assert document["verdict"] == "failed"
    (failed,) = [each for each in document["checks"] if each["verdict"] == "failed"]
    assert (failed["name"], failed["remedy"][:5]) == ("fallback", "start")


def test_fallback_without_tls(host: Namespace, proxy: Proxy) -> None:
    """A program listens in place of the web server, and closes: that does not count as TLS."""
    words = ("check", "--fallback", "127.0.0.1:444", "--logfile", proxy.log_file)
    with host.listen("127.0.0.1", 444) as listener:
        process = host.popen(proxy.program, *words, log=proxy.log_file.with_name("out"))
        listener.accept()[0].close()
        assert process.wait(20) == 1
    output = proxy.log_file.with_name("out").read_text()
    assert "does not answer TLS: it closed the connection" in line_of(output, "fallback")


def test_acme_target_is_taken(host: Namespace, site: Website, proxy: Proxy) -> None:
    """A web server where the ACME client should listen is a warning, and exits 0."""
    done = check(proxy, "--alpn", "127.0.0.1:443")
    assert done.returncode == 0
    assert levels(done.stdout)["ACME target"] == "warning", done.stdout


@pytest.mark.parametrize("family", ["iptables", "ip6tables"])
def test_firewall_that_drops(
    road: Street, host: Namespace, site: Website, proxy: Proxy, family: str
) -> None:
    """If the firewall accepts only port 443, C{check} is ok with sk-lookup; with iptables it fails,
    and names sk-lookup."""
    host.run(family, "-P", "INPUT", "DROP")
    for match in ("-i lo", "-p tcp --dport 443", "-p ipv6-icmp"):
        if family == "ip6tables" or "icmp" not in match:
            host.run(family, "-A", "INPUT", *match.split(), "-j", "ACCEPT")
    done = check(proxy, "--probe", "--redirect", "sk-lookup")
    assert done.returncode == 0, done.stdout
    assert {levels(done.stdout)[call] for call in CALLS} == {"ok"}
    rules = host.rules()
    done = check(proxy, "--probe", "--redirect", "iptables")
    assert done.returncode == 1, done.stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed")]
    assert failed
    assert [line for line in failed if "--redirect sk-lookup" in line] == failed
    assert host.rules() == rules


def test_firewall_bound_to_interfaces(host: Namespace, site: Website, proxy: Proxy) -> None:
    """Port 443 is accepted only from the visitors' interface: then the probe's failure is a
    warning."""
    for family in ("iptables", "ip6tables"):
        host.run(family, "-A", "INPUT", "-i", "net0", "-p", "tcp", "-j", "ACCEPT")
        host.run(family, "-A", "INPUT", "-p", "tcp", "!", "-i", "lo", "-j", "DROP")
    done = check(proxy, "--probe", "--redirect", "sk-lookup")
    assert done.returncode == 0, done.stdout
    found = levels(done.stdout)
    assert [found[call] for call in CALLS] == ["warning"] * 4, done.stdout
    assert "from another host: openssl s_client -connect SITE:443" in line_of(done.stdout, CALLS[0])


def test_port_443_sent_elsewhere(host: Namespace, site: Website, proxy: Proxy) -> None:
    """A rule like a container engine's takes :443 away: sk-lookup's probe fails, iptables' does
    not."""
    host.run("iptables", "-t", "nat", "-N", "ENGINE")
    host.run("iptables", "-t", "nat", "-A", "PREROUTING", "-j", "ENGINE")
    match = ["-p", "tcp", "--dport", "443", "-j", "REDIRECT", "--to-ports", "8443"]
    host.run("iptables", "-t", "nat", "-A", "ENGINE", *match)
    with host.listen("0.0.0.0", 8443):
        done = check(proxy, "--probe", "--redirect", "sk-lookup")
        assert done.returncode == 1, done.stdout
        failed = [line for line in done.stdout.splitlines() if line.startswith("failed")]
        assert "--redirect iptables" in failed[0]
        done = check(proxy, "--probe", "--redirect", "iptables")
    assert done.returncode == 0, done.stdout


def test_leftovers(host: Namespace, site: Website, proxy: Proxy) -> None:
    """If an instance that was killed with its guard has left rules, C{check} fails. The remedy is
    C{stop}, and it works."""
    proxy.start(*AT_ONCE)
    proxy.kill_with_guard()
    rules = host.rules()
    done = check(proxy, "--probe")
    assert done.returncode == 1
    assert re.fullmatch(
        r"failed +leftovers: a killed instance has left 4 rules: .*; remove them with: .* stop",
        line_of(done.stdout, "leftovers"),
    )
    assert host.rules() == rules, "it changed something"
    proxy.run("stop")
    assert check(proxy, "--probe").returncode == 0


@both_redirects
def test_while_an_instance_runs(site: Website, proxy: Proxy, redirect: str) -> None:
    """If an instance runs, C{check} says so, finds no fault, and does not probe."""
    proxy.start(*AT_ONCE, "--redirect", redirect)
    rules = proxy.namespace.rules()
    done = check(proxy, "--probe", "--redirect", redirect)
    assert done.returncode == 0, done.stdout
    assert line_of(done.stdout, "instance") == (
        f"ok      instance: already running as PID {proxy.pid} ({proxy.pid_file})"
    )
    assert line_of(done.stdout, "probe") == (
        f"warning probe: not done: an instance runs as PID {proxy.pid}; stop it first"
    )
    assert proxy.namespace.rules() == rules
    proxy.stop(wait=True)


def test_files_not_writable(site: Website, proxy: Proxy, tmp_path: Path) -> None:
    """If the folder of the PID file or of the log is missing, C{check} fails, with a remedy for
    each."""
    proxy.env["ACME_ALPN_PROXY_PIDFILE"] = str(tmp_path / "missing" / "pid")
    done = proxy.run("check", "--logfile", str(tmp_path / "missing" / "log"), check=False)
    assert done.returncode == 1
    assert "ACME_ALPN_PROXY_PIDFILE" in line_of(done.stdout, "PID file")
    assert "--logfile" in line_of(done.stdout, "log file")


def test_not_root(site: Website, proxy: Proxy) -> None:
    """Without root, the findings that need root say so."""
    proxy.wrapper = NOBODY_WHO_MAY_WRITE
    done = check(proxy, "--probe", "--redirect", "iptables")
    assert done.returncode == 1
    for name in ("sk-lookup", "nftables", "iptables", "ip6tables"):
        assert "run this as root" in line_of(done.stdout, name)
    assert levels(done.stdout)["sk-lookup"] == "warning", "it was not asked for"


def test_usage(proxy: Proxy) -> None:
    """The flags of C{check} are wrong usage with other commands."""
    done = proxy.run("stop", "--json", check=False)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_steers(
    host: Namespace, site: Website, proxy: Proxy, tmp_path: Path, number: int
) -> None:
    """If a signal comes while the probe steers, C{check} ends in order, says so, and exits with
    1."""
    output = tmp_path / "output"
    words = ("check", "--probe", "--linger", "2", "--logfile", str(proxy.log_file))
    process = host.popen(proxy.program, *words, log=output, env=proxy.env)
    wait_until(lambda: bool(host.rules()), "it steers", 20)

    process.send_signal(number)
    assert process.wait(20) == 1
    text = output.read_text()
    assert line_of(text, "probe") == "failed  probe: interrupted; run it again"
    _nothing_is_left(host)
    _no_process_is_left(host)


@both_redirects
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_at_any_moment(
    host: Namespace, site: Website, proxy: Proxy, warm: WarmProxy, redirect: str, number: int
) -> None:
    """Nothing is left after any signal, at any time."""
    words = ["check", "--probe", "--redirect", redirect, "--logfile", str(proxy.log_file)]
    words += AT_ONCE
    for moment in warm.moments(MOMENTS, *words, hit="start"):
        done = warm.run(*words, hit="start", number=number, moment=moment)
        assert done.returncode in (1, -number), done
        _nothing_is_left(host)
        _no_process_is_left(host, warm.pid)
    assert check(proxy).returncode == 0


@pytest.mark.parametrize("redirect", ["iptables", "nftables", "sk-lookup"])
@pytest.mark.parametrize("whether", ["require", "off"])
def test_what_the_web_server_saw(site: Website, proxy: Proxy, redirect: str, whether: str) -> None:
    """The probe tells which address the web server has seen of its visitors."""
    options = ("--redirect", redirect, "--visitor-address", whether)
    output = check(proxy, "--probe", *options).stdout
    whose = {"require": "its own address", "off": "an address of this host"}[whether]
    for family in ("IPv4", "IPv6"):
        line = line_of(output, f"probe visitor {family}")
        assert re.search(rf"ok .*: the web server saw it as \S+, {whose}$", line)
    assert line_of(output, "visitor address").startswith("warning" if whether == "off" else "ok")
