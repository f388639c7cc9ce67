"""Limits on connections, half hellos and silence, and what happens when they are reached."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from twisted.internet.main import CONNECTION_DONE
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import formatEvent
from twisted.python.failure import Failure
from twisted.python.usage import UsageError
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from acme_alpn_proxy.interfaces import ITarget
from acme_alpn_proxy.options import ProxyOptions
from acme_alpn_proxy.proxy import protocols
from acme_alpn_proxy.proxy.protocols import (
    IDLE_LOOKS,
    Limits,
    ProxyServer,
    ProxyServerFactory,
)
from acme_alpn_proxy.proxy.routing import Route, Routing
from acme_alpn_proxy.proxy.validations import MAX_VALIDATIONS, VALIDATION_DEADLINE
from acme_alpn_proxy.transports.hangup import NoHangupWatch

from ..hellos import ACME_HELLO, WEB_HELLO
from ..integration.netns import wait_until
from ..loopback import read_exactly
from ..memory import log_of
from ..service_case import Live, ServiceCase

WEB = Route("fallback", "web")


@implementer(ITarget)
class Target:
    """Connects transports in memory, at once unless it is set to wait."""

    def __init__(self) -> None:
        self.transports: list[Any] = []

    def connect(self, factory: Any, first: bytes = b"") -> None:
        transport = StringTransport()
        self.transports.append(transport)
        factory.buildProtocol(None).makeConnection(transport)


class MemoryCase(SynchronousTestCase):
    """Visitors in memory."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.target = Target()
        self.factory = ProxyServerFactory(
            Routing(Route("acme", "acme"), WEB), {WEB: self.target}, self.clock
        )

    def visit(self) -> ProxyServer:
        server: Any = self.factory.buildProtocol(None)
        server.makeConnection(StringTransport())
        return server  # type: ignore[no-any-return]


class HalfHelloTests(MemoryCase):
    def test_all_together(self) -> None:
        """When half hellos take too much memory the oldest visitors go to the web server."""
        self.patch(protocols, "MAX_HELD", 1_000)
        _, first, second, third = (self.visit() for _ in range(4))
        first.dataReceived(WEB_HELLO[:200])
        second.dataReceived(WEB_HELLO[:200])
        self.assertEqual(self.target.transports, [])
        third.dataReceived(WEB_HELLO[:200])
        gone_on = [transport.value() for transport in self.target.transports]
        self.assertEqual(gone_on, [b"", WEB_HELLO[:200]])
        first.dataReceived(WEB_HELLO[200:])
        self.assertEqual(self.target.transports[1].value(), WEB_HELLO)
        self.assertEqual(self.factory.held, 800)
        self.assertEqual(self.factory.hellos.oldest(), second)

    def test_what_is_no_longer_held(self) -> None:
        """Whole hellos, visitors that have left and those past their deadline do not count any
        more."""
        whole, lost, late = (self.visit() for _ in range(3))
        for visitor in (whole, lost, late):
            visitor.dataReceived(WEB_HELLO[:200])
        self.assertEqual(self.factory.held, 1_200)
        whole.dataReceived(WEB_HELLO[200:])
        lost.connectionLost()
        self.assertEqual(self.factory.held, 400)
        self.clock.advance(5)
        self.assertEqual(self.factory.held, 0)
        self.assertEqual(len(self.target.transports), 2)


class IdleTests(MemoryCase):
    def test_idle(self) -> None:
        """An established connection without a byte either way is reset in the end."""
        busy, idle, undecided = (self.visit() for _ in range(3))
        busy.dataReceived(WEB_HELLO)
        idle.dataReceived(WEB_HELLO)
        for _ in range(IDLE_LOOKS + 1):
            busy.dataReceived(b"x")
            self.factory.look_for_idle()
        self.assertEqual(
            [visitor.transport.disconnected for visitor in (busy, idle, undecided)],
            [False, True, False],
        )
        self.assertTrue(self.target.transports[1].disconnected)

    def test_slow_receiver(self) -> None:
        """A connection whose bytes are still being taken is not idle."""
        visitor = self.visit()
        visitor.dataReceived(WEB_HELLO)
        for _ in range(IDLE_LOOKS + 1):
            self.target.transports[0].producer.resumeProducing()
            self.factory.look_for_idle()
        self.assertFalse(visitor.transport.disconnected)


