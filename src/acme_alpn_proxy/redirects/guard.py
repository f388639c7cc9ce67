"""The proxy's side of the guard; L{acme_alpn_proxy.redirects.guardprocess} is the guard's
program."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Final

from twisted.internet.defer import Deferred, inlineCallbacks

import acme_alpn_proxy

from ..errors import StartError
from ..interfaces import ICommands
from .guardprocess import NAME, Answer, Order

ANSWER_DEADLINE: Final = 30.0
"""Seconds for the guard to answer: each of its commands may wait five seconds for the lock."""

END_DEADLINE: Final = 30.0
"""Seconds for a guard to remove its rules and end, after its connection to us is closed."""

_SOON: Final = 0.2
_SHORT_STEP: Final = 0.004
_STEP: Final = 0.02
"""Seconds between two checks for an answer: in the first fifth of a second, and later."""

_LONGEST_ANSWER: Final = 65_536

_ANY_PYTHON: Final = "/usr/bin/python3"

_PROGRAM: Final = (
    "import sys; sys.path.insert(0, sys.argv[2]);"
    " from acme_alpn_proxy.redirects.guardprocess import main; main()"
)
"""Its command line: its name, the folder (or zip file) of the package, and the order."""


class GuardGone(StartError):
    """The guard was killed; a new one can take over."""

    def __init__(self, problem: OSError) -> None:
        super().__init__(
            f"the guard, which removes the iptables rules, has ended: {problem.strerror}; no action"
            " is needed, because the proxy starts a new one"
        )


class Guard:
    """The process of the guard."""

    def __init__(self, claim: socket.socket, order: Order) -> None:
        """Start the process; raises L{StartError}.

        @param claim: handed to the guard, which closes it when it no longer redirects.
        """
        self._line, theirs = socket.socketpair()
        self._wishes = 0
        self._received = b""
        assert acme_alpn_proxy.__file__ is not None
        package = str(Path(acme_alpn_proxy.__file__).parent.parent)
        words = [NAME, package, json.dumps(order)]
        with claim, theirs:
            try:
                self._process = _started(words, theirs.fileno(), claim.fileno())
            except OSError as problem:
                self._line.close()
                raise StartError(
                    f"cannot start the guard, which removes the iptables rules ({sys.executable}):"
                    f" {problem.strerror}; check the limits (ulimit -a)",
                    os.EX_OSERR,
                ) from None
        self._line.setblocking(False)

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    @inlineCallbacks
    def ask(self, commands: ICommands, wish: str) -> Generator[Deferred[Any], Any, Answer]:
        """Make the guard carry out C{wish}; see L{acme_alpn_proxy.redirects.guardprocess.Guard}.

        @return: a Deferred of the answer. Fails with L{GuardGone}, or with L{StartError} if there
            is no answer in time. Late answers to earlier requests are ignored, and so are answers
            that cannot be read.
        """
        self._wishes += 1
        try:
            self._line.send(f"{self._wishes} {wish}\n".encode())
            waited = 0.0
            while (answer := self._answer()) is None:
                if waited >= ANSWER_DEADLINE:
                    raise StartError(
                        "the guard, which removes the iptables rules, does not answer, and the"
                        " proxy asks it again; see which program holds the lock of iptables: fuser"
                        " /run/xtables.lock"
                    )
                step = _SHORT_STEP if waited < _SOON else _STEP
                yield commands.pause(step)
                waited += step
        except OSError as problem:
            raise GuardGone(problem) from None
        return answer

    @inlineCallbacks
    def end(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        """Close the connection to the guard: it then removes all its rules, and ends."""
        self._line.close()
        waited = 0.0
        while not self.gone and waited < END_DEADLINE:
            yield commands.pause(_STEP)
            waited += _STEP

    def _answer(self) -> Answer | None:
        """The answer to the last request, or L{None} if it has not come yet; raises C{OSError} if
        no answer can come any more."""
        try:
            data = self._line.recv(_LONGEST_ANSWER)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionResetError(0, "it has ended")
        *lines, self._received = (self._received + data)[-_LONGEST_ANSWER:].split(b"\n")
        for answer in map(_understood, lines):
            if answer is not None and answer["number"] == self._wishes:
                return answer
        return None


def _understood(line: bytes) -> Answer | None:
    """The answer on this line; L{None} if the line is no valid answer, for example because the
    guard is of another release."""
    try:
        answer: Answer = json.loads(line)
        number, programs = answer["number"], [*answer["missing"], *answer["behind"]]
        words, code, output = answer["failed"] or ([], 0, "")
        texts = [*programs, *words, output]
    except (KeyError, RecursionError, TypeError, ValueError):
        return None
    numbers = all(isinstance(each, int) for each in (number, code))
    return answer if numbers and all(isinstance(each, str) for each in texts) else None


def _started(words: Sequence[str], line: int, claim: int) -> subprocess.Popen[bytes]:
    """Start the guard's program; raises C{OSError}.

    After dropping privileges, this process may not be allowed to run its own Python any more.
    """
    for python in (sys.executable, _ANY_PYTHON):
        try:
            return subprocess.Popen(
                [python, "-I", "-S", "-c", _PROGRAM, *words],
                stdin=line,
                stdout=line,
                stderr=claim,
                cwd="/",
                start_new_session=True,
            )
        except PermissionError as problem:
            refusal = problem
    raise refusal
