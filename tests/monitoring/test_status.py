"""Asking instances, and the output about them."""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.main import CONNECTION_DONE
from twisted.logger import LogLevel, capturedLogs
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

from acme_alpn_proxy import __version__
from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host.unixlistener import UnixListener
from acme_alpn_proxy.host.unixsockets import Peer, short
from acme_alpn_proxy.monitoring.status import (
    SILENT,
    ask,
    instances,
    remove_stale,
    request,
    socket_path,
    sockets,
)
from acme_alpn_proxy.monitoring.statussocket import Holders, StatusService

from ..memory import AlwaysSteers, MemoryReactor
from .descriptions import OPTIONS, answer_of, describe


@pytest.fixture
def reactor() -> Iterator[MemoryReactor]:
    """A reactor in memory that is shut down at the end."""
    memory = MemoryReactor()
    yield memory
    for close, words, _ in memory.triggers.get("during", {}).get("shutdown", []):
        close(*words)


@pytest.fixture
def pidfile(tmp_path: Path) -> str:
    """A path longer than the names of sockets may be."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    return str(folder / "proxy.pid")


@contextmanager
def answering(path: str, line: bytes) -> Iterator[None]:
    """A program at C{path} that answers once."""
    with socket.socket(socket.AF_UNIX) as listener:
        with short(path) as name:
            listener.bind(name)
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as asking, suppress(BrokenPipeError):
                asking.sendall(line)

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join()


def status_service(reactor: MemoryReactor, pidfile: str) -> StatusService:
    """The status service of a proxy that no command uses."""
    return StatusService(reactor, pidfile, describe, Holders(lambda: None, AlwaysSteers()), OPTIONS)


def test_service(pidfile: str, reactor: MemoryReactor) -> None:
    """From start to shutdown there is a socket next to the PID file, for its owner only; each
    connection gets one line of JSON with the proxy's numbers."""
    service = status_service(reactor, pidfile)
    service.privilegedStartService()
    (listener,) = reactor.getReaders()
    assert verifyObject(IReadDescriptor, listener)
    path = socket_path(pidfile, os.getpid())
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert sockets(pidfile) == {os.getpid(): path}
    assert os.listdir(os.path.dirname(pidfile)) == [os.path.basename(path)]
    with socket.socket(socket.AF_UNIX) as asking, short(path) as name:
        asking.connect(name)
        assert select.select([listener], [], [], 0)[0] == [listener]
        listener.doRead()
        listener.doRead()  # nobody else is there
        answer = asking.makefile("rb").readline()
        about = {
            "version": 1,
            "program": __version__,
            "pid": os.getpid(),
            "holders": 0,
            "options": OPTIONS,
        }
        assert json.loads(answer) == about | describe()
        (client,) = set(reactor.getReaders()) - {listener}
    cast(IReadDescriptor, client).doRead()  # it has left
    assert reactor.getReaders() == [listener]
    listener.connectionLost(Failure(CONNECTION_DONE))
    assert listener.logPrefix() == "Unix socket"
    cast(UnixListener, listener).close()
    assert sockets(pidfile) == {}
    assert reactor.getReaders() == []


def test_socket_cannot_be_made(tmp_path: Path, reactor: MemoryReactor) -> None:
    """If the socket cannot be made, the proxy still starts, and the operator is warned."""
    (tmp_path / f"proxy.{os.getpid()}.sock" / "not empty").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "no"):
        with capturedLogs() as events:
            path = str(folder / "proxy.pid")
            status_service(reactor, path).privilegedStartService()
        assert [event["log_level"] for event in events] == [LogLevel.warn]
    assert reactor.getReaders() == []


def test_left_half_made(pidfile: str, reactor: MemoryReactor) -> None:
    """Leftovers of a start that was killed halfway do no harm."""
    with (
        socket.socket(socket.AF_UNIX) as dead,
        short(f"{socket_path(pidfile, os.getpid())}.new") as name,
    ):
        dead.bind(name)
    status_service(reactor, pidfile).privilegedStartService()
    assert list(sockets(pidfile)) == [os.getpid()]


def test_instances(pidfile: str) -> None:
    """All live instances are found, by PID; the sockets of killed ones are not, and can be
    removed."""
    about = answer_of(describe())
    with answering(socket_path(pidfile, 20), json.dumps(about).encode() + b"\n"):
        with answering(socket_path(pidfile, 3), b""):
            ask(socket_path(pidfile, 3))  # and then it is killed
        Path(f"{pidfile}.other.sock").touch()
        assert instances(pidfile, 20) == [about]
    assert list(sockets(pidfile)) == [3, 20]
    remove_stale(pidfile)
    assert sockets(pidfile) == {}


