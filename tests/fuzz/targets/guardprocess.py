"""The wishes of a proxy that was taken over, to the guard of its rules."""

from __future__ import annotations

import json
import socket
from unittest import mock

from acme_alpn_proxy.redirects import guardprocess
from acme_alpn_proxy.redirects.guardprocess import Answer, CommandFailed, Guard, Order, obey_proxy

from ...fake_iptables import LOCKED, FakeIptables
from ..conversation import TURN, pieces

BINARIES = ("ip6tables", "iptables")
PORT = 21443
COMMENT = ["-m", "comment", "--comment"]
RULE = ["-p", "tcp", "--dport", "443", *COMMENT, "acme-alpn-proxy", "-j", "REDIRECT"]
RULE += ["--to-ports", str(PORT)]
KEEPER = ["-m", "conntrack", "--ctstate", "INVALID", *COMMENT, "acme-alpn-proxy keeper 7 1 1"]
FOREIGN = {
    (binary, table, "PREROUTING"): [["-s", "192.0.2.0/24", "-j", "ACCEPT"]]
    for binary in BINARIES
    for table in ("mangle", "nat")
}

SEEDS = [
    b"\0\0" + TURN.join(each.encode() + b"\n" for each in wishes)
    for wishes in (
        ("1 apply", "2 look", "3 remove", "4 release"),
        ("1 apply", "2 restore", "3 look"),
        ("1 take over", "2 look", "3 release"),
        ("apply", "4 nothing", "999999999999999999999 look", ""),
        ("1 release",),
    )
] + [b"\x03\x01" + b"1 apply\n" + TURN + b"2 look\n", b"\x05\x04" + b"1 apply\n2 release\n"]
"""The first two bytes say which call of iptables fails, and with what status."""

_RENEWAL = guardprocess.RENEWAL + 1


def check(data: bytes) -> None:
    """Whatever is sent: nothing is raised, only its own two rules are ever made or deleted, every
    line gets one answer, and when the connection is closed, its rules are gone."""
    iptables = FakeIptables()
    for chain, rules in FOREIGN.items():
        iptables.chains[chain] = [list(rule) for rule in rules]
    if data[:1] != b"\0":
        number, status = data[0] if data else 0, data[1] if len(data) > 1 else 4
        iptables.failures[number] = max(1, status), LOCKED
    clock = [0.0]
    order: Order = {
        "commands": [[binary, "-w", "5"] for binary in BINARIES],
        "keeper": KEEPER,
        "rule": RULE,
        "expires": True,
        "port": PORT,
    }
    with (
        mock.patch.object(guardprocess, "run", iptables.guarded),
        mock.patch.object(guardprocess, "translated", return_value=[]),
        mock.patch.object(guardprocess, "_TICK", 0),
    ):
        guard = Guard(
            order,
            wall=lambda: clock[0],
            monotonic=lambda: clock[0],
            waiting=lambda port: False,
        )
        for sent in pieces(data[2:]):
            if guard.ended:
                break
            _tell(guard, sent)
            _is_ours(iptables)
            clock[0] += _RENEWAL
            guard.tick()
        if not guard.ended:
            _tell(guard, b"\n7 look\n", 7)
        for _ in range(2):  # something may have failed
            try:
                if not guard.ended:
                    guard.clean_up()
            except CommandFailed:
                continue
    assert iptables.snapshot() == FOREIGN, "a rule stays, or another's is gone"


def _tell(guard: Guard, sent: bytes, number: int | None = None) -> None:
    """Send this on the line, and look at the answers."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(sent)
        ours.shutdown(socket.SHUT_WR)
        obey_proxy(guard, theirs.fileno())
        theirs.close()
        try:
            answers = ours.makefile("rb").read().splitlines()
        except ConnectionResetError:  # it has read no further than to its last wish
            assert guard.ended
            return
    assert len(answers) <= sent.count(b"\n")
    assert guard.ended or len(answers) == sent.count(b"\n")
    for line in answers:
        answer: Answer = json.loads(line)
        assert answer.keys() == Answer.__annotations__.keys()
        assert len(line) < 16_384
    assert number is None or answer["number"] == number


def _is_ours(iptables: FakeIptables) -> None:
    for name, rules in iptables.chains.items():
        foreign = FOREIGN.get(name, [])
        ours = RULE if name[1] == "nat" else KEEPER
        others = [rule for rule in rules if rule[: len(ours)] != ours]
        assert others == foreign, (name, rules)
