"""Telling the service manager how things are: the protocol of sd_notify(3), without a library."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Final

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
