"""Targets that receive a header before the visitor's bytes."""

from __future__ import annotations

from typing import Any

from zope.interface import implementer

from ..interfaces import ITarget
from ..transports.sockets import TargetFactory
from .header import ENCODERS, version_of


@implementer(ITarget)
class HeadedTarget:
    """A target that first receives the visitor's address (PROXY protocol, section 2).

    Header and hello are sent in one write: nginx and HAProxy reset a connection whose header comes
    in pieces.
    """

    def __init__(self, target: ITarget, version: str) -> None:
        """
        @param version: C{v1} or C{v2}.
        """
        self._target = target
        self._version = version
        self._encode = ENCODERS[version]

    def connect(self, factory: TargetFactory, first: bytes = b"") -> Any:
        arrival = factory.arrival()
        if arrival.header and version_of(arrival.header) == self._version:
            header = arrival.header  # it may have more fields from a load balancer
        else:
            header = self._encode(arrival.visitor, arrival.dialled)
        factory.lead_with(header)
        return self._target.connect(factory, header + first)
