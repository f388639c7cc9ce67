"""The guard's process, with commands that keep rules in files in the place of iptables."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from twisted.internet.defer import Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host.processes import BlockingCommands
from acme_alpn_proxy.interfaces import ICommands
from acme_alpn_proxy.redirects import claim as claim_module
from acme_alpn_proxy.redirects import guard as guard_module
from acme_alpn_proxy.redirects.claim import claim_redirect
from acme_alpn_proxy.redirects.guard import Guard
from acme_alpn_proxy.redirects.guardprocess import NAME, Answer

COMMANDS = BlockingCommands()
RULE = ["-p", "tcp", "--dport", "443", "-m", "comment", "--comment", "two words; $(rm) *"]
KEEPER = ["-m", "conntrack", "-m", "comment", "--comment", "acme-alpn-proxy keeper 1 2 3"]

FAKE = """#!/bin/sh
# Keeps its family's rules in a file, a line each: table, then rule.
[ ! -e "{rules}/broken" ] || {{ echo "no lock, try again"; exit 4; }}
file=$0.rules
touch "$file"
table=$4 operation=$5
shift 6
rule="$table $*"
case $operation in
-I) {{ echo "$rule"; cat "$file"; }} >"$file.new"; mv "$file.new" "$file" ;;
-C) grep -Fqx -e "$rule" "$file" ;;
-S) grep -F -e "$table " "$file" | head -1 ;;
-D) grep -Fqx -e "$rule" "$file" || exit 1
    grep -Fvx -e "$rule" "$file" >"$file.new"
    mv "$file.new" "$file" ;;
