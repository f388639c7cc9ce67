"""The probe: it steers for a moment, and connects to port 443 of this host as a visitor and as a
CA's validator.

The connections come from a separate network namespace, which a veth pair connects to the host. So
their packets take the same path through the kernel as those of real visitors. The namespace has no
name: only a thread and sockets of this process hold it. However this process ends, the namespace
disappears, and with it both ends of the pair.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher

from ..addresses import HTTPS, parse_address
from ..errors import StartError
from ..firewall.interfacerules import names_interfaces
from ..host.facts import has_ipv6, new_interfaces_have_ipv6
from ..host.processes import commands_for
from ..host.tcpsockets import shown
from ..interfaces import ICommands, Reactor
from ..options import PORT
from ..program import Program
from ..proxy.protocols import ProxyServer, ProxyServerFactory
from ..proxy.routing import Route
from ..proxy.webserver import sites
from ..tap import make_proxy
from .finding import Finding, Level
from .hellos import TLS_ANSWERS, acme_hello, server_name, visitor_hello
from .namespace import Namespace

DIAL_DEADLINE: Final = 3.0
"""Seconds for each step of a connection: enough for a second SYN, which follows after one second.
Not more, since visitors are steered in the meantime."""

FROM_OUTSIDE: Final = "test from another host: openssl s_client -connect SITE:443"

PAUSE: Final = 0.05
"""Seconds between the two segments of the validator's hello, so that the proxy reads the first one
alone."""

ANSWER: Final = b"\x15\x03\x03\x00\x02\x02\x50"
"""The answer of the probe's own responder: the alert internal_error (RFC 8446 section 6)."""

_RECORD_HEADER: Final = 5

Tell: TypeAlias = Callable[[Finding], None]
"""Reports a finding."""

Doing: TypeAlias = Callable[[str], None]
"""Reports a step that may take a while."""

Probe: TypeAlias = Callable[..., "Deferred[None]"]
"""A function like L{probe}."""

NamesInterfaces: TypeAlias = Callable[[ICommands, int], "Deferred[bool]"]


@dataclass(frozen=True, slots=True)
class Dial:
    """The result of a connection that the probe has made.

    @ivar source: address and port that it came from; empty if it did not connect.
    @ivar answer: the first bytes that came back; empty if the other end closed, or did not answer.
    @ivar problem: the kernel's error, if there was one.
    """

    source: tuple[str, int] = ("", 0)
    answer: bytes = b""
    problem: str = ""


def dial(connection: socket.socket, host: str, port: int, segments: Sequence[bytes]) -> Dial:
    """Connect, send the segments and wait for an answer. Blocks, for three deadlines at most."""
    source = ("", 0)
    with connection:
        connection.settimeout(DIAL_DEADLINE)
        try:
            connection.connect((host, port))
            source = connection.getsockname()[:2]
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at, segment in enumerate(segments):
                time.sleep(PAUSE if at else 0)
                connection.sendall(segment)
            return Dial(source, connection.recv(65_536))
        except TimeoutError:
            return Dial(source, problem=f"no answer within {DIAL_DEADLINE:g} s")
        except OSError as problem:
            return Dial(source, problem=problem.strerror or str(problem))


class Responder(Protocol):
    """Replaces the ACME client's responder: reads one hello, and answers."""

    def __init__(self, seen: set[bytes]) -> None:
        self._seen = seen
        self._hello = b""

    def dataReceived(self, data: bytes) -> None:
        self._hello += data
        if len(self._hello) >= _RECORD_HEADER:
            (length,) = struct.unpack_from("!H", self._hello, 3)
            if len(self._hello) >= _RECORD_HEADER + length:
                self._seen.add(self._hello)
                self.transport.write(ANSWER)  # type: ignore[union-attr]
                self.transport.loseConnection()  # type: ignore[union-attr]


