"""iptables and ip6tables in memory, as L{ICommands}."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from socket import socket

from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from acme_alpn_proxy.interfaces import NOT_FOUND, ICommands, Result
from acme_alpn_proxy.redirects import guardprocess
from acme_alpn_proxy.redirects.guardprocess import Answer, CommandFailed, Order

NO_SUCH_RULE = "iptables: Bad rule (does a matching rule exist in that chain?)."
LOCKED = "Another app is currently holding the xtables lock."

_AS_LISTED = {"--to-port": ["--to-ports"], "--syn": ["--tcp-flags", "FIN,SYN,RST,ACK", "SYN"]}


def _quoted(word: str) -> str:
    """A word as C{iptables -S} prints it: in double quotes unless it is plain."""
    if not set(word) & set(" \"'\\"):
        return word
    return '"' + "".join(f"\\{c}" if c in "\"\\'" else c for c in word) + '"'


@implementer(ICommands)
class FakeIptables:
    """Chains like those of iptables: a rule is identified by its effect, not by its spelling.

    @ivar chains: the rules of (binary, table, chain), each a list of words as C{-S} prints them.
    @ivar calls: every command line so far.
    @ivar failures: the answer to the call of that number (the first is 1), instead of its effect.
    """

    def __init__(self) -> None:
        self.chains: defaultdict[tuple[str, str, str], list[list[str]]] = defaultdict(list)
        self.calls: list[tuple[str, ...]] = []
        self.failures: dict[int, tuple[int, str]] = {}

    def run(self, argv: Sequence[str]) -> Deferred[Result]:
        return succeed(Result(tuple(argv), *self.answer(argv)))

    def answer(self, argv: Sequence[str]) -> tuple[int, str]:
        """Exit status and output of a command."""
        self.calls.append(tuple(argv))
        return self.failures.get(len(self.calls)) or self._do(argv)

    def guarded(self, argv: Sequence[str], *allowed: int) -> tuple[int, str]:
        """The same, in the place of L{acme_alpn_proxy.redirects.guardprocess.run}."""
        code, output = self.answer(argv)
        if code not in (0, *allowed):
            raise CommandFailed(argv, code, output)
        return code, output

    def pause(self, seconds: float) -> Deferred[None]:
        raise AssertionError("nothing here waits")

    def snapshot(self) -> dict[tuple[str, str, str], list[list[str]]]:
        """All rules, for comparison with a later time."""
        return {name: copy.deepcopy(rules) for name, rules in self.chains.items() if rules}

    def rules(self, table: str) -> dict[str, list[str]]:
        """By binary, the rules of PREROUTING in C{table}; a binary without rules is left out."""
        return {
            binary: [" ".join(rule) for rule in rules]
            for (binary, of, chain), rules in self.chains.items()
            if of == table and chain == "PREROUTING" and rules
        }

    def _do(self, argv: Sequence[str]) -> tuple[int, str]:
        if argv[0] not in ("iptables", "ip6tables"):
            return NOT_FOUND, f"{argv[0]}: not found on PATH"
        if argv[1:] == ["-V"]:
            return 0, f"{argv[0]} v1.8.9 (nf_tables)"
        binary, wait, _, flag, table, command, *rest = argv
        assert (wait, flag) == ("-w", "-t"), argv
        if not rest:
            assert command == "-S", argv
            names = [name for of, within, name in self.chains if (of, within) == (binary, table)]
            listings = [self._listing(name, self.chains[binary, table, name]) for name in names]
            return 0, "".join(line for listing in listings for line in listing)
        chain, *words = rest
        rules = self.chains[binary, table, chain]
        rule = [part for word in words for part in _AS_LISTED.get(word, [word])]
        if command == "-S" and words:
            return 0, "".join(self._listing(chain, rules)[int(words[0]) :][:1])
        if command == "-S":
            return 0, "".join(self._listing(chain, rules))
        if command == "-I":
            rules.insert(0, rule)
        elif command == "-A":
            rules.append(rule)
        elif rule not in rules:
            return 1, NO_SUCH_RULE
        elif command == "-D":
            rules.remove(rule)
        else:
            assert command == "-C", argv
        return 0, ""

    @staticmethod
    def _listing(chain: str, rules: list[list[str]]) -> list[str]:
        printed = [f"-A {chain} {' '.join(map(_quoted, rule))}\n" for rule in rules]
        return [f"-P {chain} ACCEPT\n", *printed]


class FakeGuard:
    """A guard that runs in this process, with a clock that does not move.

    @ivar order: the guard's C{Order}.
    @ivar rules_before: the rules that existed when the guard was started.
    @ivar wishes: the requests that it has received.
    @ivar calls_so_far: the commands that had been run when it last answered.
    """

    def __init__(self, iptables: FakeIptables, claim: socket, order: Order) -> None:
        self._iptables = iptables
        self._guard = guardprocess.Guard(order, wall=lambda: 0.0, monotonic=lambda: 0.0)
        self._claim = claim
        self.order = order
        self.rules_before = iptables.snapshot()
        self.wishes: list[str] = []
        self.gone = False

    def ask(self, commands: ICommands, wish: str) -> Deferred[Answer]:
        self.wishes.append(wish)
        answer = self._guard.obey(f"{len(self.wishes)} {wish}")
        self.calls_so_far = len(self._iptables.calls)
        self._guard.tick()
        return succeed(answer)

    def end(self, commands: ICommands) -> Deferred[None]:
        """Remove its rules and release its claim."""
        self.gone = True
        self._claim.close()
        self._guard.clean_up()
        return succeed(None)
