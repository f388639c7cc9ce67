"""Commands that end well, badly, late or not at all; blocking, and on a real reactor."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from twisted.internet import reactor as global_reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.host import processes
from acme_alpn_proxy.host.processes import BlockingCommands, SpawningCommands, commands_for
from acme_alpn_proxy.interfaces import ICommands, Result

reactor: Any = global_reactor

BOTH_OUTPUTS = ["sh", "-c", "echo out; echo err >&2; printf '\\377'; exit 4"]
KILLED = ["sh", "-c", "echo words; kill -9 $$"]
NO_SUCH_PROGRAM = ["no-such-program", "-w"]


class ResultTests(SynchronousTestCase):
    def test_one_line(self) -> None:
        """For an error message the output is one line, and says so where there was none."""
        self.assertEqual(Result.of(["x"], 1, b"one\n  two\n").one_line, "one two")
        self.assertEqual(Result.of(["x"], 1, b" \n").one_line, "it printed nothing")

    def test_failure(self) -> None:
        """A failure is one line, with the command as a shell would take it."""
        result = Result.of(["x", "a b"], 4, b"no\nlock\n")
        self.assertEqual(result.failure, "'x 'a b'' failed with status 4: no lock")


class BlockingCommandsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.commands = BlockingCommands()

    def run_now(self, argv: list[str]) -> Result:
        return self.successResultOf(self.commands.run(argv))

    def test_interface(self) -> None:
        """It implements the interface, and is used before the reactor runs."""
        verifyObject(ICommands, self.commands)
        self.assertIsInstance(commands_for(reactor), BlockingCommands)

    def test_success(self) -> None:
        """A command that ends well has run when the call returns; it gets no input."""
        self.assertEqual(self.run_now(["cat"]), Result(("cat",), 0, ""))

    def test_failure(self) -> None:
        """The exit status and both outputs are returned; in a message, bytes that are not text are
        escaped."""
        result = self.run_now(BOTH_OUTPUTS)
        self.assertEqual((result.code, result.errors), (4, "err\n"))
        self.assertEqual(result.output.encode("utf-8", "surrogateescape"), b"out\n\xff")
        self.assertEqual(result.one_line, "out \\xff err")
        self.assertEqual(result.argv, tuple(BOTH_OUTPUTS))

    def test_no_such_program(self) -> None:
        """A program that is not there is a result that names it."""
        result = self.run_now(NO_SUCH_PROGRAM)
        self.assertEqual((result.code, result.errors), (127, "no-such-program: not found on PATH"))

    def test_not_a_program(self) -> None:
        """A file that may be run but cannot is a result that says why."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "broken")
            file.write_bytes(b"\x7fELF")
            file.chmod(0o755)
            result = self.run_now([str(file)])
        self.assertEqual(result.code, 126)
        self.assertIn("Exec format error", result.errors)

    def test_killed(self) -> None:
        """A command that a signal killed counts as killed, and its output so far is returned."""
        result = self.run_now(KILLED)
        self.assertEqual((result.code, result.output), (137, "words\n"))

    def test_deadline(self) -> None:
        """A command that does not end is killed at the deadline, and that is a result."""
        self.patch(processes, "DEADLINE", 0.1)
        result = self.run_now(["sleep", "60"])
        self.assertEqual((result.code, result.errors), (137, "not finished after 0.1 s"))

    def test_pause(self) -> None:
        """A pause blocks for that number of seconds."""
        slept: list[float] = []
        self.patch(time, "sleep", slept.append)
        self.successResultOf(self.commands.pause(0.05))
        self.assertEqual(slept, [0.05])


class ClockedReactor:
    """Spawns on the real reactor; the test's own clock gives the time."""

    running = True

    def __init__(self) -> None:
        self.clock = Clock()
        self.callLater = self.clock.callLater
        self.exited: Deferred[None] = Deferred()

    def spawnProcess(self, protocol: Any, *arguments: Any, **named: Any) -> None:
        protocol.processExited = lambda reason: self.exited.callback(None)
        reactor.spawnProcess(protocol, *arguments, **named)


class SpawningCommandsTests(TestCase):
    timeout = 30

    def setUp(self) -> None:
        self.reactor = cast(Any, ClockedReactor())
        self.commands = SpawningCommands(self.reactor)

    def test_interface(self) -> None:
        """It implements the interface, and is used once the reactor runs."""
        verifyObject(ICommands, self.commands)
        self.assertIsInstance(commands_for(self.reactor), SpawningCommands)

    @inlineCallbacks
    def test_success(self) -> Any:
        """The result of a successful command comes later; its deadline is then cancelled."""
        running = self.commands.run(["echo", "done"])
        self.assertNoResult(running)
        self.assertEqual((yield running), Result(("echo", "done"), 0, "done\n"))
        self.assertEqual(self.reactor.clock.getDelayedCalls(), [])

    @inlineCallbacks
    def test_failure(self) -> Any:
        """The exit status and both outputs are returned; in a message, bytes that are not text are
        escaped."""
        result = yield self.commands.run(BOTH_OUTPUTS)
        self.assertEqual((result.code, result.errors), (4, "err\n"))
        self.assertEqual(result.one_line, "out \\xff err")

    def test_no_such_program(self) -> None:
        """A program that is not there is a result that names it."""
        result = self.successResultOf(self.commands.run(NO_SUCH_PROGRAM))
        self.assertEqual((result.code, result.errors), (127, "no-such-program: not found on PATH"))

    @inlineCallbacks
    def test_inheritance(self) -> Any:
        """A command inherits only inheritable descriptors: so a guard can wait for the command's
        end."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.set_inheritable(True)
            each = f"readlink /proc/self/fd/{theirs.fileno()} /proc/self/fd/{ours.fileno()}"
            result = yield self.commands.run(["sh", "-c", f"{each}; true"])
        self.assertRegex(result.output, r"^socket:\S+\n$")

    @inlineCallbacks
    def test_killed(self) -> Any:
        """A command that a signal killed counts as killed, and its output so far is returned."""
        result = yield self.commands.run(KILLED)
        self.assertEqual((result.code, result.output), (137, "words\n"))

    @inlineCallbacks
    def test_deadline(self) -> Any:
        """A command that does not end is killed at the deadline, and that is a result."""
        running = self.commands.run(["sleep", "60"])
        self.reactor.clock.advance(processes.DEADLINE)
        result = yield running
        self.assertEqual((result.code, result.errors), (137, "not finished after 15 s"))

    @inlineCallbacks
    def test_deadline_with_an_heir(self) -> Any:
        """If a command ends but its child holds its outputs open, the wait ends at the deadline."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "pid")
            running = self.commands.run(["sh", "-c", f"sleep 60 & echo $! > {file}"])
            yield self.reactor.exited
            heir = int(file.read_text())
        self.addCleanup(os.kill, heir, signal.SIGKILL)
        self.assertNoResult(running)
        self.reactor.clock.advance(processes.DEADLINE)
        result = yield running
        self.assertEqual((result.code, result.errors), (137, "not finished after 15 s"))

    @inlineCallbacks
    def test_pause(self) -> Any:
        """A pause takes that number of seconds and does not block."""
        pause = self.commands.pause(2)
        self.reactor.clock.advance(1.9)
        self.assertNoResult(pause)
        self.reactor.clock.advance(0.2)
        self.assertIsNone((yield pause))
