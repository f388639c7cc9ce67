"""The findings of the probe in many situations; tests/integration/test_check.py really connects."""

from __future__ import annotations

import errno
import socket
from types import SimpleNamespace
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import fail, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import Logger
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.diagnosis import probe
from acme_alpn_proxy.diagnosis.finding import Finding, Level
from acme_alpn_proxy.diagnosis.probe import ANSWER, Caller, Dial, judge
from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.options import ConsoleOptions
from acme_alpn_proxy.proxy.routing import Route, Routing

SOURCE = ("169.254.200.2", 40_000)
SERVER_HELLO = b"\x16\x03\x03\x00\x7a"
VISITOR = Caller("visitor", 4, (b"hello",))
VALIDATOR = Caller("validator", 6, (b"he", b"llo"))


class DialTests(SynchronousTestCase):
    def dial(self, listener: socket.socket, *segments: bytes) -> Dial:
        host, port = listener.getsockname()
        return probe.dial(socket.socket(), host, port, segments)

    def test_nobody_listens(self) -> None:
        """A refused connection has no source."""
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            self.assertEqual(self.dial(bound, b"hello"), Dial(problem="Connection refused"))

    def test_silence(self) -> None:
        """A connection of the probe does not wait for ever for an answer."""
        self.patch(probe, "DIAL_DEADLINE", 0.05)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            call = self.dial(listener, b"hel", b"lo")
            self.assertEqual(call.problem, "no answer within 0.05 s")
            visitor, source = listener.accept()
            with visitor:
                self.assertEqual((visitor.recv(9), source), (b"hello", call.source))


class ResponderTests(SynchronousTestCase):
    def test_whole_hello(self) -> None:
        """It answers when a whole record is there, however it comes, and then ends."""
        seen: set[bytes] = set()
        responder, transport = probe.Responder(seen), StringTransport()
        responder.makeConnection(transport)
        for piece in (b"\x16\x03", b"\x01\x00\x05he", b"ll"):
            responder.dataReceived(piece)
            self.assertEqual((transport.value(), seen), (b"", set()))
        responder.dataReceived(b"o")
        self.assertEqual(transport.value(), ANSWER)
        self.assertEqual(seen, {b"\x16\x03\x01\x00\x05hello"})
        self.assertTrue(transport.disconnecting)

    def test_who_came(self) -> None:
        """The proxy of a probe remembers its visitors, also IPv4 ones at its dual-stack
        listener."""
        routes = Route("acme", "a"), Route("fallback", "b")
        factory = probe._NotingFactory(Routing(*routes), {}, Clock())
        factory.buildProtocol(IPv6Address("TCP", "::ffff:192.0.2.1", 40_000))
        factory.buildProtocol(IPv6Address("TCP", "2001:db8::1", 40_001))
        factory.buildProtocol(IPv4Address("TCP", "192.0.2.2", 40_002))
        self.assertEqual(
            factory.met, {("192.0.2.1", 40_000), ("2001:db8::1", 40_001), ("192.0.2.2", 40_002)}
        )


class VerdictTests(SynchronousTestCase):
    def verdict(
        self,
        caller: Caller,
        call: Dial,
        *,
        steered: bool = True,
        seen: bool = False,
        redirect: str = "iptables",
    ) -> Finding:
        met = {SOURCE} if steered else set()
        return judge(caller, call, met, {b"hello"} if seen else set(), redirect)

    def fails(self, pattern: str, *arguments: Any, **named: Any) -> None:
        finding = self.verdict(*arguments, **named)
        self.assertIs(finding.level, Level.FAILED)
        self.assertRegex(f"{finding.cause}; {finding.remedy}", pattern)

    def test_well(self) -> None:
        """A visitor gets a TLS answer through the proxy, a validator the responder's answer."""
        for answer in (SERVER_HELLO, ANSWER):
            finding = self.verdict(VISITOR, Dial(SOURCE, answer))
            self.assertEqual(finding, Finding("probe visitor IPv4", Level.OK))
        finding = self.verdict(VALIDATOR, Dial(SOURCE, ANSWER), seen=True)
        self.assertEqual(finding, Finding("probe validator IPv6", Level.OK))

    def test_seen_by_the_web_server(self) -> None:
        """The finding says which address the web server saw: the visitor's own, or one of this
        host."""
        for address, whose in ((SOURCE[0], "its own"), ("127.0.0.1", "an address of this host")):
            call = Dial(SOURCE, SERVER_HELLO)
            finding = judge(VISITOR, call, {SOURCE}, set(), "iptables", address)
            self.assertIs(finding.level, Level.OK)
            self.assertIn(f"the web server saw it as {address}, {whose}", finding.cause)

    def test_not_steered(self) -> None:
        """A visitor answered without the proxy was not steered; the remedy is another way."""
        call = Dial(SOURCE, SERVER_HELLO)
        self.fails("not through the proxy; .*another --redirect$", VISITOR, call, steered=False)
        pattern = "not through the proxy; .*another --redirect$"
        self.fails(pattern, VALIDATOR, call, steered=False, redirect="sk-lookup")

    def test_dropped(self) -> None:
        """If it cannot connect, a firewall is in the way: the remedy names the port that it
        sees."""
        call = Dial(problem="no answer within 3 s")
        pattern = "no answer within 3 s; .* port 21443, .*another --redirect$"
        self.fails(pattern, VISITOR, call, steered=False)
        pattern = "firewall accepts connections to port 443$"
        self.fails(pattern, VALIDATOR, call, steered=False, redirect="sk-lookup")

    def test_not_through(self) -> None:
        """If it was steered but reached no target, the finding says what came instead."""
        self.fails("through to the web server: the connection was closed; ", VISITOR, Dial(SOURCE))
        self.fails("server: the answer is not TLS; ", VISITOR, Dial(SOURCE, b"HTTP/1.1 400"))
        self.fails(
            "to the probe's own ACME client: reset; ", VALIDATOR, Dial(SOURCE, problem="reset")
        )

    def test_answer_lost(self) -> None:
        """If the answer to a validator does not come back, that is a failure."""
        for call in (Dial(SOURCE, problem="no answer within 3 s"), Dial(SOURCE, SERVER_HELLO)):
            self.fails("the answer did not arrive: ", VALIDATOR, call, seen=True)

    def test_softened(self) -> None:
        """If the firewall names interfaces, it is a warning, with the same cause."""
        finding = probe.softened(Finding("probe", Level.FAILED, "dropped", "let it in"))
        self.assertIs(finding.level, Level.WARNING)
        self.assertRegex(finding.cause, "^dropped .*uses another one")
        self.assertRegex(
            finding.remedy, "^test from another host: .*; if that fails, too: let it in$"
        )


class ProbeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.findings: list[Finding] = []
        self.options = ConsoleOptions()
        self.options.environment = {}
        self.options.parseOptions(["check", "--probe"])

    def test_no_namespace(self) -> None:
        """If no namespace can be made, nothing is steered, and a finding says so."""

        def refuse(link: str, families: list[int]) -> None:
            raise StartError("no; be root")

        self.patch(probe, "Namespace", refuse)
        reactor: Any = None
        self.successResultOf(probe.probe(reactor, self.options, self.findings.append))
        self.assertEqual(self.findings, [Finding("probe", Level.FAILED, "no", "be root")])

    def test_no_port(self) -> None:
        """Without a port for the responder, nothing is steered, and the namespace is removed."""
        closed: list[bool] = []
        namespace = SimpleNamespace(close=lambda: closed.append(True))
        self.patch(probe, "Namespace", lambda link, families: namespace)

        def listen(port: int, factory: object, interface: str) -> None:
            problem = OSError(errno.EMFILE, "Too many open files")
            raise CannotListenError(interface, port, problem)

        reactor: Any = SimpleNamespace(listenTCP=listen)
        self.successResultOf(probe.probe(reactor, self.options, self.findings.append))
        self.assertRegex(str(self.findings[0]), "^failed  probe: cannot listen on 127.0.0.1: .*Too")
        self.assertEqual(closed, [True])

    def test_defect(self) -> None:
        """If a connection attempt raises an exception, the proxy still stops in order."""
        stopped: list[str] = []
        port = SimpleNamespace(
            getHost=lambda: IPv4Address("TCP", "127.0.0.1", 40_000),
            stopListening=lambda: stopped.append("responder"),
        )
        proxy = SimpleNamespace(
            when_started=lambda: succeed(None),
            stopService=lambda: stopped.append("proxy"),
            steering=SimpleNamespace(),
        )
        program = SimpleNamespace(privilegedStartService=lambda: None)
        namespace = SimpleNamespace(close=lambda: stopped.append("namespace"), subnets={4: None})
        self.patch(probe, "Namespace", lambda link, families: namespace)
        self.patch(probe, "make_proxy", lambda options, reactor, factory: proxy)
        self.patch(probe, "Program", lambda reactor, proxy: program)
        self.patch(probe, "_dial_all", lambda namespace, who: fail(ZeroDivisionError()))
        reactor: Any = SimpleNamespace(listenTCP=lambda port_number, factory, interface: port)
        trying = probe.probe(reactor, self.options, self.findings.append)
        self.failureResultOf(trying, ZeroDivisionError)
        self.assertEqual(stopped, ["proxy", "responder", "namespace"])

    def test_log(self) -> None:
        """The proxy's warnings are findings, and so are its messages to the operator."""
        log = Logger()

        def steer(*arguments: object) -> Any:
            log.warn("Another program is there; the last wins")
            log.error("Cannot reach {target}", target="127.0.0.1:443")
            log.info("Steering by sk-lookup", for_operator=True)
            log.info("Started")
            return succeed(None)

        self.patch(probe, "_steer_and_dial", steer)
        namespace = SimpleNamespace(close=lambda: None)
        self.patch(probe, "Namespace", lambda link, families: namespace)
        reactor: Any = None
        self.successResultOf(probe.probe(reactor, self.options, self.findings.append))
        log.warn("this is not a finding any more")
        self.assertEqual(
            self.findings,
            [
                Finding("probe", Level.WARNING, "Another program is there", "the last wins"),
                Finding("probe", Level.WARNING, "Cannot reach 127.0.0.1:443"),
                Finding("probe", Level.OK, "Steering by sk-lookup"),
            ],
        )
