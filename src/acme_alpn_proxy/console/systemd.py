"""Telling systemd how the service is: the protocol of sd_notify(3), without a library."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Final

from twisted.application.service import Service
from twisted.logger import ILogObserver, LogEvent, formatEvent
from zope.interface import implementer

from ..program import Program

SOCKET_VARIABLE: Final = "NOTIFY_SOCKET"

_PATIENCE: Final = 1.0
"""Seconds that a manager whose queue is full may hold this process up."""


def notify(environment: Mapping[str, str], **fields: object) -> None:
    """Send C{FIELD=value} lines in one datagram; where nobody has asked for it, do nothing.

    A manager that cannot be told is no reason to fail: it has deadlines of its own.

    @param environment: has the address in C{NOTIFY_SOCKET}: a path, or C{@} and an abstract name.
    """
    address = environment.get(SOCKET_VARIABLE, "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    lines = [f"{name}={' '.join(str(value).splitlines())}\n" for name, value in fields.items()]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(_PATIENCE)
            channel.connect(address)
            channel.send("".join(lines).encode())
    except (OSError, ValueError):  # ValueError: no address at all
        pass


@implementer(ILogObserver)
class ServiceManager(Service):
    """Tells systemd, if it has started this process, when it steers, when it stops, and what it
    does meanwhile. Starts last, and so stops first.
    """

    def __init__(self, program: Program, patience: float) -> None:
        """
        @param patience: seconds that a stop may take. systemd is told, so that its own deadline
            does not end the drain.
        """
        self._program = program
        self._patience = patience

    def startService(self) -> None:
        super().startService()
        if not self._program.ending:
            notify(os.environ, READY=1, MAINPID=os.getpid())

    def stopService(self) -> None:
        super().stopService()
        notify(os.environ, STOPPING=1, EXTEND_TIMEOUT_USEC=int(self._patience * 1e6))

    def __call__(self, event: LogEvent) -> None:
        """As a log observer: an event with the field C{is_status} is the service's status."""
        if event.get("is_status"):
            notify(os.environ, STATUS=formatEvent(event))