esac
"""

REDIRECT_LINE = f"nat {' '.join(RULE)}"
KEEPER_LINE = f"mangle {' '.join(KEEPER)}"
ANOTHER = "nat of another"


@implementer(ICommands)
class Impatient(BlockingCommands):
    """Counts the seconds instead of waiting them."""

    def __init__(self) -> None:
        self.waited = 0.0

    def pause(self, seconds: float) -> Deferred[None]:
        self.waited += seconds
        return succeed(None)


class GuardTests(SynchronousTestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.rules = Path(folder.name)
        for name in ("v4", "v6"):
            (self.rules / name).write_text(FAKE.format(rules=self.rules))
            (self.rules / name).chmod(0o755)
            (self.rules / f"{name}.rules").write_text(f"{ANOTHER}\n")
        self.patch(claim_module, "_PREFIX", b"test of the guard %d %d" % (os.getpid(), id(self)))
        self.guard = self.new_guard()
        self.addCleanup(lambda: self.successResultOf(self.guard.end(COMMANDS)))

    def new_guard(self) -> Guard:
        return Guard(
            self.successResultOf(claim_redirect(COMMANDS, 0)),
            {
                "commands": [[str(self.rules / name), "-w", "5"] for name in ("v6", "v4")],
                "keeper": KEEPER,
                "rule": RULE,
                "expires": False,
                "port": 1,
            },
        )

    def there(self, name: str) -> list[str]:
        """The rules of a family, in their order."""
        return (self.rules / f"{name}.rules").read_text().splitlines()

    def ask(self, wish: str) -> Answer:
        return self.successResultOf(self.guard.ask(COMMANDS, wish))

    def claimed(self) -> bool:
        """Whether some guard has a redirect to remove."""
        refused: list[object] = []
        claiming = claim_redirect(Impatient(), 0.1)
        claiming.addCallbacks(lambda claim: claim.close(), refused.append)
        return bool(refused)

    def assert_clean(self) -> None:
        """Assert that the guard's rules are gone, and no others."""
        for name in ("v4", "v6"):
            self.assertEqual(self.there(name), [ANOTHER])

    def test_name(self) -> None:
        """In a list of processes, its name differs from the proxy's."""
        self.ask("look")
        command = Path(f"/proc/{self.guard._process.pid}/cmdline").read_bytes()
        self.assertIn(NAME.encode(), command.split(b"\0"))

    def test_life(self) -> None:
        """After C{apply}, the rules of the guard come before all others. C{remove} removes the
        redirect and releases the claim; C{release} removes the keeper, and the guard ends."""
        self.assertIsNone(self.ask("apply")["failed"])
        for name in ("v4", "v6"):
            self.assertEqual(self.there(name), [REDIRECT_LINE, KEEPER_LINE, ANOTHER])
        self.assertTrue(self.claimed())
        self.ask("remove")
        self.assertEqual(self.there("v6"), [KEEPER_LINE, ANOTHER])
        self.assertFalse(self.claimed())
        self.ask("release")
        self.assert_clean()
        self.assertEqual(self.guard._process.wait(5), 0)

    def test_proxy_dies(self) -> None:
        """When the proxy dies the guard removes its rules and no others, and ends."""
        self.ask("apply")
        self.successResultOf(self.guard.end(COMMANDS))
        self.assert_clean()
        self.assertTrue(self.guard.gone)

    def test_proxy_dies_at_once(self) -> None:
        """If the proxy dies before the guard reads a request, the guard also removes its rules."""
        guard = self.guard
        self.guard = Guard.__new__(Guard)
        self.guard.__dict__ = guard.__dict__
        guard._line.send(b"1 apply\n")
        self.successResultOf(guard.end(COMMANDS))
        self.assert_clean()

    def test_release_first(self) -> None:
        """If the wish to release comes before the wish to remove, as from a proxy that was taken
        over, it still removes everything."""
        self.ask("apply")
        self.ask("release")
        self.assert_clean()

    def test_never_gives_up(self) -> None:
        """A command that fails is tried again until it succeeds."""
        self.ask("apply")
        (self.rules / "broken").touch()
        self.guard._line.close()
        with self.assertRaises(subprocess.TimeoutExpired):
            self.guard._process.wait(1)
        (self.rules / "broken").unlink()
        self.assertEqual(self.guard._process.wait(10), 0)
        self.assert_clean()

    def test_failure(self) -> None:
        """A failed command is reported with its status and output; if the rules cannot be made, the
        guard ends without leaving any of them."""
        self.ask("apply")
        (self.rules / "broken").touch()
        for wish in ("look", "restore", "remove"):
            failed = self.ask(wish)["failed"]
            assert failed is not None
            argv, code, output = failed
            self.assertTrue(argv[0].startswith(str(self.rules)))
            self.assertEqual((code, output), (4, "no lock, try again\n"))
        (self.rules / "broken").unlink()
        self.successResultOf(self.guard.end(COMMANDS))
        self.guard = self.new_guard()
        (self.rules / "broken").touch()
        self.assertIsNotNone(self.ask("apply")["failed"])
        self.guard._process.wait(5)
        self.assert_clean()

    def test_killed(self) -> None:
        """If the guard was killed, the next request and all later ones report that."""
        os.kill(self.guard._process.pid, signal.SIGKILL)
        self.guard._process.wait()
        self.assertTrue(self.guard.gone)
        for _ in range(2):
            failure = self.failureResultOf(self.guard.ask(COMMANDS, "look"), StartError)
            self.assertIn(
                "the guard, which removes the iptables rules, has ended", str(failure.value)
            )

    def test_killed_meanwhile(self) -> None:
        """If the guard is killed during a request, that request reports it."""
        os.kill(self.guard._process.pid, signal.SIGSTOP)
        guard = self.guard

        class Killing(BlockingCommands):
            def pause(self, seconds: float) -> Deferred[None]:
                guard._process.kill()
                guard._process.wait()
                return succeed(None)

        failure = self.failureResultOf(self.guard.ask(Killing(), "look"), StartError)
        self.assertIn("the guard, which removes the iptables rules, has ended", str(failure.value))

    def test_late_answer(self) -> None:
        """If it does not answer in time, that is reported, and its late answer is not taken for the
        answer to the next wish."""
        os.kill(self.guard._process.pid, signal.SIGSTOP)
        impatient = Impatient()
        failure = self.failureResultOf(self.guard.ask(impatient, "look"), StartError)
        self.assertIn("does not answer", str(failure.value))
        self.assertGreaterEqual(impatient.waited, guard_module.ANSWER_DEADLINE)
        os.kill(self.guard._process.pid, signal.SIGCONT)
        self.assertEqual(self.ask("apply")["number"], 2)
        self.assertEqual(self.there("v4")[0], REDIRECT_LINE)

    def test_cannot_be_started(self) -> None:
        """If a guard cannot be started, the start is refused, and the claim is released."""
        self.successResultOf(self.guard.end(COMMANDS))

        def refuse(*args: object, **kwargs: object) -> None:
            raise PermissionError(13, "Permission denied")

        self.patch(subprocess, "Popen", refuse)
        with self.assertRaisesRegex(StartError, "cannot start the guard, .*denied; check the"):
            self.new_guard()
        self.assertFalse(self.claimed())

    def test_another_python(self) -> None:
        """If this user may not run the proxy's own Python, the guard runs with the system's."""
        started = subprocess.Popen
        tried: list[str] = []

        def refuse_first(argv: list[str], **named: object) -> object:
            tried.append(argv[0])
            if len(tried) == 1:
                raise PermissionError(13, "Permission denied")
            return started([sys.executable, *argv[1:]], **named)  # type: ignore

        self.successResultOf(self.guard.end(COMMANDS))
        self.patch(subprocess, "Popen", refuse_first)
        self.guard = self.new_guard()
        self.assertEqual(tried[1], "/usr/bin/python3")
        self.assertIsNone(self.ask("apply")["failed"])


