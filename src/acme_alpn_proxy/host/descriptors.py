"""Descriptors that a reactor can read."""

from __future__ import annotations

from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer


@implementer(IReadDescriptor)
class ReadDescriptor:
    """The part of C{IReadDescriptor} that all our descriptors share.

    They are not transports: the reactor calls C{connectionLost} only when it stops, and then there
    is nothing left to do.
    """

    log_prefix = "-"

    def fileno(self) -> int:
        raise NotImplementedError

    def doRead(self) -> None:
        raise NotImplementedError

    def connectionLost(self, reason: Failure) -> None:
        """Nothing to do: the reactor stops, with all its descriptors."""

    def logPrefix(self) -> str:
        return self.log_prefix
