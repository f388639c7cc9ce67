"""The findings of check in many situations; tests/integration/test_check.py uses real hosts."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import ssl
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectError, ReactorNotRunning
from twisted.internet.error import ConnectionRefusedError as NobodyListens
from twisted.logger import globalLogBeginner
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.diagnosis import check
from acme_alpn_proxy.diagnosis.check import Check
from acme_alpn_proxy.diagnosis.finding import Finding, Level
from acme_alpn_proxy.diagnosis.handshake import OnlyAlert
from acme_alpn_proxy.diagnosis.probe import Doing, Tell
from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.firewall import xtables
from acme_alpn_proxy.host.facts import pid_namespace
from acme_alpn_proxy.interfaces import NOT_FOUND
from acme_alpn_proxy.options import ConsoleOptions
from acme_alpn_proxy.proxy.visitoraddress import no_way_back
from acme_alpn_proxy.redirects.claim import claim_redirect

from ..fake_iptables import FakeIptables
from ..memory import MemoryReactor
from .folders import folder_for

LEFTOVER = "-p tcp --dport 443 -m comment --comment acme-alpn-proxy -j REDIRECT --to-ports 21443"
DEAD_KEEPER = ["-m", "comment", "--comment", f"acme-alpn-proxy keeper 1 1 {pid_namespace()}"]


class OwnerFile:
    """A PID file with a known owner."""

    path = "/nowhere/pid"

    def __init__(self, owner: int | StartError | None = None) -> None:
        self._owner = owner

    def owner(self) -> int | None:
        if isinstance(self._owner, StartError):
            raise self._owner
        return self._owner


class Waiting(FakeIptables):
    """Commands whose waits take no time."""

    def pause(self, seconds: float) -> Deferred[None]:
        return succeed(None)


class CheckCase(SynchronousTestCase):
    """A host where all is well, until a test says otherwise."""

    def setUp(self) -> None:
        self.commands = Waiting()
        self.pidfile = OwnerFile()
        self.handshakes: dict[str, Any] = {"127.0.0.1:443": None}
        self.headers: dict[str, bytes] = {}
        self.probed: list[Mapping[str, Any]] = []
        self.patch(check, "handshake", self.handshake)
        self.patch(check, "has_ipv6", lambda: True)
        self.patch(check, "port_is_free", lambda port: True)
        self.patch(xtables, "may_administer_network", lambda: True)
        self.patch(check, "may_have_way_back", lambda: None)
        self.patch(check, "refuse_translation", lambda servers: None)
        self.refusals: dict[str, StartError] = {}
        self.alone: dict[str, bool] = {}
        self.patch(check, "make_way", self.make_way)

    def make_way(self, name: str, options: Any, *, alone: bool) -> Any:
        """A redirect that refuses, as configured, before it changes anything."""
        self.alone[name] = alone
        refusal = self.refusals.get(name)
        prepared = succeed(()) if refusal is None else fail(refusal)
        return SimpleNamespace(prepare=lambda commands: prepared)

    def handshake(
        self, reactor: Any, target: Any, patience: float, *alpn: str, header: bytes = b""
    ) -> Deferred[Any]:
        self.headers[target.text] = header
        if target.text not in self.handshakes:
            return fail(NobodyListens())
        result = self.handshakes[target.text]
        return fail(result) if isinstance(result, Exception) else succeed(result)

    def probe(
        self, reactor: Any, options: Mapping[str, Any], tell: Tell, doing: Doing
    ) -> Deferred[None]:
        self.probed.append(options)
        return succeed(None)

    def check(self, *words: str, environment: dict[str, str] | None = None) -> dict[str, Finding]:
        """The findings, by name; each was reported in turn."""
        options = ConsoleOptions()
        folder = folder_for(self)
        options.environment = {
            "ACME_ALPN_PROXY_PIDFILE": f"{folder}/pid",
            **(environment or {}),
        }
        options.parseOptions(["check", "--logfile", f"{folder}/log", *words])
        told: list[Finding] = []
        self.done: list[str] = []
        checking = Check(
            MemoryReactor(),
            options,
            self.pidfile,  # type: ignore[arg-type]
            self.commands,
            told.append,
            probe=self.probe,
            doing=self.done.append,
        )
        self.successResultOf(checking.look())
        self.assertEqual(told, checking.findings)
        return {finding.name: finding for finding in told}

    def found(self, name: str, level: Level, pattern: str, *words: str, **named: Any) -> None:
        """The finding of one check: its level, and a text in its line."""
        finding = self.check(*words, **named)[name]
        self.assertIs(finding.level, level, finding)
        self.assertRegex(str(finding), pattern)
        if level is not Level.OK:
            self.assertNotEqual(finding.remedy, "")


class VisitorAddressTests(CheckCase):
    def test_seen(self) -> None:
        """If the web server is on loopback, it will see the visitors' own addresses."""
        self.found("visitor address", Level.OK, "the web server sees the visitors' own addresses$")

    def test_off(self) -> None:
        """If the web server would see 127.0.0.1, the check gives a warning."""
        options = ("--visitor-address", "off")
        pattern = "off: the web server sees all visitors as 127.0.0.1; give 127.0.0.1 no priv"
        self.found("visitor address", Level.WARNING, pattern, *options)

    def test_not_possible(self) -> None:
        """If the visitors' addresses cannot be shown, the check gives a warning; with
        C{--visitor-address require} it fails."""
        problem = no_way_back(FileNotFoundError(errno.ENOENT, "none"))

        def refuse() -> None:
            raise problem

        self.patch(check, "may_have_way_back", refuse)
        pattern = "as 127.0.0.1: /dev/net/tun does not exist; load .* to it$"
        self.found("visitor address", Level.WARNING, pattern)
        options = ("--visitor-address", "require")
        self.found("visitor address", Level.FAILED, "/dev/net/tun does not exist; load", *options)

    def test_elsewhere(self) -> None:
        """A web server that is not on loopback sees an address of this host: the check is ok, but
        fails with C{--visitor-address require}."""
        self.handshakes["192.0.2.1:443"] = None
        options = ["--fallback", "192.0.2.1:443"]
        self.found(
            "visitor address",
            Level.OK,
            "sees an address of this host instead of the visitors' addresses$",
            *options,
        )
        options += ["--visitor-address", "require"]
        self.found("visitor address", Level.FAILED, "no numeric loopback address", *options)


