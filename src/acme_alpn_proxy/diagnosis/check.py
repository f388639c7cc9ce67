"""C{acme-alpn-proxy check}: finds out whether the proxy would work here, before a CA connects.

It reads and changes nothing. Only L{acme_alpn_proxy.diagnosis.probe}, on request, really steers.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, TypedDict, cast

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.error import ConnectionRefusedError as NobodyListens
from twisted.internet.error import ReactorNotRunning
from twisted.internet.threads import deferToThread
from twisted.logger import globalLogBeginner
from twisted.python.failure import Failure

from ..addresses import HTTPS, Address
from ..errors import AlreadyRunning, StartError
from ..firewall.xtables import BINARIES, command, failed
from ..host.facts import has_ipv6
from ..host.pidfile import PIDFile
from ..host.processes import commands_for
from ..host.returnpath import count_left
from ..host.tcpsockets import port_taken, shown, taken_by_another_user
from ..interfaces import ICommands, Reactor, Result
from ..options import PORT, WAYS, ConsoleOptions
from ..proxy.header import UNKNOWN
from ..proxy.routing import ACME_TLS_1
from ..proxy.visitoraddress import (
    bare_cause,
    bare_remedy,
    may_have_way_back,
    refuse_translation,
    web_server,
)
from ..proxy.webserver import START_WEB_SERVER, sites
from ..redirects.choice import or_another_way
from ..redirects.claim import claim_redirect
from ..redirects.iptables import NO_EXPIRY, default_rulespec
from ..redirects.leftovers import LIFE_SIGN, Leftovers
from ..redirects.rules import EXPIRY
from ..tap import make_way
from ..wording import counted
from .finding import Finding, FindingObject, Level, worst
from .handshake import OnlyAlert, handshake
from .probe import Doing, Probe, Tell, probe

_FILES: Final = (
    ("PID file", "pidfile", "set ACME_ALPN_PROXY_PIDFILE to"),
    ("log file", "logfile", "name with --logfile"),
)
"""For each file: its name for the operator, its option, and how to choose another path."""


def _why(problem: BaseException) -> str:
    """The text of the problem, on one line."""
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return " ".join(text.split()).rstrip(".")


def _or_another_way(finding: Finding, names: Sequence[str]) -> Finding:
    """The finding; if it has failed, its remedy also offers the redirects C{names}, which work
    here."""
    if finding.level is not Level.FAILED:
        return finding
    return replace(finding, remedy=or_another_way(names, finding.remedy))


class Check:
    """All checks, one after the other; each finding is reported at once."""

    def __init__(
        self,
        reactor: Reactor,
        options: Mapping[str, Any],
        pidfile: PIDFile,
        commands: ICommands,
        tell: Tell,
        *,
        probe: Probe,
        doing: Doing = lambda what: None,
    ) -> None:
        """
        @param tell: called with each finding.
        @param probe: like L{acme_alpn_proxy.diagnosis.probe.probe}: it steers for a moment, and
            makes connections.
        @param doing: called with the name of each step that may take a while.
        """
        self._reactor = reactor
        self._options = options
        self._pidfile = pidfile
        self._commands = commands
        self._report = tell
        self._probe = probe
        self._doing = doing
        self._ways: list[str] = options["redirect"].split(",")
        self._works = ""
        self._another_instance = False
        self._running: int | None = None
        self.findings: list[Finding] = []

    @inlineCallbacks
    def look(self) -> Generator[Deferred[Any], Any, None]:
        """Run the checks, then the probe if it was requested and is possible."""
        for finding in self._look_at_files():
            self._tell(finding)
        self._tell(self._look_at_port())
        self._tell(self._look_at_ipv6())
        self._doing(f"asking the web server at {self._options['fallback']}")
        self._tell((yield self._look_at_fallback()))
        self._tell(self._look_at_visitor_address())
        targets = {"ACME target": self._options["alpn"]}
        for name, target in self._options["alpn-for"].items():
            targets[f"ACME target for {name}"] = target
        for name, target in targets.items():
            self._doing(f"looking for an ACME client at {target}")
            self._tell((yield self._look_at_acme_target(name, target)))
        self._doing("looking at each way to steer")
        for finding in (yield self._look_at_ways()):
            self._tell(finding)
        self._doing("looking for rules of killed instances")
        self._tell((yield self._look_for_leftovers()))
        if self._options["probe"]:
            yield self._try_it()

    def _tell(self, finding: Finding) -> None:
        self.findings.append(finding)
        self._report(finding)

    @property
    def _families(self) -> list[int]:
        return [4, 6] if self._options["ipv6"] and has_ipv6() else [4]

    def _look_at_files(self) -> Iterator[Finding]:
        try:
            self._running = self._pidfile.owner()
        except StartError as problem:
            yield Finding.refused("instance", problem)
        else:
            runs = "none runs"
            if self._running is not None:
                runs = str(AlreadyRunning(self._running, self._pidfile.path))
            yield Finding("instance", Level.OK, runs)
        for name, option, choose in _FILES:
            path = self._options[option]
            reason = why_not_writable(path)
            if reason is None:
                yield Finding(name, Level.OK)
            else:
                remedy = f"run this as root, or {choose} a file in a folder that exists"
                yield Finding(name, Level.FAILED, f"cannot write {path}: {reason}", remedy)

    def _look_at_port(self) -> Finding:
        fixed = not {"iptables", "none"}.isdisjoint(self._ways)
        if self._running is not None or not fixed or port_is_free(PORT):
            return Finding("port", Level.OK)
        finding = Finding.refused("port", port_taken(PORT))
        another_way = len(self._ways) > 1 and taken_by_another_user(PORT)
        return finding.at_most(Level.WARNING) if another_way else finding

    def _look_at_ipv6(self) -> Finding:
        if not self._options["ipv6"]:
            return Finding("IPv6", Level.OK, "is left alone, as ACME_ALPN_PROXY_DISABLEV6=y says")
        return Finding("IPv6", Level.OK, "" if has_ipv6() else "this host has none")

    @inlineCallbacks
    def _look_at_fallback(self) -> Generator[Deferred[Any], Any, Finding]:
        target, patience = self._options["fallback"], self._options["connect-timeout"]
        seen = ""
        header = self._header("fallback")
        try:
            if target.is_original:
                served, others = yield deferToThread(sites)
                if not served:
                    return Finding(
                        "fallback",
                        Level.FAILED,
                        "no web server answers on port 443 at any address of this host",
                        START_WEB_SERVER,
                    )
                if others:
                    seen = f"no web server answers on port 443 of {', '.join(others)}"
                for host in served:
                    target = Address(shown((host, HTTPS)), host, HTTPS)
                    yield handshake(self._reactor, target, patience, header=header)
            else:
                yield handshake(self._reactor, target, patience, header=header)
        except OnlyAlert as problem:
            refuses = f"speaks TLS, but refused the test handshake: {problem}"
            return Finding(
                "fallback", Level.OK, f"{refuses} (normal if it requires a known server name)"
            )
        except Exception as problem:  # each kind of endpoint fails in its own way
            return Finding(
                "fallback",
                Level.FAILED,
                f"{target} does not answer TLS: {_why(problem)}",
                START_WEB_SERVER,
            )
        return Finding("fallback", Level.OK, seen)

    def _header(self, option: str) -> bytes:
        """What a target expects before the hello."""
        return UNKNOWN.get(self._options[f"{option}-proxy-protocol"], b"")

    def _look_at_visitor_address(self) -> Finding:
        """Only C{--probe} can tell whether the web server's answers come back."""
        fallback = self._options["fallback"]
        try:
            server = web_server(fallback)
        except StartError as problem:
            if self._options["visitor-address"] == "require":
                return Finding.refused("visitor address", problem)
            seen = "the web server sees an address of this host instead of the visitors' addresses"
            return Finding("visitor address", Level.OK, seen)
        remedy = (
            f"give {server.host} no privileges in the web server, such as access without a password"
        )
        if self._options["visitor-address"] == "off":
            cause = f"--visitor-address off: the web server sees all visitors as {server.host}"
            return Finding("visitor address", Level.WARNING, cause, remedy)
        try:
            refuse_translation([server])
            may_have_way_back()
        except StartError as problem:
            if self._options["visitor-address"] == "require":
                return Finding.refused("visitor address", problem)
            cause = f"the web server sees all visitors as {server.host}: {bare_cause(problem)}"
            return Finding("visitor address", Level.WARNING, cause, bare_remedy(problem))
        return Finding(
            "visitor address", Level.OK, "the web server sees the visitors' own addresses"
        )

    @inlineCallbacks
    def _look_at_acme_target(
        self, name: str, target: Address
    ) -> Generator[Deferred[Any], Any, Finding]:
        acme, header = ACME_TLS_1.decode(), self._header("alpn")
        try:
            patience = self._options["connect-timeout"]
            agreed = yield handshake(self._reactor, target, patience, acme, header=header)
        except NobodyListens:
            return Finding(
                name,
                Level.OK,
                "no program listens there now (normal: the ACME client starts later)",
            )
        except Exception as problem:
            seen = f"{target} does not answer validations at the moment: {_why(problem)}"
        else:
            if agreed == acme:
                return Finding(name, Level.OK, "answers validations")
            seen = f"what listens at {target} does not know {acme}"
        option = "--alpn" if target == self._options["alpn"] else "--alpn-for"
        remedy = (
            f"stop the program that uses the address (ss -ltnp), or choose another with {option}"
        )
        return Finding(name, Level.WARNING, seen, remedy)

    @inlineCallbacks
    def _look_at_ways(self) -> Generator[Deferred[Any], Any, list[Finding]]:
        """The findings about the redirects. One that does not work is a failure only if C{start}
        would not choose another one."""
        found: dict[str, list[Finding]] = {}
        for way in ("sk-lookup", "nftables"):
            found[way] = [(yield self._prepare(way))]
        found["iptables"] = []
        for family in self._families:
            found["iptables"].append((yield self._look_at_iptables(family)))
        wanted = [way for way in self._ways if way in found]
        if self._options["rulespec"] is not None and "iptables" in wanted:
            wanted = ["iptables"]
        working = (way for way in wanted if worst(found[way]) is not Level.FAILED)
        self._works = next(working, "")
        others = [way for way in WAYS if way not in wanted and worst(found[way]) is Level.OK]
        if others and not self._works and not self._another_instance:
            for way in wanted:
                found[way] = [_or_another_way(finding, others) for finding in found[way]]
        for way, findings in found.items():
            if self._works or way not in wanted:
                found[way] = [finding.at_most(Level.WARNING) for finding in findings]
        return [finding for findings in found.values() for finding in findings]

    @inlineCallbacks
    def _prepare(self, way: str) -> Generator[Deferred[Any], Any, Finding]:
        """The redirect's own checks, which change nothing."""
        one = len(self._ways) == 1 or self._options["rulespec"] is not None
        alone = one and way in self._ways
        try:
            yield make_way(way, self._options, alone=alone).prepare(self._commands)
        except StartError as problem:
            if problem.status == os.EX_TEMPFAIL:
                self._another_instance = True
                if self._running is not None:
                    return Finding(way, Level.OK, "in use by the running instance")
            return Finding.refused(way, problem)
        return Finding(way, Level.OK)

    @inlineCallbacks
    def _look_at_iptables(self, family: int) -> Generator[Deferred[Any], Any, Finding]:
        name = BINARIES[family]
        for table in ("nat", "mangle"):
            listing = command(family, table, "-S", "PREROUTING")
            result: Result = yield self._commands.run(listing)
            if result.code != 0:
                return Finding.refused(name, failed(result))
        finding = Finding(name, Level.OK)
        if family == 4:
            finding = yield self._prepare("iptables")  # this checks both families
        if finding.level is Level.OK and not (yield self._rules_can_expire(family)):
            return Finding(
                name,
                Level.WARNING,
                f"{name} {NO_EXPIRY}",
                "load the kernel's module xt_time: modprobe xt_time",
            )
        return finding

    @inlineCallbacks
    def _rules_can_expire(self, family: int) -> Generator[Deferred[Any], Any, bool]:
        """Whether iptables and the kernel know the match; found by a query for a rule that is not
        there."""
        rule = [*default_rulespec(PORT), *EXPIRY, "2000-01-01T00:00:00"]
        result: Result = yield self._commands.run(command(family, "nat", "-C", "PREROUTING", *rule))
        return "time" not in result.output

    @inlineCallbacks
    def _look_for_leftovers(self) -> Generator[Deferred[Any], Any, Finding]:
        if self._running is not None:
            return Finding("leftovers", Level.OK, "an instance runs, which removes them")
        try:
            claim = yield claim_redirect(self._commands, LIFE_SIGN)
        except StartError as problem:
            level = Level.FAILED if self._works == "iptables" else Level.WARNING
            return Finding.refused("leftovers", problem, level)
        leftovers = Leftovers(PORT, self._options["rulespec"], self._families)
        found = []
        with claim:
            for family in self._families:
                with suppress(StartError):  # the check of iptables has reported why
                    found += yield leftovers.find(self._commands, family)
        count = len(found) + count_left()
        if not count:
            return Finding("leftovers", Level.OK)
        cause = f"a killed instance has left {counted(count, 'rule')}"
        redirects = any(each.steers for each in found)
        if redirects:
            cause += ": visitors are sent to a port where no program listens, so the site is down"
        level = Level.FAILED if redirects else Level.WARNING
        return Finding("leftovers", level, cause, "remove them with: acme-alpn-proxy stop")

    @inlineCallbacks
    def _try_it(self) -> Generator[Deferred[Any], Any, None]:
        if self._running is not None:
            cause = f"not done: an instance runs as PID {self._running}"
            self._tell(Finding("probe", Level.WARNING, cause, "stop it first"))
        elif worst(self.findings) is Level.FAILED:
            cause = "not done: a check has failed, and the probe would steer visitors"
            self._tell(Finding("probe", Level.WARNING, cause, "correct what has failed"))
        else:
            yield self._probe(self._reactor, self._options, self._tell, doing=self._doing)


