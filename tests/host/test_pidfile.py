"""The PID file shows which instance runs; with real files and real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.console import cli
from acme_alpn_proxy.errors import AlreadyRunning, StartError
from acme_alpn_proxy.host import pidfile
from acme_alpn_proxy.host.pidfile import NoPIDFile, PIDFile
from acme_alpn_proxy.interfaces import IPIDFile
from acme_alpn_proxy.options import ConsoleOptions

CLAIM = """
import sys
from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host.pidfile import PIDFile
file = PIDFile(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    file.claim()
    print("claimed", flush=True)
except StartError as problem:
    print(type(problem).__name__, problem, flush=True)
sys.stdin.readline()
"""


class Instance:
    """Another process, which claims the file on request and then waits for its end."""

    def __init__(self, path: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "ready"

    @property
    def pid(self) -> int:
        return self._process.pid

    def claim(self) -> None:
        """Begin to claim."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class PIDFileCase(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.path = self.folder / "proxy.pid"
        self.file = self.make()

    def make(self, path: Path | None = None) -> PIDFile:
        file = PIDFile(str(path or self.path))
        self.addCleanup(file.release)
        return file

    def instance(self) -> Instance:
        """Another process that is about to claim the file."""
        instance = Instance(str(self.path))
        self.addCleanup(instance.kill)
        return instance

    def running_instance(self) -> Instance:
        """Another process that has it."""
        instance = self.instance()
        instance.claim()
        self.assertEqual(instance.answer(), "claimed")
        return instance

    def assert_refused(self, call: Any, why: str) -> None:
        """It is refused for that reason, with a remedy, and nothing is held afterwards."""
        before = os.listdir("/proc/self/fd")
        problem = self.assertRaises(StartError, call)
        lacks, remedy, status = "cannot", "to a plain file in a folder that exists", os.EX_CANTCREAT
        if isinstance(problem.__context__, PermissionError):
            lacks, remedy, status = "no permission to", "to another path", os.EX_NOPERM
        self.assertRegex(
            str(problem),
            f"^{lacks} {re.escape(why)}; .*set ACME_ALPN_PROXY_PIDFILE {remedy}$",
        )
        self.assertEqual(problem.status, status)
        self.assertEqual(os.listdir("/proc/self/fd"), before)

    def assert_claimed(self) -> None:
        self.assertEqual(self.path.read_text(), f"{os.getpid()}\n")
        self.assertEqual(self.make().owner(), os.getpid())


class ClaimTests(PIDFileCase):
    def test_interfaces(self) -> None:
        """Both are PID files; the null object does nothing."""
        verifyObject(IPIDFile, self.file)
        none = NoPIDFile()
        verifyObject(IPIDFile, none)
        none.claim()
        none.release()
        self.assertEqual(os.listdir(self.folder), [])

    def test_claim_and_release(self) -> None:
        """While it is claimed, the file shows the PID, and only its owner can open it: any user who
        can open it could lock it and look like the instance. After a release it is gone."""
        self.assertIsNone(self.file.owner())
        self.file.claim()
        self.assert_claimed()
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)
        self.file.release()
        self.assertFalse(self.path.exists())
        self.assertIsNone(self.file.owner())
        self.file.release()

    def test_strange_file(self) -> None:
        """A file that other users could have opened is replaced, even if it is locked, and its PID
        is not taken for an instance's."""
        self.path.write_text("1\n")
        self.path.chmod(0o644)
        with self.path.open() as theirs:
            pidfile._lock(theirs.fileno(), fcntl.F_RDLCK)
            self.assertIsNone(self.file.owner())
            self.file.claim()
        self.assert_claimed()
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)

    def test_cannot_be_written_by_its_owner(self) -> None:
        """The descriptor that the instance keeps cannot write another PID into the file."""
        self.file.claim()
        assert self.file._descriptor is not None
        problem = self.assertRaises(OSError, os.pwrite, self.file._descriptor, b"1\n", 0)
        self.assertEqual(problem.errno, errno.EBADF)
        self.assert_claimed()

    def test_again(self) -> None:
        """After a second claim by its owner, it is still the owner's."""
        self.file.claim()
        self.file.claim()
        self.assert_claimed()

    def test_left_behind(self) -> None:
        """Stale, empty or full of garbage: a file without a lock belongs to no instance, and is
        taken."""
        for text in ("4194304\n", "", "garbage\n", "-1\n", "0\n", "9" * 100):
            self.path.write_text(text)
            self.assertIsNone(self.file.owner())
            self.file.claim()
            self.assert_claimed()
            self.file.release()

    def test_killed(self) -> None:
        """The file of a killed instance belongs to no instance."""
        instance = self.running_instance()
        self.assertEqual(self.file.owner(), instance.pid)
        instance.kill()
        self.assertTrue(self.path.exists())
        self.assertIsNone(self.file.owner())

    def test_another_program(self) -> None:
        """A program that has the PID by now is not taken for an instance, and never signalled."""
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            self.path.write_text(f"{other.pid}\n")
            self.assertIsNone(self.file.owner())
            environment = {"ACME_ALPN_PROXY_PIDFILE": str(self.path)}
            self.patch(ConsoleOptions, "environment", environment)
            self.assertEqual(cli.run_command_line(["stop", "--redirect", "none"]), 0)
            output, _ = other.communicate(b"still here")
            self.assertEqual((output, other.returncode), (b"still here", 0))

    def test_locked_by_another_process(self) -> None:
        """While another instance has the file a claim is refused with its PID, and leaves it."""
        instance = self.running_instance()
        problem = self.assertRaises(AlreadyRunning, self.file.claim)
        self.assertEqual(str(problem), f"already running as PID {instance.pid} ({self.path})")
        self.file.release()
        self.assertEqual(self.path.read_text(), f"{instance.pid}\n")

    def test_claims_at_once(self) -> None:
        """Of several claims at once one succeeds, and the errors of the others have its PID."""
        instances = [self.instance() for _ in range(4)]
        for instance in instances:
            instance.claim()
        answers = {instance: instance.answer() for instance in instances}
        (winner,) = [instance for instance in instances if answers[instance] == "claimed"]
        del answers[winner]
        self.assertEqual(
            set(answers.values()),
            {f"AlreadyRunning already running as PID {winner.pid} ({self.path})"},
        )


