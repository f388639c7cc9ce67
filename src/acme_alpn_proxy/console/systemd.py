"""Telling systemd how the service is: the protocol of sd_notify(3), without a library."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Final

from twisted.application.service import Service
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
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


def watchdog_seconds(environment: Mapping[str, str]) -> float:
    """Within how many seconds the manager wants a sign of life (WatchdogSec=); 0: it wants none."""
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
        pid = int(environment.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return 0
    return microseconds / 1e6 if pid == os.getpid() else 0


@implementer(ILogObserver)
class ServiceManager(Service):
    """Tells systemd, if it has started this process, when it steers, when it stops, and what it
    does meanwhile. Starts last, and so stops first.
    """

    def __init__(self, reactor: IReactorTime, program: Program, patience: float) -> None:
        """
        @param patience: seconds that a stop may take. systemd is told, so that its own deadline
            does not end the drain.
        """
        self._program = program
        self._patience = patience
        self._alive = LoopingCall(lambda: notify(os.environ, WATCHDOG=1))
        self._alive.clock = reactor

    def startService(self) -> None:
        super().startService()
        if not self._program.ending:
            notify(os.environ, READY=1, MAINPID=os.getpid())
        seconds = watchdog_seconds(os.environ)
        if seconds and not self._alive.running:
            # Also while it drains: systemd expects it until the process ends.
            self._alive.start(seconds / 3)

    def stopService(self) -> None:
        super().stopService()
        notify(os.environ, STOPPING=1, EXTEND_TIMEOUT_USEC=int(self._patience * 1e6))

    def __call__(self, event: LogEvent) -> None:
        """As a log observer: an event with the field C{is_status} is the service's status."""
        if event.get("is_status"):
            notify(os.environ, STATUS=formatEvent(event))
