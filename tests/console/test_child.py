"""Running another program: its status, its signals, its environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from acme_alpn_proxy.console.child import CannotRun, run_command
from acme_alpn_proxy.interfaces import CANNOT_RUN, NOT_FOUND

from ..integration.netns import ready, wait_until

RUN = """
import sys
from acme_alpn_proxy.console.child import run_command
sys.exit(run_command(sys.argv[1:], {}))
"""


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -9 $$", 137)],
)
def test_status(script: str, status: int) -> None:
    """The exit status is the command's; of one that a signal ended, 128 and the signal's number."""
    assert run_command(["sh", "-c", script], {}) == status


def test_environment() -> None:
    """The command gets this process's environment and the added variables."""
    script = 'test "$PATH" = "$1" && test "$ADDED" = "a b"'
    assert run_command(["sh", "-c", script, "sh", os.environ["PATH"]], {"ADDED": "a b"}) == 0


def test_not_found() -> None:
    """A missing command gives 127, a file that is not a program 126; both are named."""
    for name in ("no-such-command", ""):
        with pytest.raises(CannotRun, match=rf"^{name}: command not found; name one") as missing:
            run_command([name], {})
        assert missing.value.status == NOT_FOUND
    with pytest.raises(
        CannotRun, match=r"^cannot run /etc/passwd: Permission denied; name a program"
    ) as no_program:
        run_command(["/etc/passwd"], {})
    assert no_program.value.status == CANNOT_RUN
    assert (NOT_FOUND, CANNOT_RUN) == (127, 126)


def test_signals_are_as_before(tmp_path: Path) -> None:
    """Neither the command nor, afterwards, the caller finds a signal blocked or ignored."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    show = 'exec grep -E "^Sig(Blk|Ign|Cgt)" /proc/self/status >"$0"'
    assert run_command(["sh", "-c", show, str(tmp_path / "ours")], {}) == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    subprocess.run(["sh", "-c", show, tmp_path / "usual"], check=True)
    assert _masks(tmp_path / "ours") == _masks(tmp_path / "usual")


def test_ignored_sigchld() -> None:
    """If SIGCHLD is ignored, as some callers leave it, the exit status still arrives."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run_command(["sh", "-c", "exit 7"], {}) == 7
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2"])
def test_signal_goes_to_the_command(name: str) -> None:
    """A signal is passed on to the command, which decides what to do."""
    script = f"trap 'exit 7' {name}; echo ready; while :; do read line; done"
    with _runner("sh", "-c", script) as process:
        process.send_signal(signal.Signals[f"SIG{name}"])
        assert process.wait(10) == 7


def test_stopped_command() -> None:
    """A command that is stopped and goes on has not ended."""
    with _runner("sh", "-c", "echo ready; kill -STOP $$; exit 7") as process:
        (child,) = _children(process.pid)
        wait_until(lambda: _is_stopped(child), "it is stopped")
        os.kill(child, signal.SIGCONT)
        assert process.wait(10) == 7


COUNT = """
import os, signal, sys
def count(number, frame):
    global interrupts
    interrupts += 1
    os.write(1, b"interrupted")  # print is not reentrant
interrupts = 0
signal.signal(signal.SIGINT, count)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(40 + interrupts))
os.write(1, b"ready")
while True:
    signal.pause()
"""


def test_interrupt_of_the_terminal() -> None:
    """Ctrl-C reaches the command once: through the terminal, and not also from this process."""
    pid, terminal = os.forkpty()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", RUN, sys.executable, "-c", COUNT])
    try:
        _read_until(terminal, b"ready")
        os.write(terminal, b"\x03")
        _read_until(terminal, b"interrupted")
        # A SIGINT that this process had passed on would be handled before this SIGTERM.
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 41
    finally:
        os.close(terminal)


def _runner(*words: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """The command runs in a process of its own, and has reported that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return ready(process)


def _masks(path: Path) -> list[int]:
    """Without signals 32 and 33, which are the C library's own."""
    return [int(line.split()[1], 16) & 0x7FFFFFFF for line in path.read_text().splitlines()]


def _children(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in children.split()]


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _read_until(terminal: int, word: bytes) -> None:
    seen = b""
    while word not in seen:
        seen += os.read(terminal, 1_024)
