"""A separate target for each visitor: the address that it connected to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from zope.interface import implementer

from ..interfaces import ITarget
from .sockets import TargetFactory

DialledTarget: TypeAlias = Callable[[str, int], ITarget]


@implementer(ITarget)
class OriginalTarget:
    """Connects to the address of this host that the visitor's connection came to.

    The connection must come from that same address. With another of this host's addresses as its
    source, BPF C{sk_lookup} would steer it back here.
    """

    def __init__(self, at: DialledTarget, own_port: int, instead: int) -> None:
        """
        @param at: returns the target for an address and a port, bound to that address.
        @param own_port: the port of the proxy itself: visitors who connect to it get C{instead}.
        """
        self._at = at
        self._own_port = own_port
        self._instead = instead

    def connect(self, factory: TargetFactory, first: bytes = b"") -> Any:
        host, port = factory.arrival().here
        if port == self._own_port:
            port = self._instead
        return self._at(host, port).connect(factory, first)