class CheckTests(CheckCase):
    def test_all_is_well(self) -> None:
        """Each check has its verdict, and nothing was changed."""
        found = self.check()
        self.assertEqual({finding.level for finding in found.values()}, {Level.OK})
        self.assertEqual(
            list(found),
            [
                "instance",
                "PID file",
                "log file",
                "port",
                "IPv6",
                "fallback",
                "visitor address",
                "ACME target",
                "sk-lookup",
                "nftables",
                "iptables",
                "ip6tables",
                "leftovers",
            ],
        )
        self.assertEqual({call[5] for call in self.commands.calls}, {"-S", "-C"})
        self.assertEqual(self.done[0], "asking the web server at 127.0.0.1:443")
        self.assertEqual(self.probed, [])

    def test_probe(self) -> None:
        """The probe comes last, if it was asked for."""
        self.check("--probe")
        self.assertEqual(len(self.probed), 1)

    def test_no_probe_after_a_failure(self) -> None:
        """If a check failed, the probe is not done, so no visitor is steered."""
        self.handshakes.clear()
        self.found("probe", Level.WARNING, "not done: .*correct what has failed", "--probe")
        self.assertEqual(self.probed, [])

    def test_instance_runs(self) -> None:
        """If an instance runs, the port and the rules are its own, and there is no probe."""
        self.pidfile = OwnerFile(7)
        self.commands.chains["iptables", "nat", "PREROUTING"].append(LEFTOVER.split())
        self.patch(check, "port_is_free", lambda port: False)
        found = self.check("--probe")
        self.assertEqual(found["instance"].cause, "already running as PID 7 (/nowhere/pid)")
        levels = {name: finding.level for name, finding in found.items()}
        self.assertEqual(levels.pop("probe"), Level.WARNING)
        self.assertEqual(set(levels.values()), {Level.OK})
        self.assertEqual(self.probed, [])

    def test_pid_file_not_readable(self) -> None:
        """If the PID file cannot be read, the check fails with the same text as C{start}."""
        self.pidfile = OwnerFile(StartError("cannot read the PID file; run this as root"))
        self.found("instance", Level.FAILED, "cannot read the PID file; run this as root$")

    def test_no_ipv6(self) -> None:
        """On a host without IPv6 nothing is asked of ip6tables."""
        self.patch(check, "has_ipv6", lambda: False)
        found = self.check()
        self.assertEqual(found["IPv6"].cause, "this host has none")
        self.assertNotIn("ip6tables", found)
        self.assertEqual({call[0] for call in self.commands.calls}, {"iptables"})

    def test_ipv6_left_alone(self) -> None:
        """If IPv6 is not steered, ip6tables is not asked either."""
        found = self.check(environment={"ACME_ALPN_PROXY_DISABLEV6": "y"})
        self.assertRegex(found["IPv6"].cause, "left alone")
        self.assertNotIn("ip6tables", found)

    def test_port_taken(self) -> None:
        """If the port is taken, that is a failure, and the remedy shows how to find the program."""
        self.patch(check, "port_is_free", lambda port: False)
        taken = "21443 is taken by another program; .*ss -ltnp"
        self.found("port", Level.FAILED, taken)
        self.patch(check, "taken_by_another_user", lambda port: True)
        self.found("port", Level.WARNING, taken)
        self.found("port", Level.FAILED, taken, "--redirect", "iptables")


