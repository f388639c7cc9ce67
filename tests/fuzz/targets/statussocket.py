"""The requests of clients on the status socket."""

from __future__ import annotations

import atexit
import json
import os
import select
import socket
import tempfile
from functools import cache
from typing import cast

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import LogLevel, capturedLogs

from acme_alpn_proxy.host.unixsockets import short
from acme_alpn_proxy.monitoring.status import socket_path
from acme_alpn_proxy.monitoring.statussocket import Holders, StatusService

from ...memory import AlwaysSteers, MemoryReactor
from ...monitoring.descriptions import OPTIONS, describe
from ..conversation import TURN, pieces

SEEDS = [
    TURN.join(each)
    for each in (
        [b"hold\n", b"leave\n", b"keep\n"],
        [b"leave", b"!hold\n", b"!"],
        [b"hold\nhold\n", b"!nothing\n", b"!keep\n" * 20],
        [b"!hold\n", b"hold\n", b"leave\n", b"!"],
    )
]
"""A piece that begins with C{!} is the first one of another client."""


def check(data: bytes) -> None:
    """Whatever is sent: nothing is raised or logged as a failure, nothing is left of a client that
    has gone, and a well-behaved client is served afterwards."""
    reactor = MemoryReactor()
    stops: list[None] = []
    holders = Holders(lambda: stops.append(None), AlwaysSteers())
    service = StatusService(reactor, _pidfile(), describe, holders, OPTIONS)
    clients: list[socket.socket] = []
    with capturedLogs() as events:
        service.privilegedStartService()
        listening = reactor.getReaders()
        try:
            for number, piece in enumerate(pieces(data)):
                if piece[:1] == b"!" or number == 0:
                    clients.append(_client())
                    piece = piece.removeprefix(b"!")
                try:
                    clients[-1].sendall(piece)
                except OSError:
                    pass  # it was turned away
                _run(reactor)
            before = len(holders)
            with _client() as good:
                good.sendall(b"hold\n")
                _run(reactor)
                status, ok = good.makefile("rb").read(65_536).splitlines()
                assert json.loads(status)["holders"] == before
                assert ok == b"OK"
                assert len(holders) == before + 1
            for client in clients:
                client.close()
            _run(reactor)
            assert len(holders) == 0
            assert reactor.getReaders() == listening
            assert not stops or b"leave" in data
        finally:
            for close, words, _ in reactor.triggers["during"]["shutdown"]:
                close(*words)
    assert [event for event in events if event["log_level"] >= LogLevel.warn] == []


def _client() -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short(socket_path(_pidfile(), os.getpid())) as name:
        client.connect(name)
    client.setblocking(False)
    return client


def _run(reactor: MemoryReactor) -> None:
    """Run the service until it has nothing left to read."""
    while ready := select.select(reactor.getReaders(), [], [], 0)[0]:
        for reader in ready:
            if reader in reactor.getReaders():
                cast(IReadDescriptor, reader).doRead()


@cache
def _pidfile() -> str:
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    return os.path.join(directory.name, "proxy.pid")
