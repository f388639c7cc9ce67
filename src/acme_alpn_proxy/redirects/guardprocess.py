"""The guard's own program: a small process that outlives the proxy and removes its rules.

The proxy may be killed in any way, and rules to a dead port would take the site down. So another
process makes the rules, checks them regularly and removes them: when the proxy asks for that, or
when the proxy's end of the connection between them is closed. It keeps the privileges that the
proxy may drop. It can do nothing else: rules and commands are its arguments.

It imports only the standard library and modules that do the same, all of them at its start: the
program may be removed while it runs.

On the connection, each request of the proxy is a line with a number and a word. The answer is one
JSON object on one line (L{Answer}), with the same number.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypedDict

from ..host.conntrack import forget, translated
from .rules import COMMENT, EXPIRY, KEEPER, is_redirect

NAME: Final = "acme-alpn-proxy-guard"
"""The name that the list of processes shows."""

LIFETIME: Final = 90.0
"""Seconds for which a redirect is valid unless it is renewed: if proxy and guard are both killed,
visitors reach the web server again after that time."""

RENEWAL: Final = 30.0
"""Seconds between two renewals."""

COMMAND_DEADLINE: Final = 15.0
"""Seconds that a command may take; iptables waits five for its lock."""

SILENCE: Final = 9.0
"""Seconds without a request, while visitors wait to be accepted, after which the proxy counts as
hung. A healthy proxy sends a request every three seconds."""

_TICK: Final = 1.0
_JUMP: Final = 5.0
"""If the wall clock is changed by more than this number of seconds, the rules are renewed at once.
"""

_FIRST_PAUSE: Final = 0.2
_LAST_PAUSE: Final = 5.0
_LONGEST_LINE: Final = 4_096
_LONGEST_NUMBER: Final = 18

_NO_SUCH_RULE: Final = 1
"""Exit status of iptables C{-C} and C{-D} if the rule does not exist."""

_NOT_UNDERSTOOD: Final = (1, 2)
"""Exit statuses of iptables if it, or the kernel, does not know a part of the rule."""

_ANY: Final = tuple(range(1, 256))
_NO_PROGRAM: Final = 127
_KILLED: Final = 137

_CLAIM: Final = 3
"""The descriptor of the claim. Commands inherit it: if the guard is killed while a command runs,
nobody else can redirect until that command has ended."""

_LISTENING: Final = "0A"
"""TCP_LISTEN as /proc/net/tcp shows it (proc(5))."""


class Order(TypedDict):
    """What the guard has to do; its argument.

    @ivar commands: the iptables command for each family: the program and its first words.
    @ivar keeper: the rule that keeps connection tracking on, in mangle PREROUTING.
    @ivar rule: the redirect, in nat PREROUTING.
    @ivar expires: whether the redirect has an expiry time.
    @ivar port: the port that the redirect leads to.
    """

    commands: list[list[str]]
    keeper: list[str]
    rule: list[str]
    expires: bool
    port: int


class Answer(TypedDict):
    """The guard's answer to a request.

    @ivar missing: after C{look}: the programs whose rules have disappeared.
    @ivar behind: after C{look}: the iptables programs whose redirect exists, but is not the first
        rule.
    @ivar expires: whether the redirect expires if it is not renewed.
    @ivar failed: command, exit status and output of a command that failed.
    """

    number: int
    missing: list[str]
    behind: list[str]
    expires: bool
    failed: tuple[list[str], int, str] | None


class CommandFailed(Exception):
    """A command failed.

    @ivar code: its exit status.
    @ivar failed: the command, its exit status, and its output.
    """

    def __init__(self, argv: Sequence[str], code: int, output: str) -> None:
        super().__init__(argv, code, output)
        self.code = code
        self.failed = list(argv), code, output[:_LONGEST_LINE]


def run(argv: Sequence[str], *allowed: int) -> tuple[int, str]:
    """Run a command; returns its exit status and output; raises L{CommandFailed}.

    @param allowed: exit statuses besides 0 that do not count as a failure.
    """
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_DEADLINE,
            close_fds=False,
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"not finished after {COMMAND_DEADLINE:g} s"
        raise CommandFailed(argv, _KILLED, text) from None
    except OSError as problem:  # cannot fork, out of memory, or no such program
        raise CommandFailed(argv, _NO_PROGRAM, str(problem)) from None
    output = done.stdout.decode("utf-8", "backslashreplace")
    if done.returncode not in (0, *allowed):
        raise CommandFailed(argv, done.returncode, output)
    return done.returncode, output


class Rule:
    """A rule in a PREROUTING chain.

    @ivar program: the name of the iptables program that makes it.
    @ivar stands: whether the rule may exist in the chain.
    @ivar words: its matches and its target.
    """

    def __init__(self, command: Sequence[str], table: str, words: Sequence[str]) -> None:
        """
        @param command: how to call iptables: the program and its first words.
        """
        self.program = command[0]
        self.stands = False
        self._argv = [*command, "-t", table]
        self.words = list(words)
        self._outdated: list[list[str]] = []
        self._as_printed = ""

    def insert(self) -> None:
        """Insert it before all other rules; raises L{CommandFailed}."""
        try:
            self._run("-I", self.words)
        except CommandFailed as problem:
            self.stands |= problem.code == _KILLED  # the kill may have come too late
            raise
        self.stands = True
        self._as_printed = ""

    def note_first(self) -> None:
        """Remember how iptables prints the first rule: this one, if it has just been inserted."""
        if self.stands and not self._as_printed:
            self._as_printed = self._first()

    def is_there(self) -> bool:
        """Whether the rule exists; raises L{CommandFailed} if that cannot be found out."""
        return self._run("-C", self.words, _NO_SUCH_RULE) == 0

    def is_first(self) -> bool:
        """Whether it is the first rule of its chain; raises L{CommandFailed}."""
        return self.stands and self._as_printed in ("", self._first())

    def remove(self) -> None:
        """Remove the rule if it exists; raises L{CommandFailed}."""
        self._remove_outdated()
        if self.stands:
            self._delete(self.words)
            self.stands = False

    def replace(self, words: Sequence[str]) -> None:
        """Replace its words with C{words}; at every moment the old rule or the new one exists.
        Raises L{CommandFailed}."""
        self._run("-I", words)
        self._outdated.append(self.words)
        self.words, self._as_printed = list(words), ""
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        while self._outdated:
            self._delete(self._outdated[0])
            del self._outdated[0]

    def _delete(self, words: Sequence[str]) -> None:
        """Delete a rule and all copies of it. If it does not exist any more, that is a success."""
        there = True
        while there:
            code = self._run("-D", words, _NO_SUCH_RULE)
            there = self._run("-C", words, _NO_SUCH_RULE) == 0
            if there and code == _NO_SUCH_RULE:
                argv = [*self._argv, "-D", "PREROUTING", *words]
                raise CommandFailed(argv, code, "the rule is still there")

    def _first(self) -> str:
        return run([*self._argv, "-S", "PREROUTING", "1"], *_ANY)[1]

    def _run(self, operation: str, words: Sequence[str], *allowed: int) -> int:
        return run([*self._argv, operation, "PREROUTING", *words], *allowed)[0]


def visitors_wait(port: int) -> bool:
    """Whether connections wait to be accepted by a listening socket on C{port} (/proc/net/tcp)."""
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/net/{name}") as listing:
                for line in listing:
                    _, local, _, state, queues, *_ = line.split()
                    listens = state == _LISTENING and local.endswith(f":{port:04X}")
                    if listens and int(queues.partition(":")[2], 16):
                        return True
        except OSError:
            continue
    return False


class Guard:
    """The rules, and the requests that make and remove them.

    @param wall: the wall clock, seconds since the epoch; the kernel expires rules by it.
    @param monotonic: a clock that nobody can change.
    """

    def __init__(
        self,
        order: Order,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        waiting: Callable[[int], bool] = visitors_wait,
        give_back_claim: Callable[[], None] = lambda: None,
    ) -> None:
        self._order = order
        self._wall = wall
        self._monotonic = monotonic
        self._waiting = waiting
        self._give_back_claim = give_back_claim
        self._keepers = [Rule(each, "mangle", order["keeper"]) for each in order["commands"]]
        self._redirects = [Rule(each, "nat", self._rule()) for each in order["commands"]]
        self._renewed = self._heard = monotonic()
        self._offset = wall() - self._renewed
        self.ended = False
        self._wishes = {
            "apply": self._apply,
            "take over": self._take_over,
            "look": self._look,
            "restore": self._restore,
            "remove": self._remove,
            "release": self._release,
        }

    def obey(self, line: str) -> Answer:
        """Carry out the request on a line from the proxy."""
        self._heard = self._monotonic()
        number, _, wish = line.partition(" ")
        if not number.isdigit() or len(number) > _LONGEST_NUMBER:
            number, wish = "0", line
        answer: Answer = {
            "number": int(number),
            "missing": [],
            "behind": [],
            "expires": False,
            "failed": None,
        }
        try:
            self._wishes.get(wish, self._ignore)(answer)
        except CommandFailed as problem:
            answer["failed"] = problem.failed
        answer["expires"] = self._order["expires"]
        return answer

    def tick(self) -> None:
        """Renew what expires, and stop redirecting if the proxy hangs. Call this every second or
        so."""
        now = self._monotonic()
        with suppress(CommandFailed):
            for redirect in self._redirects:
                redirect.note_first()
        if now - self._heard > SILENCE and self._steers and self._waiting(self._order["port"]):
            with suppress(CommandFailed):
                self._remove()
        offset = self._wall() - now
        jumped = abs(offset - self._offset) > _JUMP
        if self._order["expires"] and self._steers and (jumped or now - self._renewed > RENEWAL):
            with suppress(CommandFailed):  # it is tried again at the next tick
                for redirect in self._redirects:
                    if redirect.stands:
                        redirect.replace(self._rule())
                self._renewed, self._offset = now, offset

    def clean_up(self) -> None:
        """Remove all rules; raises L{CommandFailed}."""
        self._release()

    @property
    def _steers(self) -> bool:
        return any(redirect.stands for redirect in self._redirects)

    def _rule(self) -> list[str]:
        """The redirect, valid for L{LIFETIME} from now if it expires."""
        if not self._order["expires"]:
            return self._order["rule"]
        end = time.gmtime(self._wall() + LIFETIME)
        return [*self._order["rule"], *EXPIRY, time.strftime("%Y-%m-%dT%H:%M:%S", end)]

    def _apply(self, answer: Answer) -> None:
        """Insert all rules; if one fails, remove them all."""
        if self._steers:
            self._restore(answer)
            return
        try:
            self._forget_connections()
            for keeper in self._keepers:
                keeper.insert()
            for redirect in self._redirects:
                self._insert(redirect)
        except CommandFailed:
            with suppress(CommandFailed):
                self._release()
            raise
        self._renewed = self._monotonic()

    def _insert(self, redirect: Rule) -> None:
        """Insert it; without an expiry time if iptables or the kernel does not support that."""
        try:
            redirect.insert()
        except CommandFailed as problem:
            if not self._order["expires"] or problem.code not in _NOT_UNDERSTOOD:
                raise
            self._order["expires"] = False
            for each in self._redirects:
                if each.stands:
                    each.replace(self._rule())
                else:
                    each.words = self._rule()
            redirect.insert()

    def _take_over(self, answer: Answer) -> None:
        """Replace the rules of a guard that was killed: insert new ones, then remove the old
        ones."""
        for keeper in self._keepers:
            keeper.stands = True
        self._restore(answer)
        for command in self._order["commands"]:
            listing = [*command, "-t", "nat", "-S", "PREROUTING"]
            lines = run(listing)[1].splitlines()
            rules = [shlex.split(line) for line in lines if f"--comment {COMMENT}" in line]
            for _, *words in rules[1:]:
                if is_redirect(words, self._order["port"]):
                    run([*command, "-t", "nat", "-D", *words], _NO_SUCH_RULE)

    def _look(self, answer: Answer) -> None:
        """Find out which rules are missing or not the first any more. Changes nothing."""
        for redirect in self._redirects:
            if not redirect.is_first():
                found = answer["behind" if redirect.is_there() else "missing"]
                found.append(redirect.program)
        answer["missing"] += [each.program for each in self._keepers if not each.is_there()]

    def _restore(self, answer: Answer) -> None:
        """Put back what is missing, and put the redirects before all other rules."""
        for keeper in self._keepers:
            if not keeper.is_there():
                keeper.insert()
        for redirect in self._redirects:
            if not redirect.is_first():
                redirect.remove()
                self._insert(redirect)

    def _remove(self, answer: Answer | None = None) -> None:
        """Stop steering."""
        for redirect in self._redirects:
            redirect.remove()
        self._give_back_claim()

    def _release(self, answer: Answer | None = None) -> None:
        """Remove all rules, the redirects first."""
        self._remove()
        self._forget_connections()
        for keeper in self._keepers:
            keeper.remove()
        self.ended = True

    def _ignore(self, answer: Answer) -> None:
        """Do nothing: this request is unknown."""

    def _forget_connections(self) -> None:
        """Delete the entries of steered connections from connection tracking; see
        L{acme_alpn_proxy.host.conntrack}.

        Not while another instance or an earlier order still has a keeper: its live connections have
        entries that look the same, and its keeper keeps tracking on in any case.
        """
        entries = translated(self._order["port"])
        if entries and not self._others_keep():
            forget(entries)

    def _others_keep(self) -> bool:
        own = f'"{self._order["keeper"][-1]}"'
        for command in self._order["commands"]:
            listing = run([*command, "-t", "mangle", "-S", "PREROUTING"])[1]
            if any(KEEPER in line and own not in line for line in listing.splitlines()):
                return True
        return False


def obey_proxy(guard: Guard, line: int) -> None:
    """Carry out the proxy's requests until its end of the connection is closed, or all is removed.

    @param line: the descriptor of the socket for requests and answers. If the proxy does not read
        answers and the socket is full, an answer is lost.
    """
    os.set_blocking(line, False)
    poll = select.poll()
    poll.register(line, select.POLLIN)
    buffer = b""
    while not guard.ended:
        if poll.poll(_TICK * 1000):
            try:
                data = os.read(line, _LONGEST_LINE)
            except OSError:
                data = b""
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            buffer = buffer[-_LONGEST_LINE:]
            for each in lines:
                if guard.ended:  # nobody would remove rules that are made after this
                    break
                answer = guard.obey(each.decode("ascii", "replace"))
                with suppress(OSError):
                    os.write(line, json.dumps(answer).encode() + b"\n")
        guard.tick()


def main() -> None:
    """Guard until all rules are removed. Standard input is the connection to the proxy, standard
    error is the claim."""
    for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "PIPE"):
        signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
    os.dup2(2, _CLAIM)  # inheritable
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)
    guard = Guard(json.loads(sys.argv[-1]), give_back_claim=_close_claim)
    with suppress(Exception):  # whatever has failed, the rules must be removed
        obey_proxy(guard, 0)
    pause = _FIRST_PAUSE
    while not guard.ended:
        try:
            guard.clean_up()
        except CommandFailed:  # whatever the reason, try again: rules to a dead port are worse
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)


def _close_claim() -> None:
    with suppress(OSError):  # it is already closed
        os.close(_CLAIM)