class TargetTests(CheckCase):
    def test_fallback(self) -> None:
        """If the web server does not answer TLS, the check fails; an alert is an answer."""
        no_tls = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
        for why in (ConnectError(), no_tls, TimeoutError(errno.ETIMEDOUT, "no answer")):
            self.handshakes["127.0.0.1:443"] = why
            self.found("fallback", Level.FAILED, "127.0.0.1:443 does not answer TLS: .+; start")
        self.handshakes["127.0.0.1:443"] = TimeoutError(errno.ETIMEDOUT, "no answer within 10 s")
        self.found("fallback", Level.FAILED, "not answer TLS: no answer within 10 s; start")
        self.handshakes["127.0.0.1:443"] = OnlyAlert("TLSV1_UNRECOGNIZED_NAME")
        self.found("fallback", Level.OK, "refused the test handshake: TLSV1_UNRECOGNIZED_NAME")

    def test_acme_target(self) -> None:
        """Nothing there yet, or an ACME client, is fine. Anything else is a warning."""
        self.found("ACME target", Level.OK, "no program listens there now")
        self.handshakes["127.0.0.1:31443"] = "acme-tls/1"
        self.found("ACME target", Level.OK, "answers validations")
        for other in (None, "http/1.1", ConnectError(), ValueError()):
            self.handshakes["127.0.0.1:31443"] = other
            self.found("ACME target", Level.WARNING, "127.0.0.1:31443")

    def test_named_acme_targets(self) -> None:
        """Each name's ACME client is looked at."""
        self.handshakes["127.0.0.1:31444"] = "acme-tls/1"
        words = ("--alpn-for", "b.example=127.0.0.1:31444")
        self.found("ACME target for b.example", Level.OK, "answers validations", *words)
        self.found("ACME target", Level.OK, "no program listens there now", *words)

    def test_headers(self) -> None:
        """A target that expects a header gets one without addresses."""
        words = ("--fallback-proxy-protocol=v1", "--alpn-proxy-protocol=v2")
        self.check(*words)
        self.assertEqual(self.headers["127.0.0.1:443"], b"PROXY UNKNOWN\r\n")
        self.assertTrue(self.headers["127.0.0.1:31443"].startswith(b"\r\n\r\n\0\r\nQUIT"))
        self.check()
        self.assertEqual(set(self.headers.values()), {b""})

    def test_original(self) -> None:
        """With C{--fallback original}, TLS must be answered at each address where port 443 is
        open. The check also lists the addresses where it is not open."""
        served: tuple[list[str], list[str]] = (["192.0.2.1", "2001:db8::1"], ["192.0.2.3"])
        self.patch(check, "sites", lambda: served)
        self.patch(check, "deferToThread", lambda look: succeed(look()))
        words = ("--fallback", "original")
        self.handshakes |= {"192.0.2.1:443": None, "[2001:db8::1]:443": None}
        self.found("fallback", Level.OK, "no web server answers on port 443 of 192.0.2.3", *words)
        self.handshakes["[2001:db8::1]:443"] = ConnectError()
        pattern = r"\[2001:db8::1\]:443 does not answer TLS: .+; start"
        self.found("fallback", Level.FAILED, pattern, *words)
        served = ([], ["192.0.2.3"])
        self.found(
            "fallback", Level.FAILED, "no web server answers on port 443 at any address", *words
        )