class RefusalTests(PIDFileCase):
    """Paths at which no PID file can be made."""

    def test_missing_folder(self) -> None:
        """In a missing folder no instance runs, and a claim is refused."""
        file = self.make(self.folder / "missing" / "pid")
        self.assertIsNone(file.owner())
        self.assert_refused(
            file.claim, f"write the PID file {file.path}: No such file or directory"
        )

    def test_no_permission(self) -> None:
        """A file that may not be read or written is refused, and stays unchanged."""
        self.path.write_text("7\n")
        self.path.chmod(0)
        self.folder.chmod(0o755)
        if os.geteuid() == 0:
            self.addCleanup(os.seteuid, 0)
            os.seteuid(65_534)
        why = f"the PID file {self.path}"
        self.assert_refused(self.file.owner, f"read {why}")
        self.assert_refused(self.file.claim, f"write {why}")

    def test_symbolic_link(self) -> None:
        """A symbolic link is not followed, wherever it leads."""
        victim = self.folder / "victim"
        victim.write_text("precious")
        self.path.symlink_to(victim)
        why = f"the PID file {self.path}: Too many levels of symbolic links"
        self.assert_refused(self.file.owner, f"read {why}")
        self.assert_refused(self.file.claim, f"write {why}")
        self.assertEqual(victim.read_text(), "precious")

    def test_fifo(self) -> None:
        """A FIFO does not block; it is refused, and stays where it is."""
        os.mkfifo(self.path)
        self.assertIsNone(self.file.owner())
        self.assert_refused(self.file.claim, f"write the PID file {self.path}: Invalid argument")
        self.file.release()
        self.assertTrue(self.path.is_fifo())

    def test_folder(self) -> None:
        """A folder is not a PID file."""
        self.path.mkdir()
        self.assert_refused(self.file.claim, f"write the PID file {self.path}: Is a directory")


