"""Another process, with a pidfd and without."""

from __future__ import annotations

import errno
import os
import signal
import subprocess

import pytest

from acme_alpn_proxy.host import handle
from acme_alpn_proxy.host.handle import ProcessHandle


@pytest.fixture(params=["function", "system call", "old kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How this Python and this kernel have pidfds."""
    if request.param != "function":
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.delattr(signal, "pidfd_send_signal")
    if request.param == "old kernel":

        def missing(*arguments: int | None) -> int:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(handle, "_system_call", missing)
    way: str = request.param
    return way


def test_process(way: str) -> None:
    """It sees the process live and end, and a signal reaches it."""
    with subprocess.Popen(["sleep", "60"]) as process, ProcessHandle(process.pid) as other:
        assert other.pid == process.pid
        assert not other.ended(0)
        other.send(signal.SIGKILL)
        assert other.ended(5)
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            other.send(signal.SIGKILL)


def test_no_process(way: str) -> None:
    """For a process that has ended, the error says so."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(ProcessLookupError):
        ProcessHandle(process.pid)


def test_pid_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pidfds, a process that has the same PID later gets no signal."""
    monkeypatch.delattr(os, "pidfd_open")

    def missing(*arguments: int | None) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(handle, "_system_call", missing)
    with ProcessHandle(os.getpid()) as other:
        monkeypatch.setattr(handle, "process_start_time", lambda pid: "later")
        assert other.ended(0)
        with pytest.raises(ProcessLookupError):
            other.send(signal.SIGTERM)