class _NotingFactory(ProxyServerFactory):
    """Makes the proxy's connections, and records each one's peer.

    @ivar met: address and port of each peer.
    @ivar seen_as: for each peer that was connected to its target at once: the address that the
        target sees, by the peer's address and port.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.met: set[tuple[str, int]] = set()
        self.seen_as: dict[tuple[str, int], str] = {}

    def buildProtocol(self, addr: Any) -> Any:
        self.met.add((addr.host.removeprefix("::ffff:"), addr.port))
        return super().buildProtocol(addr)

    def connect(self, route: Route, server: ProxyServer, first: bytes) -> Any:
        connector = super().connect(route, server, first)
        dial = server.dialled()
        if dial is not None:
            self.seen_as[server.host, server.transport.getPeer().port] = dial[0][0]
        return connector


@dataclass(frozen=True, slots=True)
class Caller:
    """A simulated client: a visitor or a CA's validator.

    @ivar role: C{visitor} or C{validator}.
    @ivar segments: its hello.
    """

    role: str
    family: int
    segments: tuple[bytes, ...]

    @property
    def name(self) -> str:
        return f"probe {self.role} IPv{self.family}"


def callers(families: Sequence[int]) -> list[Caller]:
    """One visitor and one validator for each family."""
    name, found = server_name(), []
    for family in families:
        hello = acme_hello(name)
        half = len(hello) // 2
        found.append(Caller("visitor", family, (visitor_hello(name),)))
        found.append(Caller("validator", family, (hello[:half], hello[half:])))
    return found


def judge(
    caller: Caller,
    call: Dial,
    met: set[tuple[str, int]],
    seen: set[bytes],
    redirect: str,
    seen_as: str | None = None,
) -> Finding:
    """The finding for one connection of the probe.

    @param met: address and port of each connection that reached the proxy.
    @param seen: the hellos that the responder received.
    @param seen_as: the address that the target has seen, if known.
    """
    steered = call.source in met
    if caller.role == "validator" and b"".join(caller.segments) in seen:
        if call.answer == ANSWER:
            return Finding(caller.name, Level.OK)
        return Finding(
            caller.name,
            Level.FAILED,
            f"the answer did not arrive: {call.problem or 'another answer arrived'}",
            "check whether a firewall drops packets that leave from port 443",
        )
    if caller.role == "visitor" and steered and call.answer.startswith(TLS_ANSWERS):
        if seen_as is None:
            return Finding(caller.name, Level.OK)
        whose = "its own address" if seen_as == call.source[0] else "an address of this host"
        return Finding(caller.name, Level.OK, f"the web server saw it as {seen_as}, {whose}")
    if not steered:
        return Finding(caller.name, Level.FAILED, *_not_steered(call, redirect))
    where = "the web server"
    remedy = "check that --fallback is the address of the web server, and that it speaks TLS there"
    if caller.role == "validator":
        where = "the probe's own ACME client"
        remedy = "check whether a firewall blocks connections of this host to 127.0.0.1"
    closed = "the answer is not TLS" if call.answer else "the connection was closed"
    return Finding(
        caller.name,
        Level.FAILED,
        f"the proxy received the connection, but did not get through to {where}:"
        f" {call.problem or closed}",
        remedy,
    )


def _not_steered(call: Dial, redirect: str) -> tuple[str, str]:
    """The cause and the remedy."""
    if not call.source[1]:
        port = PORT if redirect == "iptables" else 443
        remedy = f"check that the firewall accepts connections to port {port}"
        if redirect == "iptables":
            remedy += ", which it sees instead of 443, or use another --redirect"
        return f"it cannot connect: {call.problem}", remedy
    cause = "it connected to port 443, but not through the proxy"
    if redirect == "iptables":
        return cause, (
            "check whether port 443 is exempt from connection tracking (iptables -t raw -S), or use"
            " another --redirect"
        )
    return cause, (
        "look for a rule that sends port 443 elsewhere, for example from Docker (iptables -t nat -S"
        " PREROUTING); if there is one, use another --redirect"
    )


def softened(finding: Finding) -> Finding:
    """The same finding as a warning, if the firewall's rules depend on the interface: visitors may
    be treated differently."""
    return Finding(
        finding.name,
        Level.WARNING,
        f"{finding.cause} (this may be wrong for visitors: the firewall has rules for certain"
        " interfaces, and the probe uses another one)",
        f"{FROM_OUTSIDE}; if that fails, too: {finding.remedy}",
    )


@contextmanager
def _log_told(tell: Tell) -> Iterator[None]:
    """Turn messages that are logged as a warning, or for the operator, into findings, too."""

    def observe(event: LogEvent) -> None:
        if event.get("log_level") in (LogLevel.warn, LogLevel.error):
            tell(Finding.refused("probe", formatEvent(event), Level.WARNING))
        elif event.get("for_operator"):
            tell(Finding("probe", Level.OK, formatEvent(event)))

    observer: Any = observe
    globalLogPublisher.addObserver(observer)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observer)


@inlineCallbacks
def probe(
    reactor: Reactor,
    options: Mapping[str, Any],
    tell: Tell,
    names: NamesInterfaces = names_interfaces,
    doing: Doing = lambda what: None,
) -> Generator[Deferred[Any], Any, None]:
    """Steer for a moment, and make connections. However this ends, nothing is left behind.

    @param reactor: is already running.
    @param tell: called with each finding.
    @param names: returns whether a rule of the firewall matches on an interface, for a family.
    @param doing: called with the name of each step that may take a while.
    """
    families = [4]
    if options["ipv6"] and has_ipv6():
        if new_interfaces_have_ipv6():
            families = [4, 6]
        else:
            cause = "IPv6 is not tested: new interfaces have no IPv6 on this host"
            remedy = f"set net.ipv6.conf.default.disable_ipv6=0, or {FROM_OUTSIDE}"
            tell(Finding("probe", Level.WARNING, cause, remedy))
    try:
        namespace = Namespace(f"aap{os.getpid()}", families)
    except StartError as problem:
        tell(Finding.refused("probe", problem))
        return
    try:
        with _log_told(tell):
            yield _steer_and_dial(reactor, options, namespace, tell, names, doing)
    except StartError as problem:
        tell(Finding.refused("probe", problem))
    finally:
        namespace.close()


@inlineCallbacks
def _steer_and_dial(
    reactor: Reactor,
    options: Mapping[str, Any],
    namespace: Namespace,
    tell: Tell,
    names: NamesInterfaces,
    doing: Doing,
) -> Generator[Deferred[Any], Any, None]:
    seen: set[bytes] = set()
    responder = Factory.forProtocol(lambda: Responder(seen))
    responder.noisy = False
    try:
        port = reactor.listenTCP(0, responder, interface="127.0.0.1")
    except CannotListenError as problem:
        raise StartError(
            f"cannot listen on 127.0.0.1: {problem.socketError}; see whether lo is up (ip address"
            " show lo)"
        ) from None
    where = cast(IPv4Address, port.getHost())
    alpn = parse_address(f"{where.host}:{where.port}")
    options = {**options, "alpn": alpn, "alpn-certs": None, "control": None, "metrics": None}
    options |= {"alpn-for": {}, "alpn-proxy-protocol": "none"}
    if options["fallback"].is_original:  # only the probe connects to its own addresses
        served, _ = yield deferToThread(sites)
        if served:
            options["fallback"] = parse_address(shown((served[0], HTTPS)))
    met: list[_NotingFactory] = []

    def factory(*arguments: Any, **named: Any) -> ProxyServerFactory:
        met.append(_NotingFactory(*arguments, **named))
        return met[0]

    proxy = make_proxy(options, reactor, factory=factory)
    proxy.steering.on_loss = None  # the probe itself finds out whether visitors arrive
    program = Program(reactor, proxy)
    program.on_refusal = lambda problem: None  # reported below
    who = callers(sorted(namespace.subnets))
    try:
        doing("steering")
        program.privilegedStartService()
        yield proxy.when_started()
        doing("connecting to port 443 from a network namespace")
        try:
            calls = yield _dial_all(namespace, who)
        except BaseException:
            yield proxy.stopService()
            raise
        redirect = proxy.status()["redirect"]
        let_go = proxy.stopService()
        try:
            for caller, call in zip(who, calls, strict=True):
                seen_as = met[0].seen_as.get(call.source)
                finding = judge(caller, call, met[0].met, seen, redirect, seen_as)
                well = finding.level is Level.OK
                if not well and (yield names(commands_for(reactor), caller.family)):
                    finding = softened(finding)
                if not program.ending:
                    tell(finding)
        finally:
            doing("stopping: waiting for the open connections of visitors")
            yield let_go
    finally:
        yield maybeDeferred(port.stopListening)
    if program.ending:
        raise StartError("interrupted; run it again")


def _dial_all(namespace: Namespace, who: Sequence[Caller]) -> Deferred[list[Dial]]:
    """Dial all at once, each in a thread."""
    calls = []
    for caller in who:
        connection = namespace.socket(caller.family)
        host = namespace.subnets[caller.family].host
        calls.append(deferToThread(dial, connection, host, 443, caller.segments))
    return gatherResults(calls, consumeErrors=True)
