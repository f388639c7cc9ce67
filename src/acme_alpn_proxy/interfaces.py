"""The contracts that applications may implement or use, and the values that go with them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socket import AddressFamily, socket
from typing import TYPE_CHECKING, Any, Final, Protocol

from zope.interface import Interface, implementer

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import (
        IConnector,
        IDelayedCall,
        IListeningPort,
        IProcessProtocol,
        IProtocolFactory,
        IReactorTime,
        IReadDescriptor,
    )
    from twisted.internet.protocol import Factory

    from .addresses import Address
    from .transports.sockets import TargetFactory
else:
    IReactorTime = Interface  # C{status} and C{stop} do without twisted.internet

CANNOT_RUN: Final = 126
NOT_FOUND: Final = 127
"""A shell's exit statuses for a command that cannot be executed, or is not found (POSIX, Shell
Command Language, 2.8.2)."""

ENDED_BY_SIGNAL: Final = 128
"""For a command that a signal ended, a shell adds the signal's number to this."""

KILLED: Final = ENDED_BY_SIGNAL + 9


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended.

    @ivar code: its exit status; L{NOT_FOUND} if there is no such program, L{CANNOT_RUN} if it
        cannot be run, L{KILLED} if it was killed, also when it passed its deadline.
    @ivar output: its standard output. Bytes that are not UTF-8 become lone surrogates
        (C{surrogateescape}), so that they can be passed to a command unchanged.
    @ivar errors: its standard error, or why it could not be run.
    """

    argv: tuple[str, ...]
    code: int
    output: str
    errors: str = ""

    @classmethod
    def of(cls, argv: Sequence[str], code: int, output: bytes, errors: bytes = b"") -> Result:
        """From raw output."""
        told, complaints = (raw.decode("utf-8", "surrogateescape") for raw in (output, errors))
        return cls(tuple(argv), code, told, complaints)

    @classmethod
    def not_found(cls, argv: Sequence[str]) -> Result:
        """There is no program of that name."""
        return cls(tuple(argv), NOT_FOUND, "", f"{argv[0]}: not found on PATH")

    @property
    def one_line(self) -> str:
        """Both outputs, for an error message; bytes that are not UTF-8 are escaped."""
        words = " ".join(f"{self.output}\n{self.errors}".split()) or "it printed nothing"
        return words.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    @property
    def failure(self) -> str:
        """The command, its exit status and its outputs, on one line."""
        return f"'{shlex.join(self.argv)}' failed with status {self.code}: {self.one_line}"


@implementer(IReactorTime)
class Reactor(Protocol):
    """What the proxy needs from a reactor. Twisted's reactors on Linux all have it."""

    running: bool

    def seconds(self) -> float: ...
    def callLater(
        self,
        delay: float,
        callable: Callable[..., Any],  # noqa: A002
        *args: object,
        **kwargs: object,
    ) -> IDelayedCall: ...
    def getDelayedCalls(self) -> Sequence[IDelayedCall]: ...
    def addReader(self, reader: IReadDescriptor, /) -> None: ...
    def removeReader(self, reader: IReadDescriptor, /) -> None: ...
    def adoptStreamPort(
        self, descriptor: int, family: AddressFamily, factory: Factory, /
    ) -> IListeningPort: ...
    def adoptStreamConnection(
        self, descriptor: int, family: AddressFamily, factory: Factory, /
    ) -> None: ...
    def spawnProcess(
        self, protocol: IProcessProtocol, executable: str, /, *arguments: Any, **named: Any
    ) -> object: ...
    def callWhenRunning(self, function: Callable[..., Any], /) -> object: ...
    def callFromThread(self, function: Callable[..., Any], /, *arguments: object) -> None: ...
    def addSystemEventTrigger(
        self, phase: str, event: str, function: Callable[..., Any], /
    ) -> object: ...
    def listenTCP(
        self, port: int, factory: IProtocolFactory, /, *, interface: str
    ) -> IListeningPort: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...


class ITarget(Interface):
    """A way to connect to an address."""

    def connect(factory: TargetFactory, first: bytes = b"") -> IConnector | None:
        """Connect the factory's protocol, or call its C{clientConnectionFailed}.

        Either may happen before this returns; then C{None} may be returned.

        @param factory: C{factory.arrival()} returns the addresses of the visitor's connection.
        @param first: what the protocol will write first. Some of it may be sent before the protocol
            is made; C{factory.sent_ahead} is the number of those bytes.
        """


class INetwork(Interface):
    """The kind of transports for visitors and targets."""

    def open() -> None:
        """Get ready for the calls below, except C{target}, which may be called earlier."""

    def listen(listener: socket, factory: Factory) -> IListeningPort:
        """Accept connections from C{listener}, which still belongs to the caller.

        The returned port is also an C{IPushProducer} of connections.
        """

    def adopt(visitor: socket, factory: Factory) -> None:
        """Take over a connection that the caller has accepted."""

    def target(address: Address, timeout: float) -> ITarget:
        """A way to connect to C{address}, in C{timeout} seconds at most."""

    def close() -> None:
        """Free what C{open} allocated. All connections have ended."""


class IPIDFile(Interface):
    """A PID file, which shows that an instance is running; or a stand-in that does nothing."""

    def claim() -> None:
        """Claim it for this process; raises L{acme_alpn_proxy.errors.StartError}."""

    def release() -> None:
        """Remove it if it still belongs to this process. Never raises."""


class ICommands(Interface):
    """A way to run commands and to wait: blocking, or through the reactor."""

    def run(argv: Sequence[str]) -> Deferred[Result]:
        """Run C{argv} without a shell.

        @return: a Deferred that never fails: a missing program and a passed deadline are results.
        """

    def pause(seconds: float) -> Deferred[None]:
        """Return a Deferred that fires after that time."""


class ISteerable(Interface):
    """Something that steers on request."""

    def need(what: object) -> Deferred[None]:
        """Steer for as long as C{what} needs it.

        @return: a Deferred that fires when new connections are steered. If it fails, with
            L{acme_alpn_proxy.errors.StartError}, the need is forgotten.
        """

    def needed_no_more(what: object) -> None:
        """Steer no longer because of C{what}; no error if C{what} does not need it."""


class IRedirect(Interface):
    """A way to have new connections to :443 delivered to the proxy.

    Each Deferred may fail with L{acme_alpn_proxy.errors.StartError}. With blocking C{commands} it
    has already fired when it is returned.
    """

    def prepare(commands: ICommands) -> Deferred[Sequence[str]]:
        """Refuse now if it is known that steering would fail. Changes nothing.

        @return: a Deferred of the numeric addresses to listen on; C{"::"} means every address of
            both families. Addresses that this host does not have are skipped, if at least one is
            left. The port is the proxy's, 21443; C{"127.0.0.1:0"} and C{"[::1]:0"} mean any free
            port.
        """

    def apply(commands: ICommands, listeners: Sequence[socket]) -> Deferred[None]:
        """Steer new connections to C{listeners}, the listening sockets.

        If it fails, nothing is left applied. What is applied ends with the process, also if the
        process is killed.
        """

    def look_after(commands: ICommands) -> Deferred[None]:
        """Put back what other programs have removed. To be called every few seconds."""

    def remove(commands: ICommands) -> Deferred[None]:
        """Stop steering. Connections that were steered go on. Does nothing if not applied."""

    def release(commands: ICommands) -> Deferred[None]:
        """Remove what kept steered connections working: the last of them has ended."""