class ClaimTests(SynchronousTestCase):
    """One process at a time; strangers do not count."""

    def setUp(self) -> None:
        self.prefix = b"test of the claim %d %d" % (os.getpid(), id(self))
        self.patch(claim_module, "_PREFIX", self.prefix)

    def held_by(self, uid: int) -> subprocess.Popen[str]:
        """A process of this user holds a name like a claim's."""
        script = (
            "import os, socket, sys; os.setuid(int(sys.argv[2]))\n"
            "s = socket.socket(socket.AF_UNIX)\n"
            "s.bind(b'\\0' + os.fsencode(' '.join(sys.argv[1:])))\n"
            "print('held', flush=True); sys.stdin.read()"
        )
        process = subprocess.Popen(
            ["/usr/bin/python3", "-I", "-c", script, self.prefix.decode(), str(uid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(process.communicate)
        assert process.stdout is not None
        self.assertEqual(process.stdout.readline(), "held\n")
        return process

    def test_one_at_a_time(self) -> None:
        """The claim is waited for, and refused with a message if it stays taken; later it can be
        had."""
        with self.successResultOf(claim_redirect(COMMANDS, 0)):
            impatient = Impatient()
            problem = self.failureResultOf(claim_redirect(impatient, 2), StartError).value
            self.assertRegex(
                str(problem), "^another instance still steers port 443 .*; stop that instance"
            )
            self.assertEqual(problem.status, os.EX_TEMPFAIL)
            self.assertGreaterEqual(impatient.waited, 2)
        self.successResultOf(claim_redirect(COMMANDS, 0)).close()

    def test_stranger(self) -> None:
        """A name that another user binds does not count; a name that root binds is waited for."""
        self.held_by(61_001)
        self.successResultOf(claim_redirect(COMMANDS, 0)).close()
        self.held_by(0)
        self.failureResultOf(claim_redirect(Impatient(), 0.5), StartError)

    def test_without_owners(self) -> None:
        """If the kernel does not report the owner of a name, every name counts."""

        def missing(prefix: bytes) -> None:
            raise OSError(2, "no unix_diag")

        self.patch(claim_module, "abstract_names", missing)
        self.successResultOf(claim_redirect(COMMANDS, 0)).close()
        self.held_by(61_001)
        self.failureResultOf(claim_redirect(Impatient(), 0.5), StartError)

    def test_at_the_same_time(self) -> None:
        """Of many that try at once, only one has it at any time, and all have it in the end."""
        script = (
            "import sys, time; from acme_alpn_proxy.redirects import claim;"
            " from acme_alpn_proxy.host.processes import BlockingCommands\n"
            "claim._PREFIX = sys.argv[1].encode()\n"
            "got = []; claim.claim_redirect(BlockingCommands(), 20).addCallback(got.append)\n"
            "began = time.monotonic(); time.sleep(0.1)\n"
            "print(began, time.monotonic(), flush=True)\n"
            "got[0].close()"
        )
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script, self.prefix.decode()],
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        times = sorted(
            tuple(map(float, process.communicate(timeout=60)[0].split())) for process in processes
        )
        self.assertEqual([len(each) for each in times], [2] * 4)
        for (_, end), (begin, _) in itertools.pairwise(times):
            self.assertLess(end, begin)
        self.assertGreater(time.monotonic(), times[-1][1])
