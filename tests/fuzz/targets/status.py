"""The answers of an instance, or of another program in its place, to C{status}, C{start},
C{stop}."""

from __future__ import annotations

import atexit
import json
import os
import socket
import tempfile
import threading
from functools import cache

from acme_alpn_proxy import __version__
from acme_alpn_proxy.console.display import account, drain, table
from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host.unixsockets import short
from acme_alpn_proxy.monitoring.status import (
    VERSION,
    instances,
    request,
    socket_path,
)

from ...monitoring.descriptions import describe

RIGHT = {"version": VERSION, "program": __version__, "pid": 7, "holders": 1, **describe()}
ROUTES = describe()["routes"]
_ESCAPES = {"peer": "\x1b[2J", "server_name": "\ud800", "at": 1e300, "result": "\n"}

SEEDS = [
    json.dumps(RIGHT).encode() + b"\nOK\n",
    json.dumps({**RIGHT, "last_validation": None}).encode() + b"\n",
    json.dumps({**RIGHT, "last_validation": _ESCAPES}).encode() + b"\n",
    json.dumps({**RIGHT, "state": "\x1b[31m", "redirect": "\ud800", "since": 1e300}).encode(),
    json.dumps({**RIGHT, "state": "silent", "pid": True, "since": float("inf")}).encode() + b"\n",
    json.dumps({**RIGHT, "routes": {"acme": {}, "fallback": []}}).encode() + b"\n",
    json.dumps({**RIGHT, "options": {"--linger": "nan", "--drain-timeout": "1e999"}}).encode(),
    json.dumps({**RIGHT, "validations": [{"peer": "\x1b[2J"}, {}, None]}).encode() + b"\n",
    json.dumps({**RIGHT, "routes": {**ROUTES, "acme_for": {"\x1b[2J": ROUTES["acme"]}}}).encode(),
    b"[" * 3_000 + b"\n",
    b"OK\nOK\n",
    b"\nERR 75 no\n",
    b"\nERR 75 \x1b[2J\n",
]


def check(data: bytes) -> None:
    """Whatever the answer: nothing is raised, and the output has no control characters."""
    pidfile = _instance(data)
    answers = instances(pidfile, None)
    shown = table(answers, 2_000.0) + json.dumps({"version": VERSION, "instances": answers})
    assert shown.replace("\n", "").isprintable()
    shown.encode()
    for answer in answers:
        if answer["state"] != "silent":
            assert f"{answer['pid']} {answer['holders']} {answer['routes']['acme']['target']}"
            lines = [*account(answer, 2_000.0), drain(answer, 7, 2_000.0), *answer["options"]]
            assert all(line.isprintable() for line in lines)
    try:
        connection = request(pidfile, 7, "hold")
    except StartError as refusal:
        if not str(refusal).isprintable():
            raise
        return
    if connection is not None:
        connection.close()


def _instance(data: bytes) -> str:
    """The PID file of an instance that sends C{data} to every client until the next call."""
    pidfile, answer = _answering()
    answer[0] = data
    return pidfile


@cache
def _answering() -> tuple[str, list[bytes]]:
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    pidfile = os.path.join(directory.name, "proxy.pid")
    answer = [b""]
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short(socket_path(pidfile, 7)) as name:
        listener.bind(name)
    listener.listen()

    def serve() -> None:
        while True:
            stream, _ = listener.accept()
            with stream:
                try:
                    stream.sendall(answer[0])
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    return pidfile, answer
