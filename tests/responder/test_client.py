"""The answers to a client of the daemon's control socket."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from acme_alpn_proxy.responder.client import ControlError, NotListening, Refused, ask, control_path

from .control_daemon import control_daemon


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "proxy.control"


def test_path() -> None:
    """The socket is next to the PID file."""
    assert control_path("/var/run/acme-alpn-proxy.pid") == "/var/run/acme-alpn-proxy.control"
    assert control_path("/run/my.pid.d/proxy") == "/run/my.pid.d/proxy.control"


@pytest.mark.parametrize(("said", "given"), [(b"OK\n", ""), (b'OK {"a": 1}\n', '{"a": 1}')])
def test_answer(path: Path, said: bytes, given: str) -> None:
    """One line is sent, and the text after OK is returned."""
    with control_daemon(path, lambda line: said) as asked:
        assert ask(str(path), "report site.example") == given
    assert asked == ["report site.example"]


def test_refused(path: Path) -> None:
    """The daemon's own words are passed on."""
    told = "*.example is no name; give one"
    with (
        control_daemon(path, lambda line: f"ERR {told}\n".encode()),
        pytest.raises(Refused, match=f"^{re.escape(told)}$"),
    ):
        ask(str(path), "unauth *.example")


def test_nobody_listens(path: Path) -> None:
    """Without a daemon, also with the socket of a killed one, the remedy is to start one."""
    told = rf"^no instance listens at {path}; start one: acme-alpn-proxy start$"
    with pytest.raises(NotListening, match=told):
        ask(str(path), "unauth site.example")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NotListening, match=told):
        ask(str(path), "unauth site.example")


SCRIPT = """
import os, sys
sys.modules["twisted"] = None  # to import it fails
from acme_alpn_proxy.responder.client import ControlError, ask
os.setuid(65534)
try:
    ask(sys.argv[1], "unauth site.example")
except ControlError as problem:
    print(problem)
"""


def test_not_permitted() -> None:
    """Without permission, the error says so; and nothing of Twisted is loaded."""
    with TemporaryDirectory() as folder:  # pytest's folders are for root alone
        os.chmod(folder, 0o711)
        path = Path(folder, "proxy.control")
        with control_daemon(path, lambda line: b"OK\n"):
            path.chmod(0o600)
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, path], capture_output=True, text=True, check=False
            )
    assert done.stdout == f"no permission to use the control socket {path}; run this as root\n", (
        done.stderr
    )


@pytest.mark.parametrize("said", [b"", b"OK", b"\n", b"YES\n", b"x" * 70_000 + b"\n"])
def test_no_answer(path: Path, said: bytes) -> None:
    """A daemon that closes, or that sends an unknown line, has not answered."""
    first = iter([said])
    with (
        control_daemon(path, lambda line: next(first)),
        pytest.raises(ControlError, match=f"^the instance at {path} gave no answer; see its log"),
    ):
        ask(str(path), "unauth site.example", 2)


def test_too_late(path: Path) -> None:
    """A daemon that never answers is not waited for."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ControlError, match=rf"^no answer at {path} within 0.05 s; see the log"):
            ask(str(path), "unauth site.example", 0.05)


def test_path_that_cannot_be(tmp_path: Path) -> None:
    """For a path that no socket can have, the error has the system's text."""
    with pytest.raises(
        ControlError, match=r"^cannot send a request to .*; see: acme-alpn-proxy status$"
    ):
        ask(os.fspath(tmp_path / ("x" * 200)), "unauth site.example")


def test_one_line() -> None:
    """A name cannot smuggle a second request."""
    with pytest.raises(ControlError, match="is more than one line; give one name at a time"):
        ask("/nowhere", "auth a.example\nunauth b.example")