class RedirectTests(CheckCase):
    def test_sk_lookup(self) -> None:
        """If the kernel refuses a redirect, that is a failure if it was asked for, otherwise a
        warning."""
        self.refusals["sk-lookup"] = StartError("too old; run a newer one")
        self.found("sk-lookup", Level.WARNING, "too old; run")
        remedy = "too old; use --redirect iptables or --redirect nftables, or run a newer one$"
        self.found("sk-lookup", Level.FAILED, remedy, "--redirect", "sk-lookup")

    def test_nftables(self) -> None:
        """If nftables refuses, that is a failure if it was asked for, otherwise a warning."""
        self.refusals["nftables"] = StartError("too old; run a newer one")
        self.found("nftables", Level.WARNING, "too old; run")
        self.refusals["sk-lookup"] = StartError("not permitted; run this as root")
        remedy = "too old; use --redirect iptables, or run a newer one$"
        self.found("nftables", Level.FAILED, remedy, "--redirect", "nftables")

    def test_table_of_the_instance_that_runs(self) -> None:
        """The table of a running instance is no failure."""
        self.refusals["nftables"] = StartError("another one; stop it first", os.EX_TEMPFAIL)
        self.found("nftables", Level.FAILED, "another one; stop", "--redirect", "nftables")
        self.pidfile = OwnerFile(7)
        self.found("nftables", Level.OK, "in use by the running instance", "--redirect", "nftables")

    def test_iptables(self) -> None:
        """If iptables refuses, that is a failure if iptables was asked for, otherwise a warning."""
        asked = ("--redirect", "iptables")
        self.commands.failures = {1: (4, "no lock"), 3: (3, "no table")}
        pattern = "'iptables .* status 4: no lock; .*another program holds"
        self.found("iptables", Level.FAILED, pattern, *asked)
        self.commands.calls.clear()
        self.commands.failures[1] = (4, "no table")
        self.found(
            "iptables",
            Level.FAILED,
            "'iptables .* status 4: no table; .*, or run 'iptables -t nat -L' as root",
            *asked,
        )
        self.commands.calls.clear()
        self.commands.failures[1] = (4, "no lock")
        self.found("iptables", Level.WARNING, "status 4: no lock", "--redirect", "sk-lookup")

    def test_rules_cannot_expire(self) -> None:
        """If iptables or the kernel lacks the match C{time}, the check gives a warning."""
        self.commands.failures = {3: (2, "Couldn't load match `time'")}
        self.found("iptables", Level.WARNING, "no match 'time', .*; load the kernel's module")

    def test_iptables_would_not_reach(self) -> None:
        """If iptables would lose visitors, that is a failure if it was asked for, otherwise a
        warning."""
        self.refusals["iptables"] = StartError("they would be dropped; use DNAT")
        asked = ("--redirect", "iptables")
        self.found("iptables", Level.FAILED, "they would be dropped; .*use DNAT", *asked)
        self.found("iptables", Level.WARNING, "dropped; use", "--redirect", "sk-lookup")

    def test_iptables_remedies(self) -> None:
        """The remedy is to install it, or to run as root."""
        self.commands.failures = {1: (NOT_FOUND, "iptables: not found on PATH")}
        asked = ("--redirect", "iptables")
        self.found("iptables", Level.FAILED, "; .*, or install iptables, or put its folder", *asked)
        self.commands.calls.clear()
        self.commands.failures = {1: (4, "Permission denied")}
        self.patch(xtables, "may_administer_network", lambda: False)
        pattern = ", or run this as root .in a container: with CAP_NET_ADMIN"
        self.found("iptables", Level.FAILED, pattern, *asked)

    def test_list(self) -> None:
        """A way that does not work is a warning if another one of the list does; ways that are not
        in the list do not count."""
        words = ("--redirect", "iptables,nftables")
        self.refusals["iptables"] = StartError("they would be dropped; use DNAT")
        self.found("iptables", Level.WARNING, "dropped; use DNAT", *words)
        self.assertEqual(set(self.alone.values()), {False})
        self.refusals["nftables"] = StartError("too old; run a newer one")
        another = "use --redirect sk-lookup, or"
        self.found("iptables", Level.FAILED, f"dropped; {another} use DNAT", *words)
        self.found("nftables", Level.FAILED, f"too old; {another} run a newer one", *words)
        self.found("nftables", Level.FAILED, "too old; .*", "--redirect", "nftables")
        alone = [name for name, alone in self.alone.items() if alone]
        self.assertEqual(alone, ["nftables"])
        self.refusals["sk-lookup"] = StartError("not permitted; run this as root")
        self.found("sk-lookup", Level.WARNING, "not permitted; run", *words)

    def test_auto(self) -> None:
        """The way that C{auto} would choose has to work."""
        self.commands.failures = {1: (4, "no lock")}
        words = ("--redirect", "auto")
        self.found("iptables", Level.WARNING, "no lock", *words)
        self.commands.calls.clear()
        environment = {"ACME_ALPN_PROXY_RULESPEC": "-j DNAT"}
        self.found("iptables", Level.FAILED, "no lock", *words, environment=environment)
        self.commands.calls.clear()
        self.refusals["sk-lookup"] = StartError("too old; run a newer one")
        self.found("iptables", Level.WARNING, "no lock", *words)
        self.commands.calls.clear()
        self.refusals["nftables"] = StartError("too old; run a newer one")
        self.found("iptables", Level.FAILED, "no lock", *words)

    def test_redirect(self) -> None:
        """A redirect to a dead port is a failure: visitors are being lost."""
        self.commands.chains["iptables", "nat", "PREROUTING"].append(LEFTOVER.split())
        pattern = "a killed instance has left 1 rule: .* site is down; remove them with: .* stop$"
        self.found("leftovers", Level.FAILED, pattern)

    def test_keeper(self) -> None:
        """A keeper alone is harmless."""
        self.commands.chains["ip6tables", "mangle", "PREROUTING"].append(DEAD_KEEPER)
        self.found("leftovers", Level.WARNING, "a killed instance has left 1 rule; remove them")

    def test_instance_of_twistd(self) -> None:
        """The rules of an instance without PID file are not leftovers; the instance is reported."""
        claim = self.successResultOf(claim_redirect(self.commands, 15))
        with claim:
            pattern = "another instance still steers port 443 .*; stop that instance"
            self.found("leftovers", Level.FAILED, pattern)
            self.found("leftovers", Level.WARNING, pattern, "--redirect", "sk-lookup")


