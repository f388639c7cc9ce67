"""Contracts, no logic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from socket import socket
from typing import TYPE_CHECKING, Any

from zope.interface import Attribute, Interface

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IConnector, IListeningPort
    from twisted.internet.protocol import ClientFactory, Factory

    from .addresses import Address
    from .host.processes import Result


class IRelay(Interface):
    """Moves the bytes of one connection between its two ends until both have ended.

    The transports belong to their protocols, which pass on what they are told; the relay is the
    only one to write to them and to close them.
    """

    def start(first: bytes) -> None:
        """Write C{first}, what the visitor has sent so far, to the back, and begin to move."""

    def received(source: object, data: bytes) -> None:
        """C{source} gave C{data}: pass it on."""

    def finished(source: object) -> None:
        """C{source} sent its FIN: pass it on at once, behind the bytes before it."""

    def lost(source: object) -> None:
        """C{source} is gone; unless it was closed here, the other end gets a reset."""

    def abort() -> None:
        """Reset both ends now."""


class IDescriptorTransport(Interface):
    """A connection whose descriptor a relay may read from and write to by itself.

    Its protocol hears of a reset at once, also while nobody reads.
    """

    read_size = Attribute("""Bytes that the protocol is given at most at once.""")
    receive = Attribute(
        """What is called with the bytes that are read: the protocol's C{dataReceived}, until
        another is put here."""
    )
    finishing = Attribute("""Whether the peer's FIN has been read: no bytes follow.""")
    waiting = Attribute("""The bytes that were written and are not yet taken by the kernel.""")
    producer = Attribute("""Who is paused while bytes wait, or C{None}.""")
    sent_ahead = Attribute(
        """How many of the bytes that L{ITarget.connect} was shown have been sent by now."""
    )

    def write(data: bytes, flags: int = 0) -> None:
        """As in C{ITransport}; C{flags} are those of send(2)."""

    def fileno() -> int:
        """The descriptor, which may be a blocking one; -1 once it is closed."""

    def doRead() -> None:
        """Read now, as if there were something."""

    def again() -> None:
        """Be told of what there is to read, as if it had come just now."""

    def read_by(reader: Callable[[], None] | None) -> None:
        """Call C{reader()} when there is something to read; C{None}: read it for the protocol.

        The reader reads all there is, or asks for it C{again}.
        """

    def write_by(writer: Callable[[], None] | None) -> None:
        """Call C{writer()} when something can be written, until this is called with C{None}."""

    def failed(problem: OSError) -> None:
        """The descriptor told this when it was used: the connection is lost."""


class ITarget(Interface):
    """A way to connect to an address."""

    def connect(factory: ClientFactory, first: bytes = b"") -> IConnector | None:
        """Connect the factory's protocol, or call its C{clientConnectionFailed}.

        Either may come before this returns; then there need not be a connector. C{first} is what
        the protocol is going to write first: it may be sent ahead, before there is a protocol.
        """


class INetwork(Interface):
    """The kind of transports for visitors and targets."""

    def open() -> None:
        """Be ready for the calls below except C{target}, which may come before."""

    def listen(listener: socket, factory: Factory) -> IListeningPort:
        """Accept connections from C{listener}, which stays the caller's.

        The port is an C{IPushProducer} of connections, too.
        """

    def adopt(visitor: socket, factory: Factory) -> None:
        """Take over a connection that the caller has accepted."""

    def target(address: Address, timeout: float) -> ITarget:
        """A way to connect to C{address}, in C{timeout} seconds at most."""

    def close() -> None:
        """Give back what C{open} took. All connections have ended."""


class IPoller(Interface):
    """One epoll for many descriptors; what is in it has C{ready(events)} and C{connectionLost}.

    It is an C{IReadDescriptor}, too.
    """

    READ = Attribute("""The event that there is something to read.""")

    def add(descriptor: int, handler: Any, events: int) -> None:
        """Report C{events} to C{handler}."""

    def turn(timeout: float) -> bool:
        """Wait for events, so many seconds at most (-1: for ever), and report them.

        @return: whether there were any.
        """


class IPollerHost(Interface):
    """A reactor that can wait by somebody else's epoll, with its own descriptors in that."""

    def invite(poller: IPoller) -> None:
        """Take C{poller}'s events from now on, and wait by it unless it is the second one."""

    def dismiss(poller: IPoller) -> None:
        """Take them no longer."""


class IHangupWatch(Interface):
    """Notices a reset on a descriptor from which nobody reads at the moment."""

    def add(transport: Any, hung_up: Callable[[], None]) -> None:
        """Call C{hung_up()}, once, when the peer of C{transport} resets the connection."""

    def discard(transport: Any) -> None:
        """Watch C{transport} no longer; it need not have been watched."""

    def close() -> None:
        """Give the watch's own descriptor back. Nothing is watched any more."""


class IPIDFile(Interface):
    """The mark that an instance is running."""

    def claim() -> None:
        """Take the mark for this process; raises L{acme_alpn_proxy.errors.StartError}."""

    def release() -> None:
        """Take the mark away if it is still this process's. Never raises."""


class ICommands(Interface):
    """A way to run commands and to wait, blocking or on the reactor."""

    def run(argv: Sequence[str]) -> Deferred[Result]:
        """Run C{argv} without a shell.

        @return: never fails: a missing binary and a passed deadline are results too.
        """

    def pause(seconds: float) -> Deferred[None]:
        """Fires after that time."""


class IRedirect(Interface):
    """A way to be given new connections to :443.

    Each Deferred may fail with L{acme_alpn_proxy.errors.StartError}. With blocking C{commands} it
    has fired when it is returned.
    """

    def prepare(commands: ICommands) -> Deferred[Sequence[str]]:
        """Refuse now what can be known to go wrong. Changes nothing.

        @return: a Deferred of the numeric addresses to listen on; C{"::"} is every address of both
            families. Those that this host has not are left out, as long as one is left.
        """

    def apply(commands: ICommands, listeners: Sequence[socket]) -> Deferred[None]:
        """Steer new connections to C{listeners}, the listening sockets.

        If it fails, nothing is left applied. What is applied goes when the process does, by
        whatever end.
        """

    def look_after(commands: ICommands) -> Deferred[None]:
        """Put back what others have wiped. Is called every few seconds."""

    def remove(commands: ICommands) -> Deferred[None]:
        """Steer no more. Connections that were steered go on. Nothing applied: does nothing."""

    def release(commands: ICommands) -> Deferred[None]:
        """The last steered connection has ended: let go of what kept them going."""