def why_not_writable(path: str) -> str | None:
    """Why a file cannot be written or made; L{None} if it can. Makes no file."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK))
    except FileNotFoundError as problem:
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            return problem.strerror
        return None if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
    except OSError as problem:
        return problem.strerror
    return None


def port_is_free(port: int) -> bool:
    """Whether no program listens on this port, on any address. Does not listen there itself."""
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104
        try:
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((host, port))
        except OSError as problem:
            if problem.errno == errno.EADDRINUSE:
                return False
    return True


class CheckDocument(TypedDict):
    """The output of C{check --json}."""

    verdict: str
    checks: list[FindingObject]


def document(findings: Sequence[Finding]) -> str:
    """All findings as JSON."""
    about: CheckDocument = {
        "verdict": str(worst(findings)),
        "checks": [finding.as_object() for finding in findings],
    }
    return json.dumps(about, indent=2)


def check_this_host(
    options: ConsoleOptions, pidfile: PIDFile, tell: Tell, doing: Doing
) -> list[Finding]:
    """Run the checks in a reactor that this function starts and stops; returns the findings.

    @param tell: called with each finding at once.
    @param doing: called with the name of each step that may take a while.
    """
    from twisted.internet import reactor as installed

    reactor = cast(Reactor, installed)

    checks: list[Check] = []
    failures: list[Failure] = []

    def start() -> None:
        # Before the probe steers, nothing has to be undone: SIGTERM may end the process at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        commands = commands_for(reactor)
        check = Check(reactor, options, pidfile, commands, tell, probe=probe, doing=doing)
        checks.append(check)
        done = check.look().addErrback(failures.append)
        reactor.addSystemEventTrigger("before", "shutdown", lambda: done)
        done.addBoth(stop)

    def stop(result: object) -> None:
        try:
            reactor.stop()
        except ReactorNotRunning:
            pass  # a signal has already stopped it

    globalLogBeginner.beginLoggingTo([], discardBuffer=True, redirectStandardIO=False)
    reactor.callWhenRunning(start)
    reactor.run()
    for failure in failures:
        failure.raiseException()
    (check,) = checks
    return check.findings
