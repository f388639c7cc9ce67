"""Contracts of the transports, without logic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zope.interface import Attribute, Interface


class IDescriptorTransport(Interface):
    """A connection whose descriptor a relay may read and write directly.

    Its protocol is informed of a reset at once, even while the connection is not read.
    """

    read_size = Attribute("""The largest number of bytes that the protocol gets at once.""")
    receive = Attribute(
        """A callable that gets the bytes that are read: at first the protocol's
        C{dataReceived}. Assign another one to replace it."""
    )
    finishing = Attribute("""Whether the peer's FIN has been read: no bytes follow.""")
    waiting = Attribute("""The bytes that were written and are not yet taken by the kernel.""")
    producer = Attribute("""The producer that is paused while bytes wait, or C{None}.""")

    def write(data: bytes, flags: int = 0) -> None:
        """As in C{ITransport}; C{flags} are those of send(2)."""

    def fileno() -> int:
        """The descriptor, which may be a blocking one; -1 once it is closed."""

    def doRead() -> None:
        """Read now, as if data had been reported."""

    def rearm() -> None:
        """Report data that is already there, as if it had just arrived."""

    def read_by(reader: Callable[[], None] | None) -> None:
        """Call C{reader()} when data can be read; C{None}: read it for the protocol.

        The reader reads all there is, or calls C{rearm}.
        """

    def room() -> int:
        """About how many bytes the kernel would take now."""

    def trust() -> None:
        """The peer has shown that it reads: lift the limit on bytes that the kernel keeps for
        it."""

    def failed(problem: OSError) -> None:
        """Using the descriptor raised C{problem}: end the connection as lost."""


class IPoller(Interface):
    """One epoll for many descriptors; their handlers have C{ready(events)} and C{connectionLost}.

    It is an C{IReadDescriptor}, too.
    """

    READ = Attribute("""The event that there is something to read.""")

    def add(descriptor: int, handler: Any, events: int) -> None:
        """Report C{events} to C{handler}."""

    def turn(timeout: float) -> bool:
        """Wait for events, at most C{timeout} seconds (-1: without limit), and report them.

        @return: whether there were any.
        """


class IPollerHost(Interface):
    """A reactor that can wait in a poller's epoll, with its own descriptors in it."""

    def invite(poller: IPoller) -> None:
        """Handle C{poller}'s events from now on. If the reactor does not wait in another poller, it
        waits in this one."""

    def dismiss(poller: IPoller) -> None:
        """Stop handling C{poller}'s events."""


class IHangupWatch(Interface):
    """Notices a reset on a descriptor that is not being read at the moment."""

    def add(transport: Any, hung_up: Callable[[], None]) -> None:
        """Call C{hung_up()}, once, when the peer of C{transport} resets the connection."""

    def discard(transport: Any) -> None:
        """Stop watching C{transport}; no error if it is not watched."""

    def close() -> None:
        """Close the watch's own descriptor. Nothing is watched any more."""
