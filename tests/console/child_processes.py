"""Processes that do not end when they should."""

from __future__ import annotations

import os
import signal
import subprocess

from twisted.trial.unittest import SynchronousTestCase


def stubborn_process(case: SynchronousTestCase) -> subprocess.Popen[bytes]:
    """A process that ignores SIGTERM, and that has already received one."""
    line = "trap '' TERM; echo ready; read line"
    process = subprocess.Popen(["sh", "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    case.addCleanup(process.stdin.close)
    case.addCleanup(process.stdout.close)
    case.addCleanup(process.wait)
    case.addCleanup(process.kill)
    process.stdout.readline()
    return process


def assert_was_waited_for(case: SynchronousTestCase, process: subprocess.Popen[bytes]) -> None:
    """Assert that the process, which was killed, has ended and was reaped."""
    process.returncode = -signal.SIGKILL
    with case.assertRaises(ProcessLookupError):
        os.kill(process.pid, 0)
