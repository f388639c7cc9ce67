"""A proxy service with a reactor in memory, and a redirect that only records its calls."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec

from twisted.application.service import IService
from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from acme_alpn_proxy import service
from acme_alpn_proxy.host.tcpsockets import Handshake
from acme_alpn_proxy.interfaces import ICommands, IPIDFile, IRedirect
from acme_alpn_proxy.proxy.protocols import ProxyServerFactory
from acme_alpn_proxy.proxy.routing import Route, Routing
from acme_alpn_proxy.redirects import lostvisitors
from acme_alpn_proxy.redirects.lostvisitors import Syn
from acme_alpn_proxy.service import LINGER_STEP, ProxyService

from .memory import MemoryReactor

_P = ParamSpec("_P")


class NotingReactor(MemoryReactor):
    """A reactor in memory that never runs; it remembers what it adopts."""

    def __init__(self) -> None:
        super().__init__()
        self.story: list[str] = []
        self.accepted = 0

    def callWhenRunning(
        self,
        callable: Callable[_P, object],  # noqa: A002
        *args: _P.args,
        **kw: _P.kwargs,
    ) -> None:
        if self.running:
            callable(*args, **kw)
        else:
            super().callWhenRunning(callable, *args, **kw)

    def adoptStreamPort(self, descriptor: int, family: int, factory: Any) -> Any:
        self.story.append("listen")
        return Port(self.story)

    def adoptStreamConnection(self, descriptor: int, family: int, factory: Any) -> None:
        self.accepted += 1


class Port:
    """A listening port."""

    def __init__(self, story: list[str]) -> None:
        self._story = story

    def stopListening(self) -> Deferred[None]:
        self._story.append("close listener")
        return succeed(None)


@implementer(IRedirect)
class NotingRedirect:
    """Records its calls; can be set to fail, and to fire later."""

    def __init__(self, story: list[str]) -> None:
        self._story = story
        self.hosts: tuple[str, ...] = ("127.0.0.1",)
        self.problems: dict[str, Exception] = {}
        self.pending: dict[str, Deferred[None]] = {}
        self.commands: list[object] = []

    def hold(self, name: str) -> Deferred[None]:
        """Let the step C{name} wait until the returned Deferred fires."""
        return self.pending.setdefault(name, Deferred())

    def _step(self, name: str, commands: object) -> Deferred[None]:
        self._story.append(name)
        self.commands.append(commands)
        if name in self.problems:
            return fail(self.problems.pop(name))
        return self.pending.get(name) or succeed(None)

    def prepare(self, commands: ICommands) -> Deferred[Sequence[str]]:
        if "prepare" in self.problems:
            return fail(self.problems.pop("prepare"))
        return succeed(self.hosts)

    def look_after(self, commands: ICommands) -> Deferred[None]:
        return self._step("look", commands)

    def apply(self, commands: ICommands, listeners: Sequence[socket.socket]) -> Deferred[None]:
        assert all(listener.getsockname()[0] in self.hosts for listener in listeners)
        assert listeners
        return self._step("steer", commands)

    def remove(self, commands: ICommands) -> Deferred[None]:
        return self._step("let go", commands)

    def release(self, commands: ICommands) -> Deferred[None]:
        return self._step("release keeper", commands)


@implementer(IPIDFile)
class NotingPIDFile:
    def __init__(self, story: list[str]) -> None:
        self._story = story
        self.problem: Exception | None = None

    def claim(self) -> None:
        if self.problem is not None:
            raise self.problem
        self._story.append("claim PID file")

    def release(self) -> None:
        self._story.append("release PID file")


class Live:
    """A live connection."""

    def __init__(self, factory: ProxyServerFactory, story: list[str]) -> None:
        self._factory = factory
        self._story = story
        factory.live.enter(self)

    def abort(self) -> None:
        self._story.append("reset a connection")
        self._factory.live.leave(self)

    def look(self) -> None:
        """Do nothing: this connection is never idle."""

    def dialled(self) -> None:
        """Do nothing: this connection has no target."""

    def end(self) -> None:
        self._factory.live.leave(self)


class FakeSynSockets:
    """The SYNs that a test adds."""

    def __init__(self) -> None:
        self.listening = False
        self.came: list[tuple[Syn, float]] = []
        self.closed = False

    def listen(self, listening: bool) -> None:
        self.listening = listening

    def read(self) -> Iterator[tuple[Syn, float]]:
        came, self.came = self.came, []
        yield from came

    def close(self) -> None:
        self.closed = True


STARTED = ["claim PID file", "listen", "steer"]
LET_GO = ["let go", "release PID file"]
ENDED = ["release keeper"]


class ServiceCase(SynchronousTestCase):
    """A proxy service that records each step in C{story}."""

    def setUp(self) -> None:
        self.syn_sockets: list[FakeSynSockets] = []
        self.patch(lostvisitors, "SynSockets", self.new_syn_sockets)
        self.patch(service, "half_open", lambda *ports: set(self.half_open))
        self.half_open: set[Handshake] = set()
        self.reactor = NotingReactor()
        self.story = self.reactor.story
        self.redirect = NotingRedirect(self.story)
        self.pidfile = NotingPIDFile(self.story)
        self.factory = self.make_factory()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.proxy = self.make_proxy()

    def new_syn_sockets(self) -> FakeSynSockets:
        self.syn_sockets.append(FakeSynSockets())
        return self.syn_sockets[-1]

    def make_factory(self, **options: Any) -> ProxyServerFactory:
        routing = Routing(Route("acme", ""), Route("fallback", ""))
        return ProxyServerFactory(routing, {}, self.reactor, **options)

    def make_proxy(self, *beside: IService, **options: Any) -> ProxyService:
        proxy = ProxyService(
            self.reactor, self.factory, self.redirect, self.pidfile, port=self.port, **options
        )
        for each in beside:
            proxy.run_beside(each)
        self.addCleanup(proxy.listener.abandon)
        return proxy

    def linger(self, seconds: float = 0.5) -> None:
        """Advance the clock by the linger: the time for which a stop still accepts visitors."""
        self.reactor.pump([LINGER_STEP] * round(seconds / LINGER_STEP))

    def told(self, *steps: str) -> None:
        """Assert that exactly these steps were recorded since the last call, in this order."""
        self.assertEqual(self.story, list(steps))
        self.story.clear()
