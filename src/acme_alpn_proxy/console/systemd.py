"""Reporting the service's state to systemd: the protocol of sd_notify(3), without a library."""

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
"""Seconds that a manager with a full queue may block this process."""


def notify(environment: Mapping[str, str], **fields: object) -> None:
    """Send C{FIELD=value} lines in one datagram; without C{NOTIFY_SOCKET}, do nothing.

    If the manager cannot be reached, that is not an error: it has deadlines of its own.

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
    except (OSError, ValueError):  # ValueError: not an address
        pass


def watchdog_seconds(environment: Mapping[str, str]) -> float:
    """The watchdog's interval, in seconds (WatchdogSec=); 0: the manager wants no keep-alive
    messages."""
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
        pid = int(environment.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return 0
    return microseconds / 1e6 if pid == os.getpid() else 0


@implementer(ILogObserver)
class ServiceManager(Service):
    """If systemd has started this process, reports to it when the proxy steers, when it stops, and
    what it is doing. Starts last, and so stops first.
    """

    def __init__(self, reactor: IReactorTime, program: Program, patience: float) -> None:
        """
        @param patience: seconds that a stop may take. systemd gets this number, so that its own
            deadline does not cut off the drain.
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
            # Also during the drain: systemd expects a sign of life until the process ends.
            self._alive.start(seconds / 3)

    def stopService(self) -> None:
        super().stopService()
        notify(os.environ, STOPPING=1, EXTEND_TIMEOUT_USEC=int(self._patience * 1e6))

    def __call__(self, event: LogEvent) -> None:
        """The service is a log observer: an event with C{is_status} becomes systemd's status
        line."""
        if event.get("is_status"):
            notify(os.environ, STATUS=formatEvent(event))
