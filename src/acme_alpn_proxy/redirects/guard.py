"""The guard: a tiny process that outlives the proxy and removes its rules when it dies.

The proxy may be killed in any way, and rules to a dead port would leave the site down. So before
the first rule is there, a shell waits on a socket whose other end the proxy holds: when that
closes, the rules go. It keeps the privileges that the proxy may drop, and so puts back what others
wiped and removes the rules at stop, too. It can do nothing else: rules and commands are its
arguments.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Generator, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, inlineCallbacks

from ..errors import StartError
from ..firewall.xtables import LOCK_WAIT
from ..interfaces import ICommands

KEEPER_MATCH: Final = ("-m", "conntrack", "--ctstate", "INVALID")
"""What the keeper's rule matches; it has no target."""

ANSWER_DEADLINE: Final = 30.0
"""Seconds for the guard to answer: at most six commands may wait for the lock."""

END_DEADLINE: Final = 30.0
"""Seconds for a guard that was let go of to remove its rules."""

_STEP: Final = 0.02
_LONGEST_ANSWER: Final = 4_096
_NAME: Final = "\0acme-alpn-proxy redirect"

_SCRIPT: Final = r"""
trap '' HUP INT QUIT TERM USR1 USR2 PIPE
set -f
wait=$1 families=$2 keeper_match=$3 keeper=$4
shift 4
keeping() {
    $1 -w $wait -t mangle $2 PREROUTING $keeper_match -m comment --comment "$keeper" 2>&1
}
steering() {
    family=$1 operation=$2
    shift 2
    $family -w $wait -t nat $operation PREROUTING "$@" 2>&1
}
put_back() {
    kind=$1 which=$2
    shift 2
    said=$($kind $which -C "$@") && return
    if [ $? = 1 ]; then said=$($kind $which -I "$@") && back="$back $which" && return; fi
    failed="$failed $which: $said"
}
take_away() {
    kind=$1 which=$2
    shift 2
    said=$($kind $which -D "$@") && return
    $kind $which -C "$@" >/dev/null
    [ $? = 1 ] || failed="$failed $which -D: $said"
}
answer() {
    if [ "$failed" ]; then echo failed $failed; else echo done $back; fi
}
redirected=yes
while read -r wish; do
    back= failed=
    case $wish in
    look)
        for each in $families; do put_back keeping $each; put_back steering $each "$@"; done ;;
    remove)
        for each in $families; do take_away steering $each "$@"; done
        [ "$failed" ] || { redirected=; exec 2>&-; } ;;
    release)
        for each in $families; do take_away keeping $each; done
        [ "$failed" ] || { answer; exit; } ;;
    esac
    answer
done
for each in $families; do
    [ -z "$redirected" ] || steering $each -D "$@"
    keeping $each -D
done >/dev/null
"""
"""Its words: seconds to wait for the lock, names of the commands, match and comment of the keeper,
then the redirect's rule. Its input are wishes, its output an answer to each, one line.
Its standard error is the claim, which it gives back as soon as it redirects no more."""


@inlineCallbacks
def claim_redirect(
    commands: ICommands, seconds: float
) -> Generator[Deferred[Any], Any, socket.socket]:
    """Wait until no guard in this network namespace has a redirect left to remove.

    The claim is a bound name (unix(7), abstract: it is the network namespace's, and goes with the
    last process that holds it).

    @return: a Deferred of the claim, to be closed; fails with L{StartError}.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    waited = 0.0
    while True:
        try:
            claim.bind(_NAME)
            return claim
        except OSError as problem:
            if problem.errno != errno.EADDRINUSE or waited >= seconds:
                claim.close()
                raise StartError(
                    "another instance redirects :443 here, or is about to end that:"
                    f" {problem.strerror}; stop it first",
                    os.EX_TEMPFAIL,
                ) from None
        yield commands.pause(_STEP)
        waited += _STEP


class Guard:
    """The guard's process, seen from the proxy."""

    def __init__(
        self, claim: socket.socket, binaries: Sequence[str], keeper: str, rule: Sequence[str]
    ) -> None:
        """Start it; raises L{StartError}.

        @param claim: passes to the guard.
        @param binaries: a command for each family that is steered.
        @param keeper: the comment of the keeper's rule.
        @param rule: the redirect's, behind C{-t nat -I PREROUTING}.
        """
        self._line, theirs = socket.socketpair()
        words = [LOCK_WAIT, " ".join(binaries), " ".join(KEEPER_MATCH), keeper, *rule]
        with claim, theirs:
            try:
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", _SCRIPT, "acme-alpn-proxy-guard", *words],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=claim.fileno(),
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as problem:
                self._line.close()
                raise StartError(
                    f"cannot start /bin/sh as the guard of the rules: {problem.strerror}; see"
                    " whether it is there, and look at the limits (ulimit -a)",
                    os.EX_OSERR,
                ) from None
        # Commands that run when the proxy is killed hold the line too: the guard removes the rules
        # when none of them is about to add one.
        self._line.set_inheritable(True)
        self._line.setblocking(False)

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    @inlineCallbacks
    def ask(self, commands: ICommands, wish: str) -> Generator[Deferred[Any], Any, list[str]]:
        """Have it C{look} after the rules, C{remove} the redirect or C{release} the keeper.

        @return: a Deferred of the commands by which it had to put something back. Fails with
            L{StartError} if one of them failed, or it is gone.
        """
        try:
            self._line.send(f"{wish}\n".encode())
            waited = 0.0
            answer = b""
            while not answer.endswith(b"\n"):
                yield commands.pause(_STEP)
                waited += _STEP
                answer += self._receive()
                if waited >= ANSWER_DEADLINE:
                    raise StartError("the guard of the rules does not answer; it is asked again")
        except OSError as problem:
            raise StartError(
                f"the guard of the rules is gone: {problem.strerror}; another one takes over"
            ) from None
        verdict, *words = answer.decode("utf-8", "backslashreplace").split()
        if verdict == "failed":
            raise StartError(f"{' '.join(words)}; see why that command fails")
        return words

    @inlineCallbacks
    def end(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        """Let go of it: it removes what rules there are, and ends."""
        self._line.close()
        waited = 0.0
        while not self.gone and waited < END_DEADLINE:
            yield commands.pause(_STEP)
            waited += _STEP

    def _receive(self) -> bytes:
        try:
            data = self._line.recv(_LONGEST_ANSWER)
        except BlockingIOError:
            return b""
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return data
