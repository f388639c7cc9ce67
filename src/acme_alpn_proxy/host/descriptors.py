"""Descriptors that a reactor reads."""

from __future__ import annotations

from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer


@implementer(IReadDescriptor)
class ReadDescriptor:
    """The part of C{IReadDescriptor} that is the same for all of ours.

    None of them is a transport: the reactor calls C{connectionLost} when it ends, and then there is
    nothing left to do.
    """

    log_prefix = "-"

    def fileno(self) -> int:
        raise NotImplementedError

    def doRead(self) -> None:
        raise NotImplementedError

    def connectionLost(self, reason: Failure) -> None:
        """The reactor ends with all its descriptors."""

    def logPrefix(self) -> str:
        return self.log_prefix