class MeanwhileTests(PIDFileCase):
    """Changes by other processes between two steps of this one."""

    def test_owner_about_to_write(self) -> None:
        """While a new owner, who has the lock, is going to write its PID, an old PID in the file is
        not reported; the new one is waited for."""
        self.path.write_text("7\n")
        steps: list[Any] = []
        self.patch(time, "sleep", lambda seconds: steps.pop()())
        owners: list[int | None] = []
        truncate = os.ftruncate

        def look_meanwhile(descriptor: int, size: int) -> None:
            def write() -> None:
                truncate(descriptor, size)
                os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
                pidfile._lock(descriptor, fcntl.F_RDLCK)

            steps.append(write)
            owners.append(self.file.owner())

        owner = self.make()
        self.patch(os, "ftruncate", look_meanwhile)
        owner.claim()
        self.assertEqual(owners, [os.getpid()])

    def test_owner_that_never_writes(self) -> None:
        """If another program holds the lock and writes no PID, the error comes after about a
        second."""
        owner = self.make()
        owner.claim()
        self.path.write_text("not a PID")
        pauses: list[float] = []
        self.patch(time, "sleep", pauses.append)
        problem = self.assertRaises(StartError, self.file.claim)
        self.assertEqual(
            str(problem),
            f"{self.path} is locked by a program that does not write its PID there; end that one"
            f" (see: fuser {self.path})",
        )
        self.assertTrue(0.5 < sum(pauses) < 2)

    def test_owner_ends(self) -> None:
        """An owner that ends during a claim makes room for it."""
        owner = self.make()
        owner.claim()
        self.patch(self.file, "owner", owner.release)
        self.file.claim()
        self.assert_claimed()

    def before_the_lock(self, happens: Any) -> None:
        """Let something happen once, between opening the file and locking it."""
        lock = pidfile._lock
        pending = [happens]

        def late_lock(descriptor: int, kind: int) -> bool:
            if pending:
                pending.pop()()
            return lock(descriptor, kind)

        self.patch(pidfile, "_lock", late_lock)

    def test_file_removed(self) -> None:
        """If its owner removes the file between open and lock, a new one is made."""
        self.before_the_lock(self.path.unlink)
        self.file.claim()
        self.assert_claimed()

    def test_file_replaced(self) -> None:
        """If a third instance has made a new file by then, that is the running instance."""
        third = self.make()

        def replace() -> None:
            self.path.unlink()
            third.claim()

        self.before_the_lock(replace)
        self.assertRaises(AlreadyRunning, self.file.claim)
        self.assert_claimed()

    def test_successor(self) -> None:
        """A release does not remove the file of a successor."""
        self.file.claim()
        self.path.unlink()
        successor = self.make()
        successor.claim()
        self.file.release()
        self.assert_claimed()

    def test_release_without_the_folder(self) -> None:
        """A release does not raise if the file has gone, and it closes its descriptor."""
        before = os.listdir("/proc/self/fd")
        file = self.make(self.folder / "run" / "pid")
        (self.folder / "run").mkdir()
        file.claim()
        (self.folder / "run").rename(self.folder / "moved")
        (self.folder / "run").touch()
        file.release()
        self.assertEqual(os.listdir("/proc/self/fd"), before)
        self.assertIsNone(self.make(self.folder / "moved" / "pid").owner())


class RemoveTests(PIDFileCase):
    """Removing the file of an instance that could not remove it itself."""

    def test_left_behind(self) -> None:
        """The file of that instance goes; there may be none."""
        self.path.write_text("123\n")
        self.file.remove_of(123)
        self.assertFalse(self.path.exists())
        self.file.remove_of(123)

    def test_of_somebody_else(self) -> None:
        """A file with another PID, with garbage, or with a lock, is not removed."""
        for text in ("124\n", "root:x:0\n"):
            self.path.write_text(text)
            self.file.remove_of(123)
            self.assertEqual(self.path.read_text(), text)
        instance = self.running_instance()
        self.file.remove_of(instance.pid)
        self.assertEqual(self.file.owner(), instance.pid)
