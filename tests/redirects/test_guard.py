"""The guard: a real shell, with commands that keep rules in files in the place of iptables."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.host.processes import BlockingCommands
from acme_alpn_proxy.interfaces import ICommands
from acme_alpn_proxy.redirects import guard as guard_module
from acme_alpn_proxy.redirects.guard import Guard, claim_redirect

COMMANDS = BlockingCommands()
RULE = ["-p", "tcp", "--dport", "443", "-m", "comment", "--comment", "two words; $(rm) *"]
KEEPER = "acme-alpn-proxy keeper 1 2"

FAKE = """#!/bin/sh
# Keeps its family's rules in a file, a line each: table, then rule.
[ ! -e "{rules}/broken" ] || {{ echo "no lock, try again"; exit 4; }}
file=$0.rules
touch "$file"
table=$4 operation=$5
shift 6
rule="$table $*"
case $operation in
-I) echo "$rule" >>"$file" ;;
-C) grep -Fqx -e "$rule" "$file" ;;
-D) grep -Fqx -e "$rule" "$file" || exit 1
    grep -Fvx -e "$rule" "$file" >"$file.new"
    mv "$file.new" "$file" ;;
esac
"""

REDIRECT_LINE = f"nat {' '.join(RULE)}"
KEEPER_LINE = f"mangle -m conntrack --ctstate INVALID -m comment --comment {KEEPER}"


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
        self.patch(guard_module, "_NAME", f"\0test of the guard {os.getpid()} {id(self)}")
        self.guard = self.new_guard()
        self.addCleanup(lambda: self.successResultOf(self.guard.end(COMMANDS)))

    def new_guard(self) -> Guard:
        claim = self.successResultOf(claim_redirect(COMMANDS, 0))
        return Guard(claim, [str(self.rules / name) for name in ("v6", "v4")], KEEPER, RULE)

    def there(self, name: str) -> list[str]:
        """The rules of a family."""
        return sorted((self.rules / f"{name}.rules").read_text().splitlines())

    def add_rules(self) -> None:
        """As the proxy does."""
        for name in ("v4", "v6"):
            (self.rules / f"{name}.rules").write_text(
                f"{KEEPER_LINE}\n{REDIRECT_LINE}\nnat of another\n"
            )

    def ask(self, wish: str) -> list[str]:
        words: list[str] = self.successResultOf(self.guard.ask(COMMANDS, wish))
        return words

    def claimed(self) -> bool:
        """Whether some guard has a redirect to remove."""
        refused: list[object] = []
        claiming = claim_redirect(Impatient(), 0.1)
        claiming.addCallbacks(lambda claim: claim.close(), refused.append)
        return bool(refused)

    def test_end(self) -> None:
        """When the proxy dies the guard removes its rules and no others."""
        self.add_rules()
        self.successResultOf(self.guard.end(COMMANDS))
        for name in ("v4", "v6"):
            self.assertEqual(self.there(name), ["nat of another"])
        self.assertTrue(self.guard.gone)

    def test_look(self) -> None:
        """It puts back what was wiped, and tells by which commands; what is there it leaves."""
        self.add_rules()
        self.assertEqual(self.ask("look"), [])
        (self.rules / "v4.rules").write_text("")
        self.assertEqual(self.ask("look"), [str(self.rules / "v4")] * 2)
        self.assertEqual(self.there("v4"), sorted([KEEPER_LINE, REDIRECT_LINE]))
        self.assertEqual(self.ask("look"), [])

    def test_remove_and_release(self) -> None:
        """First the redirect goes and with it the claim, at last the keeper."""
        self.add_rules()
        self.assertTrue(self.claimed())
        self.ask("remove")
        self.assertEqual(self.there("v6"), sorted([KEEPER_LINE, "nat of another"]))
        self.assertFalse(self.claimed())
        self.ask("release")
        for name in ("v4", "v6"):
            self.assertEqual(self.there(name), ["nat of another"])

    def test_successor_is_left_alone(self) -> None:
        """Once it redirects no more, the same rule is a successor's: it is not touched again."""
        self.add_rules()
        self.ask("remove")
        for name in ("v4", "v6"):
            (self.rules / f"{name}.rules").write_text(f"{KEEPER_LINE}\n{REDIRECT_LINE}\n")
        self.successResultOf(self.guard.end(COMMANDS))
        for name in ("v4", "v6"):
            self.assertEqual(self.there(name), [REDIRECT_LINE])

    def test_gone_already(self) -> None:
        """What somebody else has removed before is no error."""
        self.ask("remove")
        self.ask("release")

    def test_failure(self) -> None:
        """A command that fails is told in its own words, and may be tried again."""
        self.add_rules()
        (self.rules / "broken").write_text("")
        for wish in ("look", "remove", "release"):
            failure = self.failureResultOf(self.guard.ask(COMMANDS, wish), StartError)
            self.assertRegex(str(failure.value), "no lock, try again; see why")
        self.assertTrue(self.claimed())
        (self.rules / "broken").unlink()
        self.ask("remove")
        self.ask("release")
        self.assertEqual(self.there("v4"), ["nat of another"])

    def test_killed(self) -> None:
        """That it was killed is told, at the next wish and at those after."""
        os.kill(self.guard._process.pid, signal.SIGKILL)
        self.guard._process.wait()
        self.assertTrue(self.guard.gone)
        for _ in range(2):
            failure = self.failureResultOf(self.guard.ask(COMMANDS, "look"), StartError)
            self.assertIn("the guard of the rules is gone", str(failure.value))

    def test_killed_meanwhile(self) -> None:
        """So it is of one that is killed while it is asked."""
        os.kill(self.guard._process.pid, signal.SIGSTOP)
        guard = self.guard

        class Killing(BlockingCommands):
            def pause(self, seconds: float) -> Deferred[None]:
                guard._process.kill()
                guard._process.wait()
                return succeed(None)

        failure = self.failureResultOf(self.guard.ask(Killing(), "look"), StartError)
        self.assertIn("the guard of the rules is gone", str(failure.value))

    def test_silent(self) -> None:
        """One that does not answer in time is told."""
        os.kill(self.guard._process.pid, signal.SIGSTOP)
        impatient = Impatient()
        failure = self.failureResultOf(self.guard.ask(impatient, "look"), StartError)
        self.assertIn("does not answer", str(failure.value))
        self.assertGreaterEqual(impatient.waited, guard_module.ANSWER_DEADLINE)
        os.kill(self.guard._process.pid, signal.SIGCONT)

    def test_one_claim(self) -> None:
        """The claim is waited for, and refused in words if it does not come."""
        impatient = Impatient()
        problem: Any = self.failureResultOf(claim_redirect(impatient, 2), StartError).value
        self.assertRegex(str(problem), "^another instance redirects :443 here.*; stop it first$")
        self.assertEqual(problem.status, os.EX_TEMPFAIL)
        self.assertGreaterEqual(impatient.waited, 2)
        self.successResultOf(self.guard.end(COMMANDS))
        self.successResultOf(claim_redirect(COMMANDS, 0)).close()

    def test_no_shell(self) -> None:
        """A guard that cannot be started is a refusal, and the claim is given back."""
        self.successResultOf(self.guard.end(COMMANDS))

        def refuse(*args: object, **kwargs: object) -> None:
            raise FileNotFoundError(2, "No such file or directory")

        self.patch(subprocess, "Popen", refuse)
        with self.assertRaisesRegex(StartError, "cannot start /bin/sh as the guard.*; see whether"):
            self.new_guard()
        self.assertFalse(self.claimed())
