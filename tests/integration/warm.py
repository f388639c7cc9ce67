"""The console script in forks of one process that has imported it already.

Its commands take a tenth of the time so, and nearly all of that is what they do: a signal can be
tried at many moments of a start. Its first half talks to the process, its second half is it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_SECONDS = 20.0
"""What takes longer hangs."""


class WarmProxy:
    """Runs commands of the console script; C{env} was settled when it was made."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def run(self, *words: str, hit: str = "", number: int = 0, delay: float = 0.0) -> Done:
        """Run a command to its end.

        @param hit: whom to send the signal C{number} after C{delay} seconds: C{"start"}, the
            command itself, or C{"daemon"}, what it forks.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"words": words, "hit": hit, "number": number, "delay": delay}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, answer["status"], answer["out"], answer["err"])

    def seconds(self, *words: str) -> float:
        """How long a command takes that nobody interrupts; it has to succeed, without a word."""
        began = time.monotonic()
        done = self.run(*words)
        assert (done.returncode, done.stderr) == (0, ""), done
        return time.monotonic() - began


Done = subprocess.CompletedProcess[str]


@contextmanager
def warm_proxy(argv: list[str], env: Mapping[str, str]) -> Iterator[WarmProxy]:
    """The process, in the namespace that C{argv} enters."""
    from .netns import terminate

    process = subprocess.Popen(
        [*argv, sys.executable, "-P", str(Path(__file__).resolve())],
        # Not measured by coverage: what is killed midway would leave half a file of data.
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


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _daemon_of(command: int, before: list[int]) -> int | None:
    """The daemon, which has become a child of this process, or who is about to fork it."""
    orphans = [pid for pid in _children(os.getpid()) if pid != command and pid not in before]
    return next(iter([*orphans, *_children(command)]), None)


def _hit(command: int, hit: str, number: int, before: list[int]) -> None:
    """Send the signal; if the daemon is not there yet, as soon as it is."""
    with_end = select.poll()
    with_end.register(descriptor := os.pidfd_open(command), select.POLLIN)
    try:
        while (pid := command if hit == "start" else _daemon_of(command, before)) is None:
            if with_end.poll(0):
                return
        os.kill(pid, number)  # a child of ours, or of one that has not reaped it: no other's PID
    except ProcessLookupError:
        pass  # it was reaped by its parent
    finally:
        os.close(descriptor)


def _run(words: list[str], hit: str, number: int, delay: float) -> dict[str, Any]:
    from acme_alpn_proxy.console import cli

    before = _children(os.getpid())
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = os.fork()
        if not command:
            code = 99
            # As the program does first of all; before that there is no moment to try.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                code = cli.run_command_line(words)
            except SystemExit:
                pass  # the daemon's
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if number:
            time.sleep(delay)
            _hit(command, hit, number, before)
        status = _wait(command)
        for stream in (out, err):
            stream.seek(0)
        return {"status": status, "out": out.read().decode(), "err": err.read().decode()}


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