def test_older_release(pidfile: str) -> None:
    """The answer of an older release is understood, although it has no options."""
    about: Any = answer_of(describe())
    del about["options"], about["holders"]
    with answering(socket_path(pidfile, 20), json.dumps(about).encode() + b"\n"):
        (answer,) = instances(pidfile, 20)
    assert answer["state"] != SILENT
    assert (answer["options"], answer["holders"]) == ({}, 0)


def without(name: str) -> bytes:
    """An answer that lacks something."""
    about = dict(answer_of(describe()))
    del about[name]
    return json.dumps(about).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"nonsense\n",
        b"[]\n",
        b"null\n",
        b'{"pid": 20}\n',
        b'{"routes": 1}\n',
        without("since"),
        without("routes"),
        json.dumps(answer_of(describe()) | {"since": "now"}).encode() + b"\n",
        json.dumps(answer_of(describe()) | {"last_validation": "x"}).encode() + b"\n",
        json.dumps(answer_of(describe()) | {"options": {"--linger": 15}}).encode() + b"\n",
        json.dumps(answer_of(describe()) | {"last_validation": {"at": 1}}).encode() + b"\n",
        json.dumps(answer_of(describe()) | {"since": 1e300}).encode() + b"\n",
        json.dumps(answer_of(describe()) | {"since": float("nan")}).encode() + b"\n",
        json.dumps(answer_of(describe()) | {"state": "\x1b[2J"}).encode() + b"\n",
        json.dumps(answer_of(describe()) | {"redirect": "\ud800"}).encode() + b"\n",
        json.dumps(answer_of(describe())).encode()[:-1] + b"\n",
        b"[" * 60_000 + b"\n",
        b'{"a": "' + b"x" * 100_000 + b'"}\n',
    ],
)
def test_silent(pidfile: str, line: bytes) -> None:
    """An instance that runs but does not answer is listed; one that has ended is not."""
    with answering(socket_path(pidfile, 20), line):
        assert instances(pidfile, 7) == [{"version": 1, "pid": 7, "state": SILENT}]


def test_no_folder(tmp_path: Path) -> None:
    """Without the folder there is no instance."""
    assert instances(str(tmp_path / "no" / "proxy.pid"), None) == []


def test_somebody_elses(pidfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that another user has put there is not asked, nor removed."""
    another = Peer(1, 65_534, 65_534)
    monkeypatch.setattr(f"{ask.__module__}.peer_of", lambda stream: another)
    with (
        answering(socket_path(pidfile, 20), b'{"pid": 20}\n'),
        pytest.raises(
            StartError, match="no permission to read the status of PID 20; run this as root"
        ),
    ):
        instances(pidfile, None)
    with answering(socket_path(pidfile, 21), b'{"pid": 21}\n'):
        os.unlink(socket_path(pidfile, 20))
        remove_stale(pidfile)
        assert list(sockets(pidfile)) == [21]


def test_stale_that_may_not_be_removed(pidfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this user may not remove a dead instance's socket, it stays."""
    with answering(socket_path(pidfile, 20), b""):
        ask(socket_path(pidfile, 20))

    def refuse(path: str) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "unlink", refuse)
    remove_stale(pidfile)
    assert list(sockets(pidfile)) == [20]


def test_holders() -> None:
    """After C{leave}, an instance stops when the last command that holds it has ended, unless
    C{keep} comes first."""
    story: list[str] = []
    holders = Holders(lambda: story.append("stop"), AlwaysSteers())
    holders.hold("one")
    holders.hold("two")
    holders.leave()
    holders.release("one")
    assert (len(holders), story) == (1, [])
    holders.release("two")
    assert story == ["stop"]
    holders.hold("three")
    holders.leave()
    holders.keep()
    holders.release("three")
    holders.release("three")
    assert story == ["stop"]
    holders.leave()
    assert story == ["stop", "stop"]


def test_requests(pidfile: str, reactor: MemoryReactor) -> None:
    """A connection holds the instance from its C{hold} until it is closed; an unknown word closes
    the connection."""
    holders = Holders(lambda: None, AlwaysSteers())
    service = StatusService(reactor, pidfile, describe, holders, OPTIONS)
    service.privilegedStartService()

    def turn() -> None:
        for reader in list(reactor.getReaders()):
            if select.select([reader], [], [], 0)[0]:
                reader.doRead()

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(request, pidfile, os.getpid(), "hold")
        while not asked.done():
            turn()
        held = asked.result()
        assert held is not None
        assert len(holders) == 1
        held.close()
        turn()
        assert len(holders) == 0
        asked = pool.submit(request, pidfile, os.getpid(), "sing" * 100)
        while not asked.done():
            turn()
        assert asked.result() is None
    assert len(reactor.getReaders()) == 1  # the listener
    assert request(pidfile, 1, "hold") is None