class HostTests(SynchronousTestCase):
    def test_writable(self) -> None:
        """A file that is there or can be made is writable, and is not made."""
        folder = folder_for(self)
        self.assertIsNone(check.why_not_writable(str(folder / "log")))
        self.assertEqual(list(folder.iterdir()), [])
        (folder / "log").write_text("a line\n")
        self.assertIsNone(check.why_not_writable(str(folder / "log")))
        self.assertEqual((folder / "log").read_text(), "a line\n")

    def test_not_writable(self) -> None:
        """A folder is not writable, nor is a file in a missing or another user's folder."""
        folder = folder_for(self)
        self.assertEqual(check.why_not_writable(str(folder)), "Is a directory")
        missing = str(folder / "missing" / "log")
        self.assertEqual(check.why_not_writable(missing), "No such file or directory")
        self.patch(os, "access", lambda path, mode: False)
        self.assertEqual(check.why_not_writable(str(folder / "log")), "Permission denied")

    def test_port(self) -> None:
        """A port is taken if a program listens on any address of either family."""
        for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
            with socket.create_server((host, 0), family=family) as listener:
                port = listener.getsockname()[1]
                self.assertFalse(check.port_is_free(port))
            self.assertTrue(check.port_is_free(port))

    def test_port_without_ipv6(self) -> None:
        """On a kernel without IPv6, no program listens on IPv6."""
        whole = socket.socket

        def only_ipv4(family: int, kind: int) -> socket.socket:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no IPv6")
            return whole(family, kind)

        self.patch(socket, "socket", only_ipv4)
        with whole() as bound:
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]
        self.assertTrue(check.port_is_free(port))