class RoomTests(MemoryCase):
    """More visitors than there is room for."""

    def setUp(self) -> None:
        super().setUp()
        self.acme = Target()
        acme = Route("acme", "acme")
        self.factory = ProxyServerFactory(
            Routing(acme, WEB), {WEB: self.target, acme: self.acme}, self.clock
        )
        self.factory.open(NoHangupWatch(), Limits(100, 2), lambda: None, lambda: None)
        self.events = log_of(self)

    def arrive(self, count: int, hello: bytes = WEB_HELLO) -> list[ProxyServer]:
        servers = [self.visit() for _ in range(count)]
        for server in servers:
            server.dataReceived(hello)
        return servers

    def leave(self, server: ProxyServer) -> None:
        server.connectionLost(Failure(CONNECTION_DONE))
        if server._parser is None:  # then its target's end goes, too
            server.end_lost(server.relay.back)

    def test_visitors_wait(self) -> None:
        """Those over the limit wait with their hello, and come in, one by one, as others leave."""
        one, two, three, four, five = self.arrive(5)
        self.assertEqual(len(self.target.transports), 2)
        self.assertEqual(list(self.factory.waiting), [three, four, five])
        (event,) = self.events
        self.assertTrue(
            formatEvent(event).startswith("The limit of 2 visitors at a time is reached")
        )
        self.leave(four)  # who has lost patience
        self.leave(one)
        self.assertEqual(len(self.target.transports), 3)
        self.assertEqual(self.target.transports[2].value(), WEB_HELLO)
        self.assertEqual(list(self.factory.waiting), [five])
        for server in (two, three, five):
            self.leave(server)
        self.assertEqual(len(self.target.transports), 4)
        self.assertEqual(len(self.factory.live), 0)
        self.arrive(3)
        self.assertEqual(len(self.events), 2, "it is told again when it was over")

    def test_validations_do_not_wait(self) -> None:
        """A validation has its target at once, however many visitors wait."""
        self.arrive(20)
        self.arrive(1, ACME_HELLO)
        self.assertEqual(len(self.acme.transports), 1)

    def test_all_are_reset(self) -> None:
        """At the end of a drain those that wait are reset, too."""
        servers = self.arrive(4)
        self.factory.live.abort_all()
        self.assertTrue(all(server.transport.disconnecting for server in servers[2:]))

    def test_validations_bounded(self) -> None:
        """There are 64 validations at a time: for one more the oldest is reset. Each has a minute.
        Those that are reset are counted."""
        servers = self.arrive(MAX_VALIDATIONS + 1, ACME_HELLO)
        self.assertEqual(len(self.acme.transports), MAX_VALIDATIONS + 1)
        self.assertEqual(len(self.factory.validations), MAX_VALIDATIONS)
        self.assertEqual([server.transport.disconnecting for server in servers[:2]], [True, False])
        self.assertIn("check that the ACME client answers", formatEvent(self.events[-1]))
        self.clock.advance(VALIDATION_DEADLINE)
        self.assertTrue(all(server.transport.disconnecting for server in servers))
        for server in servers:
            self.leave(server)
        self.assertEqual(self.factory.statistics.acme.live, 0)
        shown = self.factory.statistics.status("none", 0)["routes"]["acme"]
        self.assertEqual(shown["cut_short"], MAX_VALIDATIONS + 1)
        self.arrive(1, ACME_HELLO)
        self.assertEqual(len(self.acme.transports), MAX_VALIDATIONS + 2)


class OptionsTests(SynchronousTestCase):
    def test_numbers(self) -> None:
        """Both limits take numbers, and are off or automatic by default."""
        options = ProxyOptions()
        options.parseOptions([])
        self.assertEqual((options["max-connections"], options["idle-timeout"]), (0, 0.0))
        options = ProxyOptions()
        options.parseOptions(["--max-connections", "100", "--idle-timeout=60"])
        self.assertEqual((options["max-connections"], options["idle-timeout"]), (100, 60.0))

    def test_not_a_number(self) -> None:
        """A value that is not a number is refused, and the message names the option."""
        for word in ("-1", "many", "1.5", ""):
            with self.assertRaisesRegex(UsageError, "--max-connections"):
                ProxyOptions().parseOptions(["--max-connections", word])


class Port:
    """A listening port that can be paused."""

    def __init__(self) -> None:
        self.paused = False

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False


class ServiceTests(ServiceCase):
    def test_max_connections(self) -> None:
        """The listener pauses at three times as many connections as C{--max-connections} allows
        visitors (two thirds may wait, or have no whole hello yet), until one of them leaves."""
        port = Port()
        self.proxy = self.make_proxy(max_connections=2)
        self.proxy.startService()
        self.proxy.listener._ports = [port]
        one, *_ = [Live(self.factory, self.story) for _ in range(5)]
        self.assertFalse(port.paused)
        Live(self.factory, self.story)
        self.assertTrue(port.paused)
        one.end()
        self.assertFalse(port.paused)
        self.proxy.listener._ports = []

    def test_idle_timeout(self) -> None:
        """With an idle timeout it looks at all connections now and then, until it has stopped."""
        self.factory = self.make_factory(idle_timeout=40.0)
        self.proxy = self.make_proxy()
        self.proxy.startService()
        live = Live(self.factory, self.story)
        looks: list[float] = []
        self.patch(live, "look", lambda: looks.append(self.reactor.seconds()))
        for _ in range(4):
            self.reactor.advance(10)
        self.assertEqual(looks, [10, 20, 30, 40])
        live.end()
        stopped = self.proxy.stopService()
        self.linger()
        self.successResultOf(stopped)
        self.assertEqual(self.reactor.getDelayedCalls(), [])


