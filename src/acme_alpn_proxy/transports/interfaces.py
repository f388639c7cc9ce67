"""Contracts of the transports, no logic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zope.interface import Attribute, Interface


class IDescriptorTransport(Interface):
    """A connection whose descriptor a relay may read from and write to by itself.

    Its protocol learns of a reset at once, even while it is not read.
    """

    read_size = Attribute("""Bytes that the protocol is given at most at once.""")
    receive = Attribute(
        """A callable that is given the bytes that are read: at first the protocol's
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
        """Read now, as if there were something."""

    def rearm() -> None:
        """Report what there is to read, as if it had come just now."""

    def read_by(reader: Callable[[], None] | None) -> None:
        """Call C{reader()} when there is something to read; C{None}: read it for the protocol.

        The reader reads all there is, or calls C{rearm}.
        """

    def room() -> int:
        """About how many bytes the kernel would take now."""

    def trust() -> None:
        """The peer reads what it is sent: the kernel may keep as many bytes for it as it likes."""

    def failed(problem: OSError) -> None:
        """Using the descriptor raised this: the connection is lost."""


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
    """A reactor that can wait in the epoll of a poller, with its own descriptors in it."""

    def invite(poller: IPoller) -> None:
        """Take C{poller}'s events from now on, and wait by it unless it is the second one."""

    def dismiss(poller: IPoller) -> None:
        """Take them no longer."""


class IHangupWatch(Interface):
    """Notices a reset on a descriptor that is not being read at the moment."""

    def add(transport: Any, hung_up: Callable[[], None]) -> None:
        """Call C{hung_up()}, once, when the peer of C{transport} resets the connection."""

    def discard(transport: Any) -> None:
        """Watch C{transport} no longer; it need not have been watched."""

    def close() -> None:
        """Close the watch's own descriptor. Nothing is watched any more."""