class FakeReactor:
    """Calls its functions when it runs, and then ends."""

    running = True

    def __init__(self, *, stopped: bool = False) -> None:
        self._stopped = stopped
        self.hooks: list[Callable[[], None]] = []
        self.triggers: list[Callable[[], Any]] = []

    def callWhenRunning(self, hook: Callable[[], None]) -> None:
        self.hooks.append(hook)

    def addSystemEventTrigger(self, phase: str, event: str, trigger: Callable[[], Any]) -> None:
        assert (phase, event) == ("before", "shutdown")
        self.triggers.append(trigger)

    def run(self) -> None:
        for hook in self.hooks:
            hook()
        assert self._stopped

    def stop(self) -> None:
        if self._stopped:
            raise ReactorNotRunning
        self._stopped = True


class RunTests(SynchronousTestCase):
    """From the reactor's start to the exit status."""

    def setUp(self) -> None:
        self.addCleanup(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        self.patch(globalLogBeginner, "beginLoggingTo", lambda *arguments, **named: None)
        self.level = Level.OK

    def on(self, reactor: FakeReactor) -> contextlib.AbstractContextManager[object]:
        return mock.patch("twisted.internet.reactor", reactor, create=True)

    def run_check(self, *words: str) -> list[Finding]:
        def look(checking: Check) -> Deferred[None]:
            checking._tell(Finding("port", self.level, "it is so"))
            return succeed(None)

        self.patch(Check, "look", look)
        return self.run_on(*words)

    def run_on(self, *words: str) -> list[Finding]:
        options = ConsoleOptions()
        options.environment = {}
        options.parseOptions(["check", *words])
        self.told: list[Finding] = []
        return check.check_this_host(
            options,
            OwnerFile(),  # type: ignore[arg-type]
            self.told.append,
            lambda what: None,
        )

    def test_findings(self) -> None:
        """Each finding is reported at once, and all are returned at the end."""
        reactor = FakeReactor()
        with self.on(reactor):
            found = self.run_check()
        self.assertEqual(found, [Finding("port", Level.OK, "it is so")])
        self.assertEqual(self.told, found)
        self.successResultOf(reactor.triggers[0]())

    def test_json(self) -> None:
        """As JSON, the findings are one document, with the verdict on all."""
        findings = [Finding("port", Level.WARNING, "it is so"), Finding("IPv6", Level.OK)]
        about = json.loads(check.document(findings))
        self.assertEqual((about["verdict"], len(about["checks"])), ("warning", 2))
        told = {"name": "port", "verdict": "warning", "cause": "it is so", "remedy": ""}
        self.assertEqual(about["checks"][0], told)

    def test_stopped_by_a_signal(self) -> None:
        """The check also returns if a signal has already stopped the reactor."""
        with self.on(FakeReactor(stopped=True)):
            self.assertTrue(self.run_check())

    def test_defect(self) -> None:
        """An unexpected exception is raised; it does not become a finding."""
        self.patch(Check, "look", lambda checking: fail(ZeroDivisionError()))
        with self.on(FakeReactor()), self.assertRaises(ZeroDivisionError):
            self.run_on()
