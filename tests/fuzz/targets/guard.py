"""The answers of the guard of the rules to the proxy."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import cast
from unittest import mock

from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure
from zope.interface import implementer

from acme_alpn_proxy.interfaces import ICommands, Result
from acme_alpn_proxy.redirects import guard as guard_module
from acme_alpn_proxy.redirects.guard import Guard
from acme_alpn_proxy.redirects.guardprocess import Answer, Order

from ..conversation import TURN, pieces

RIGHT: Answer = {"number": 1, "missing": [], "behind": [], "expires": True, "failed": None}
_FAILED: Answer = {**RIGHT, "missing": ["iptables"], "failed": (["iptables"], 4, "locked")}
_ORDER: Order = {"commands": [], "keeper": [], "rule": [], "expires": True, "port": 21443}

SEEDS = [
    json.dumps(RIGHT).encode() + b"\n",
    json.dumps(_FAILED).encode() + b"\n",
    json.dumps({**RIGHT, "number": 0}).encode() + b"\n" + TURN + json.dumps(RIGHT).encode(),
    json.dumps({**RIGHT, "missing": "iptables", "failed": [[], 1]}).encode() + b"\n",
    b'{"number": 1}\n{"number": "1"}\n[1]\n1\nnull\n',
    b"[" * 3_000 + b"\n",
]


@implementer(ICommands)
class _Turns:
    """Each pause is the guard's turn to answer; after its last one a right answer comes."""

    def __init__(self, line: socket.socket, answers: Sequence[bytes]) -> None:
        self._line = line
        self._answers = [*answers, b"\n" + json.dumps(RIGHT).encode() + b"\n"]

    def run(self, argv: Sequence[str]) -> Deferred[Result]:
        raise AssertionError("nothing is run here")

    def pause(self, seconds: float) -> Deferred[None]:
        if self._answers:
            self._line.sendall(self._answers.pop(0))
        return succeed(None)


def check(data: bytes) -> None:
    """Whatever the answer: it is understood or ignored; a correct one after it is understood."""
    ours, theirs = socket.socketpair()
    lines: list[int] = []

    def started(words: Sequence[str], line: int, claim: int) -> mock.Mock:
        lines.append(os.dup(line))
        return mock.Mock()

    with theirs, mock.patch.object(guard_module, "_started", started):
        guard = Guard(ours, _ORDER)
    with socket.socket(fileno=lines[0]) as line:
        results: list[object] = []
        guard.ask(_Turns(line, pieces(data)), "look").addBoth(results.append)
        (result,) = results
        if isinstance(result, Failure):
            result.raiseException()
        _makes_sense(cast(Answer, result))
        assert len(guard._received) <= guard_module._LONGEST_ANSWER
    guard._line.close()


def _makes_sense(answer: Answer) -> None:
    """Every field that the callers use has the right type."""
    assert answer["number"] == 1
    assert "".join([*answer["missing"], *answer["behind"]]) is not None
    if answer["failed"] is not None:
        argv, code, output = answer["failed"]
        assert f"{' '.join(argv)} {code:d} {output.strip()}"