PROGRAM = """
import resource, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from twisted.internet import reactor
from acme_alpn_proxy import options, tap
from acme_alpn_proxy.redirects import none
none.NoRedirect.hosts = ("127.0.0.1",)
words = options.ProxyOptions()
words.environment = {}
words.parseOptions(sys.argv[2:])
tap.PORT = 0
tap.require_web_server = lambda *words: None
proxy = tap.make_proxy(words, reactor)
proxy.startService()
print(proxy.listener.sockets[0].getsockname()[1], flush=True)

turns, turn = 0, reactor.doIteration

def counted(timeout):
    global turns
    turns += 1
    turn(timeout)

def tell():
    for _ in sys.stdin:
        print(turns, flush=True)

reactor.doIteration = counted
threading.Thread(target=tell, daemon=True).start()
reactor.run()
"""
"""It prints its port, and, for each line that it reads, how often its reactor has turned."""

WAIT = 20.0


class ExhaustionTests(SynchronousTestCase):
    """A whole process that may have 256 open files."""

    def start(self, *options: str) -> None:
        self.website = socket.create_server(("127.0.0.1", 0), backlog=4_096)
        self.website.settimeout(WAIT)
        self.addCleanup(self.website.close)
        web = f"127.0.0.1:{self.website.getsockname()[1]}"
        command = [sys.executable, "-c", PROGRAM, "", "--redirect", "none", "--fallback", web]
        command += ["--visitor-address", "off"]  # which would change this host's routes
        self.process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.addCleanup(self.end)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def visit(self, hello: bytes = WEB_HELLO) -> socket.socket:
        visitor = socket.create_connection(("127.0.0.1", self.port), WAIT)
        self.addCleanup(visitor.close)
        visitor.sendall(hello)
        return visitor

    def turns(self) -> int:
        """How often its reactor has turned by now."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def rests(self) -> bool:
        """Whether the proxy's reactor turns seldom: it tries again to accept those that wait, but
        not often."""
        before = self.turns()
        time.sleep(0.5)
        return self.turns() < before + 50

    def serve_all(self, visitors: list[socket.socket], hello: bytes = WEB_HELLO) -> None:
        """Answer connections in the order of their arrival; each leaves after its answer."""
        waiting = {visitor.fileno(): visitor for visitor in visitors}
        poll = select.poll()
        poll.register(self.website, select.POLLIN)
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        while waiting:
            ready = [descriptor for descriptor, _ in poll.poll(WAIT * 1000)]
            self.assertTrue(ready, f"{len(waiting)} visitors wait for ever")
            for descriptor in ready:
                if descriptor in waiting:
                    poll.unregister(descriptor)
                    with waiting.pop(descriptor) as visitor:
                        self.assertEqual(read_exactly(visitor, 100), b"answer")
                else:
                    server, _ = self.website.accept()
                    self.addCleanup(server.close)
                    server.settimeout(WAIT)
                    self.assertEqual(read_exactly(server, len(hello)), hello)
                    server.sendall(b"answer")
                    server.shutdown(socket.SHUT_WR)

    def flood(self) -> None:
        """300 visitors at once: those over the limit wait, the proxy rests, then all are served."""
        visitors = [self.visit() for _ in range(300)]
        self.assertTrue(select.select([self.website], [], [], WAIT)[0])
        wait_until(self.rests, "the proxy rests", WAIT)
        closer = [visitor for visitor in visitors if select.select([visitor], [], [], 0)[0]]
        self.assertEqual(closer, [], "a visitor was sent away")
        self.serve_all(visitors)

    def test_max_connections(self) -> None:
        """Over the limit that follows from the open files visitors wait, and all are served."""
        self.start()
        self.flood()
        self.flood()

    def test_out_of_descriptors(self) -> None:
        """If the operator's limit is too high and descriptors run out, visitors wait, and all are
        served."""
        self.start("--max-connections", "10000")
        self.flood()
        self.flood()

    def test_silence(self) -> None:
        """A flood of silence and half hellos over the limit delays no visitor for long."""
        self.start("--hello-timeout", "0.5")
        silent = [self.visit(b"" if n % 2 else WEB_HELLO[:50]) for n in range(150)]
        began = time.monotonic()
        self.serve_all([*silent, self.visit()], b"")
        self.assertLess(time.monotonic() - began, 5)
