"""A Unix socket, and what may be at its path already."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from acme_alpn_proxy.host.unixlistener import UnixListener

from ..memory import MemoryReactor


def listener(path: Path) -> UnixListener:
    return UnixListener(MemoryReactor(), str(path), lambda stream: stream.close())


def test_own(tmp_path: Path) -> None:
    """It is for its owner alone, and is gone when it is closed."""
    here = listener(tmp_path / "control")
    here.open()
    assert stat.S_IMODE(os.stat(tmp_path / "control").st_mode) == 0o600
    here.close()
    assert os.listdir(tmp_path) == []


def test_dead(tmp_path: Path) -> None:
    """The socket of a program that was killed is replaced, also one that was not finished."""
    for name in ("control", "control.new"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / name))
    here = listener(tmp_path / "control")
    here.open()
    assert os.listdir(tmp_path) == ["control"]
    here.close()


@pytest.mark.parametrize("name", ["control", "control.new"])
def test_of_others(tmp_path: Path, name: str) -> None:
    """A file, a link, a folder and the socket of a program that runs stay as they are."""
    path = tmp_path / name
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        listener(tmp_path / "control").open()
    assert path.read_text() == "precious"
    path.rename(tmp_path / "other")
    path.symlink_to("other")
    with pytest.raises(FileExistsError):
        listener(tmp_path / "control").open()
    path.unlink()
    path.mkdir()
    with pytest.raises(FileExistsError):
        listener(tmp_path / "control").open()
    path.rmdir()
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen()
        with pytest.raises(OSError, match="in use"):
            listener(tmp_path / "control").open()
    assert sorted(os.listdir(tmp_path)) == sorted([name, "other"])
