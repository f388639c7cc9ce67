"""The console script in forks of one process that has imported it already.

In this way commands take a tenth of the time, and a test can send a signal at many moments of a
start. A moment is a number of function calls that the process has made: so each moment can be hit,
however fast the machine is. The first half of this module is the client of the process, the second
half is the process.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

MOST_SECONDS = 20.0
"""Seconds after which a command counts as hung."""


class WarmProxy:
    """Runs commands of the console script; their environment is that of the process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def run(self, *words: str, hit: str = "", number: int = 0, moment: int = 0) -> Done:
        """Run a command to its end.

        @param hit: the process that sends itself the signal C{number} after C{moment} calls:
            C{"start"} is the command itself, C{"daemon"} is the process that it forks.
        """
        answer = self._answer(words=words, hit=hit, number=number, moment=moment)
        if hit == "start":  # the daemon may get there later, when the command has ended
            assert answer["calls"] >= moment, f"{words} has made {answer['calls']} calls only"
        return subprocess.CompletedProcess(words, answer["status"], answer["out"], answer["err"])

    def moments(self, count: int, *words: str, hit: str) -> list[int]:
        """C{count} moments, evenly spread over a command. The command is run once without a signal;
        it has to succeed and to print nothing on stderr.

        The first moment is the first call. The last is not at the end, but one interval before it,
        because no two runs make exactly the same number of calls.
        """
        answer = self._answer(words=words, hit=hit, number=0, moment=0)
        assert (answer["status"], answer["err"]) == (0, ""), answer
        return [1 + answer["calls"] * number // count for number in range(count)]

    def _answer(self, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


Done = subprocess.CompletedProcess[str]


@contextmanager
def warm_proxy(argv: list[str], env: Mapping[str, str]) -> Iterator[WarmProxy]:
    """The process, in the namespace that C{argv} enters."""
    from .netns import terminate

    process = subprocess.Popen(
        [*argv, sys.executable, "-P", str(Path(__file__).resolve())],
        # Not measured by coverage: a process that is killed would leave half a file of data.
        env={name: v for name, v in {**os.environ, **env}.items() if "COVERAGE" not in name},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield WarmProxy(process)
    finally:
        terminate(process)


PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>

_COUNT = struct.Struct("Q")


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class _Calls:
    """Counts the calls that Python sees in one process or in both, with their forks."""

    def __init__(self, hit: str, number: int, moment: int) -> None:
        self._hit, self._number, self._moment = hit, number, moment
        self._made = mmap.mmap(-1, _COUNT.size)  # shared with what is forked

    @property
    def made(self) -> int:
        count: int = _COUNT.unpack_from(self._made)[0]
        return count

    def begin(self) -> None:
        """In the process that is the command."""
        self._command = os.getpid()
        sys.setprofile(self._count)

    def _count(self, frame: FrameType, event: str, argument: Any) -> None:
        if not event.endswith("call") or (os.getpid() == self._command) != (self._hit == "start"):
            return
        made = self.made + 1
        _COUNT.pack_into(self._made, 0, made)
        if made == self._moment:
            os.kill(os.getpid(), self._number)


def _run(words: list[str], hit: str, number: int, moment: int) -> dict[str, Any]:
    from acme_alpn_proxy.console import cli

    calls = _Calls(hit, number, moment)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = os.fork()
        if not command:
            code = 99
            # The program does this first; a signal before it would test nothing.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                calls.begin()
                code = cli.run_command_line(words)
            except SystemExit:
                pass  # the daemon's
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        status = _wait(command)
        for stream in (out, err):
            stream.seek(0)
        said = {"out": out.read().decode(), "err": err.read().decode()}
        return {"status": status, "calls": calls.made, **said}


def _wait(command: int) -> int | str:
    poll = select.poll()
    poll.register(descriptor := os.pidfd_open(command), select.POLLIN)
    in_time = poll.poll(MOST_SECONDS * 1000)
    os.close(descriptor)
    if not in_time:
        os.kill(command, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    for orphan in _children(os.getpid()):
        os.waitpid(orphan, os.WNOHANG)
    return status if in_time else "it hangs"


def main() -> None:
    """Do what standard input says until it ends."""
    from acme_alpn_proxy.console import cli, daemon  # noqa: F401

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
