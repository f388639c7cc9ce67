"""Messages to the service manager, on real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.console import systemd
from acme_alpn_proxy.console.systemd import ServiceManager, notify
from acme_alpn_proxy.program import Program


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """The value of NOTIFY_SOCKET, and the socket that listens there."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@proxy-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0"))
        listener.setblocking(False)
        yield name, listener


def test_message(manager: tuple[str, socket.socket]) -> None:
    """All fields are in one datagram, one a line; a value stays on its line."""
    name, listener = manager
    notify({"NOTIFY_SOCKET": name}, READY=1, STATUS="It is\nso")
    assert listener.recv(4096) == b"READY=1\nSTATUS=It is so\n"


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}])
def test_nobody_asked(manager: tuple[str, socket.socket], environment: dict[str, str]) -> None:
    """Without the variable nothing is sent, wherever the manager may listen."""
    notify(environment, READY=1)
    with pytest.raises(BlockingIOError):
        manager[1].recv(4096)


@pytest.mark.parametrize("address", ["/nowhere/at/all", "@nobody is there", "/a\0b", "x" * 200])
def test_manager_that_cannot_be_told(address: str) -> None:
    """If the address leads nowhere, nothing fails."""
    notify({"NOTIFY_SOCKET": address}, READY=1)


def test_manager_that_does_not_read(
    manager: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manager with a full queue does not block the proxy for ever."""
    monkeypatch.setattr("acme_alpn_proxy.console.systemd._PATIENCE", 0.01)
    name, listener = manager

    def fill_the_queue() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            while True:
                other.sendto(b"X=1", listener.getsockname())

    with pytest.raises(BlockingIOError):
        fill_the_queue()
    notify({"NOTIFY_SOCKET": name}, READY=1)
    assert listener.recv(4096) == b"X=1"


class ServiceManagerTests(SynchronousTestCase):
    """The messages to systemd."""

    def setUp(self) -> None:
        self.told: list[dict[str, object]] = []
        self.patch(systemd, "notify", lambda environment, **fields: self.told.append(fields))
        self.program = SimpleNamespace(ending=False)
        self.clock = Clock()
        self.environment: dict[str, str] = {}
        self.patch(os, "environ", self.environment)
        self.manager = ServiceManager(self.clock, cast(Program, self.program), 1.5)

    def test_start_and_stop(self) -> None:
        """It reports when the proxy steers, in which process, and how long a stop may take."""
        self.manager.startService()
        self.manager.stopService()
        self.assertEqual(
            self.told,
            [
                {"READY": 1, "MAINPID": os.getpid()},
                {"STOPPING": 1, "EXTEND_TIMEOUT_USEC": 1_500_000},
            ],
        )

    def test_watchdog(self) -> None:
        """A manager that wants signs of life gets three within its interval, also during a long
        stop; if the variables name another process, it gets none."""
        self.environment["WATCHDOG_USEC"] = "15000000"
        self.manager.startService()
        self.manager.stopService()
        self.told.clear()
        self.clock.pump([1] * 15)
        self.assertEqual(self.told, [{"WATCHDOG": 1}] * 3)
        for pid, usec in (("1", "15000000"), (str(os.getpid()), "often"), ("me", "1")):
            self.environment |= {"WATCHDOG_PID": pid, "WATCHDOG_USEC": usec}
            self.assertEqual(systemd.watchdog_seconds(self.environment), 0)

    def test_signalled_meanwhile(self) -> None:
        """It does not report that the proxy is ready if a signal to stop has already come."""
        self.program.ending = True
        self.manager.startService()
        self.assertEqual(self.told, [])

    def test_status(self) -> None:
        """Log events with a status become the service's status; all other events do not."""
        event = {"log_level": LogLevel.info, "log_format": "Draining {count}", "count": 2}
        self.manager(event)
        self.manager(event | {"is_status": False})
        self.assertEqual(self.told, [])
        self.manager(event | {"is_status": True})
        self.assertEqual(self.told, [{"STATUS": "Draining 2"}])
