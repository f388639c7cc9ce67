"""C{acme-alpn-proxy check}: whether it would work here, found out before the CA does.

It looks, and changes nothing. L{acme_alpn_proxy.diagnosis.probe} does the real thing if asked to.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import ssl
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import connectProtocol
from twisted.internet.error import ConnectionRefusedError as NobodyListens
from twisted.internet.error import ReactorNotRunning
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import globalLogBeginner
from twisted.python.failure import Failure

from ..addresses import Address
from ..host.processes import NOT_FOUND, Result, commands_for
from ..errors import AS_ADMINISTRATOR, StartError
from .finding import Finding, Level, worst
from ..host.facts import has_ipv6, may_administer_network
from ..firewall.xtables import BINARIES, LOCK_WAIT, listed
from ..interfaces import ICommands
from ..options import PORT, ConsoleOptions
from ..host.pidfile import PIDFile
from ..redirects.guard import claim_redirect
from ..redirects.iptables import LIFE_SIGN, is_dead_keeper, is_leftover
from ..proxy.routing import ACME_TLS_1
from .hellos import TLS_ANSWERS, server_name, tls_client
from ..tap import make_redirect

HANDSHAKE_DEADLINE: Final = 10.0
"""Seconds for a target to answer TLS."""

Tell = Callable[[Finding], None]
Probe = Callable[[Any, ConsoleOptions, Tell], "Deferred[None]"]


class OnlyAlert(Exception):
    """The other end speaks TLS, but no handshake comes of it."""


class Handshake(Protocol):
    """A TLS client that goes no further than the handshake.

    @ivar done: fires with the application protocol that was agreed on, or fails with L{OnlyAlert},
        L{ssl.SSLError} or L{ConnectionResetError}.
    """

    def __init__(self, name: str | None, *alpn: str) -> None:
        self.done: Deferred[str | None] = Deferred(lambda done: self._abort())
        self._tls, self._incoming, self._outgoing = tls_client(name, *alpn)
        self._first = b""

    def connectionMade(self) -> None:
        self._go_on()

    def dataReceived(self, data: bytes) -> None:
        self._first = self._first or data
        self._incoming.write(data)
        self._go_on()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._end(ConnectionResetError(errno.ECONNRESET, "it closed the connection"))

    def _go_on(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self.transport.write(self._outgoing.read())  # type: ignore[union-attr]
        except ssl.SSLError as problem:
            speaks_tls = self._first.startswith(TLS_ANSWERS)
            self._end(OnlyAlert(problem.reason) if speaks_tls else problem)
        else:
            self._end(self._tls.selected_alpn_protocol())

    def _end(self, result: Any) -> None:
        if not self.done.called:
            self.done.callback(Failure(result) if isinstance(result, Exception) else result)
            self._abort()

    def _abort(self) -> None:
        self.transport.abortConnection()  # type: ignore[union-attr]


@inlineCallbacks
def handshake(
    reactor: Any, target: Address, patience: float, *alpn: str
) -> Generator[Deferred[Any], Any, str | None]:
    """Connect and shake hands, as a client that asks for this host's name.

    @return: a Deferred of the application protocol, which fails as connecting or L{Handshake} do.
    """
    endpoint = target.endpoint(reactor, patience)
    client: Handshake = yield connectProtocol(endpoint, Handshake(server_name(), *alpn))
    agreed: str | None = yield client.done.addTimeout(HANDSHAKE_DEADLINE, reactor, _too_slow)
    return agreed


def _too_slow(result: object, seconds: float) -> Failure:
    return Failure(TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s"))


def _why(problem: BaseException) -> str:
    """On one line."""
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return " ".join(text.split()).rstrip(".")


class Check:
    """All checks, one after the other; each is told of as soon as it is done."""

    def __init__(
        self,
        reactor: Any,
        options: ConsoleOptions,
        pidfile: PIDFile,
        commands: ICommands,
        tell: Tell,
        *,
        probe: Probe,
    ) -> None:
        self._reactor = reactor
        self._options = options
        self._pidfile = pidfile
        self._commands = commands
        self._tell_whom = tell
        self._probe = probe
        self._redirect: str = options["redirect"]
        self._running: int | None = None
        self.findings: list[Finding] = []

    @inlineCallbacks
    def run(self) -> Generator[Deferred[Any], Any, None]:
        """Look, then probe if that is asked for and can be done."""
        for finding in self._look_at_files():
            self._tell(finding)
        self._tell(self._look_at_port())
        self._tell(self._look_at_ipv6())
        self._tell((yield self._look_at_fallback()))
        self._tell((yield self._look_at_acme_target()))
        self._tell((yield self._look_at_sk_lookup()))
        for family in self._families:
            self._tell((yield self._look_at_iptables(family)))
        self._tell((yield self._look_for_leftovers()))
        if self._options["probe"]:
            yield self._try_it()

    def _tell(self, finding: Finding) -> None:
        self.findings.append(finding)
        self._tell_whom(finding)

    @property
    def _families(self) -> list[int]:
        return [4, 6] if self._options["ipv6"] and has_ipv6() else [4]

    def _level(self, redirect: str) -> Level:
        """How bad it is if this redirect does not work."""
        return Level.FAILED if self._redirect == redirect else Level.WARNING

    def _look_at_files(self) -> Iterator[Finding]:
        try:
            self._running = self._pidfile.owner()
        except StartError as problem:
            yield Finding.refused("instance", problem)
        else:
            runs = f"runs already as PID {self._running}"
            yield Finding("instance", Level.OK, runs if self._running is not None else "none runs")
        for name, option in (
            ("PID file", "set ACME_ALPN_PROXY_PIDFILE to"),
            ("log file", "name with --logfile"),
        ):
            path = self._options[name.replace(" ", "").lower()]
            reason = why_not_writable(path)
            if reason is None:
                yield Finding(name, Level.OK)
            else:
                remedy = f"run this as root, or {option} a file in a folder that exists"
                yield Finding(name, Level.FAILED, f"cannot write {path}: {reason}", remedy)

    def _look_at_port(self) -> Finding:
        if self._running is not None or port_is_free(PORT):
            return Finding("port", Level.OK)
        return Finding(
            "port",
            Level.FAILED,
            f"port {PORT} is taken by another program",
            f"stop that one (see: ss -ltnp 'sport = :{PORT}')",
        )

    def _look_at_ipv6(self) -> Finding:
        if not self._options["ipv6"]:
            return Finding("IPv6", Level.OK, "is left alone, as ACME_ALPN_PROXY_DISABLEV6=y says")
        return Finding("IPv6", Level.OK, "" if has_ipv6() else "this host has none")

    @inlineCallbacks
    def _look_at_fallback(self) -> Generator[Deferred[Any], Any, Finding]:
        target = self._options["fallback"]
        try:
            yield handshake(self._reactor, target, self._options["connect-timeout"])
        except OnlyAlert as problem:
            return Finding("fallback", Level.OK, f"answers TLS, by refusing: {problem}")
        except Exception as problem:  # each kind of endpoint fails in its own way
            return Finding(
                "fallback",
                Level.FAILED,
                f"{target} does not answer TLS: {_why(problem)}",
                "start the web server, or name its address with --fallback",
            )
        return Finding("fallback", Level.OK)

    @inlineCallbacks
    def _look_at_acme_target(self) -> Generator[Deferred[Any], Any, Finding]:
        target, acme = self._options["alpn"], ACME_TLS_1.decode()
        try:
            patience = self._options["connect-timeout"]
            agreed = yield handshake(self._reactor, target, patience, acme)
        except NobodyListens:
            return Finding("ACME target", Level.OK, "nobody listens there yet")
        except Exception as problem:
            seen = f"{target} does not answer validations at the moment: {_why(problem)}"
        else:
            if agreed == acme:
                return Finding("ACME target", Level.OK, "answers validations")
            seen = f"what listens at {target} does not know {acme}"
        remedy = "see that the ACME client can have that address, or name another one with --alpn"
        return Finding("ACME target", Level.WARNING, seen, remedy)

    @inlineCallbacks
    def _look_at_sk_lookup(self) -> Generator[Deferred[Any], Any, Finding]:
        finding: Finding = yield self._prepare("sk-lookup")
        if self._redirect == "auto":
            works = finding.level is Level.OK and self._options["rulespec"] is None
            self._redirect = "sk-lookup" if works else "iptables"
        return finding

    @inlineCallbacks
    def _prepare(self, redirect: str) -> Generator[Deferred[Any], Any, Finding]:
        """What the redirect itself knows before it does anything."""
        options: Any = {**self._options, "redirect": redirect}
        try:
            yield make_redirect(options).prepare(self._commands)
        except StartError as problem:
            return Finding.refused(redirect, problem, self._level(redirect))
        return Finding(redirect, Level.OK)

    @inlineCallbacks
    def _look_at_iptables(self, family: int) -> Generator[Deferred[Any], Any, Finding]:
        name, level = BINARIES[family], self._level("iptables")
        for table in ("nat", "mangle"):
            result: Result = yield self._list(family, table)
            if result.code != 0:
                cause = f"'{shlex.join(result.argv)}' failed with status {result.code}"
                return Finding(name, level, f"{cause}: {result.one_line}", _remedy(name, result))
        if family == 6:
            return Finding(name, Level.OK)
        finding: Finding = yield self._prepare("iptables")  # which looks at both families
        return finding

    def _list(self, family: int, table: str) -> Deferred[Result]:
        listing = ["-w", LOCK_WAIT, "-t", table, "-S", "PREROUTING"]
        return self._commands.run([BINARIES[family], *listing])

    @inlineCallbacks
    def _look_for_leftovers(self) -> Generator[Deferred[Any], Any, Finding]:
        if self._running is not None:
            return Finding("leftovers", Level.OK, "an instance runs, which removes them")
        try:
            claim = yield claim_redirect(self._commands, LIFE_SIGN)
        except StartError as problem:
            return Finding.refused("leftovers", problem, self._level("iptables"))
        with claim:
            redirects = keepers = 0
            for family in self._families:
                nat = yield self._list(family, "nat")
                redirects += sum(is_leftover(words, PORT) for words in listed(nat.output))
                mangle = yield self._list(family, "mangle")
                keepers += sum(is_dead_keeper(words) for words in listed(mangle.output))
        if not redirects + keepers:
            return Finding("leftovers", Level.OK)
        cause = f"{redirects + keepers} rules of a killed instance are left"
        if redirects:
            cause += ", which send visitors to a port where nobody listens"
        level = Level.FAILED if redirects else Level.WARNING
        return Finding("leftovers", level, cause, "remove them by: acme-alpn-proxy stop")

    @inlineCallbacks
    def _try_it(self) -> Generator[Deferred[Any], Any, None]:
        if self._running is not None:
            cause = f"not done: an instance runs as PID {self._running}"
            self._tell(Finding("probe", Level.WARNING, cause, "stop it first"))
        elif worst(self.findings) is Level.FAILED:
            cause = "not done: visitors would be steered, and something failed"
            self._tell(Finding("probe", Level.WARNING, cause, "see above"))
        else:
            yield self._probe(self._reactor, self._options, self._tell)


def why_not_writable(path: str) -> str | None:
    """Why a file cannot be written, or made; L{None} if it can. Nothing is made."""
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
    """Whether nobody listens on this port, at whatever address. Does not listen there."""
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104
        try:
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((host, port))
        except OSError as problem:
            if problem.errno == errno.EADDRINUSE:
                return False
    return True


def _remedy(binary: str, result: Result) -> str:
    if result.code == NOT_FOUND:
        return f"install {binary}, or put its folder (often /usr/sbin) on PATH"
    if not may_administer_network():
        return AS_ADMINISTRATOR
    return f"see why '{binary} -t nat -L' does not work here"


def document(findings: Sequence[Finding]) -> str:
    """All of it as JSON."""
    checks = [finding.as_object() for finding in findings]
    return json.dumps({"verdict": str(worst(findings)), "checks": checks}, indent=2)


def run(options: ConsoleOptions, pidfile: PIDFile) -> bool:
    """Check, and print what was found. Whether nothing failed."""
    from twisted.internet import reactor as installed

    from .probe import probe

    reactor: Any = installed

    checks: list[Check] = []
    failures: list[Failure] = []

    def tell(finding: Finding) -> None:
        if not options["json"]:
            print(finding, flush=True)

    def start() -> None:
        # Until the probe steers, whose end takes time: nothing is left of a process that is killed.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        check = Check(reactor, options, pidfile, commands_for(reactor), tell, probe=probe)
        checks.append(check)
        done = check.run().addErrback(failures.append)
        reactor.addSystemEventTrigger("before", "shutdown", lambda: done)
        done.addBoth(stop)

    def stop(result: object) -> None:
        try:
            reactor.stop()
        except ReactorNotRunning:
            pass  # by a signal

    globalLogBeginner.beginLoggingTo([], discardBuffer=True, redirectStandardIO=False)
    reactor.callWhenRunning(start)
    reactor.run()
    for failure in failures:
        failure.raiseException()
    (check,) = checks
    if options["json"]:
        print(document(check.findings), flush=True)
    return worst(check.findings) is not Level.FAILED
