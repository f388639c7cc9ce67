"""The claim: only one process at a time changes the redirect of a network namespace.

A claim is an abstract name (unix(7)) that only its holder uses: C{acme-alpn-proxy redirect} and a
unique part. Such names belong to the network namespace, so containers that share only the namespace
see them too. A name disappears with the last process that holds it. Any local user can bind one, so
names of other users do not count.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Generator
from typing import Any, Final

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.logger import Logger

from ..errors import StartError
from ..host.unixsockets import BoundName, abstract_names
from ..interfaces import ICommands

_PREFIX: Final = b"acme-alpn-proxy redirect"

_STEP: Final = 0.02
_JITTER_MILLISECONDS: Final = 20


_NEWS_AFTER: Final = 1.0
"""Seconds of waiting after which the operator gets a message."""

_log = Logger()


class _Held(Exception):
    """Another process holds the claim, or is taking it."""


@inlineCallbacks
def claim_redirect(
    commands: ICommands, seconds: float
) -> Generator[Deferred[Any], Any, socket.socket]:
    """Wait until no other process holds the claim, and take it.

    @param seconds: how long to wait.
    @return: a Deferred of the claim, to be closed; fails with L{StartError}.
    """
    waited = 0.0
    while True:
        try:
            return _take()
        except _Held:
            pass
        except OSError as problem:
            raise StartError(
                f"cannot claim the redirect: {problem.strerror}; look at the limits (ulimit -a)",
                os.EX_OSERR,
            ) from None
        if waited >= seconds:
            raise StartError(
                "another instance still steers port 443 of this host; stop that instance first (to"
                " find it: ss -xap | grep 'acme-alpn-proxy redirect'), or try again in a minute",
                os.EX_TEMPFAIL,
            )
        # Two processes that see each other both close their claims. Their pauses differ, so one of
        # them then finds no other claim.
        pause = _STEP + secrets.randbelow(_JITTER_MILLISECONDS) / 1000
        if waited < _NEWS_AFTER <= waited + pause:
            _log.info(
                "Waiting until another instance has stopped steering port 443, at most {seconds:g}"
                " s",
                seconds=seconds,
                is_waiting=True,
            )
        yield commands.pause(pause)
        waited += pause


def _take() -> socket.socket:
    """Bind a name of our own, then look for others. Of two processes, at least one sees the
    other."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(b"\0%s %d %s" % (_PREFIX, os.getpid(), secrets.token_hex(4).encode()))
        own = os.fstat(claim.fileno()).st_ino
        if any(_counts(other) for other in _all_names() if other.inode != own):
            raise _Held
    except BaseException:
        claim.close()
        raise
    return claim


def _counts(name: BoundName) -> bool:
    """Whether it is a claim of root or of this user. An unknown owner counts: waiting is safer."""
    return name.uid in (None, 0, os.geteuid())


def _all_names() -> list[BoundName]:
    try:
        return list(abstract_names(_PREFIX))
    except OSError:  # the kernel has no unix_diag
        return _names_without_owner()


def _names_without_owner() -> list[BoundName]:
    """From /proc/net/unix, which has the inode and the name (after C{@}), but not the owner."""
    found = []
    with open("/proc/net/unix", "rb") as listing:
        for line in listing:
            *_, inode, path = [b"", b"", *line.rstrip(b"\n").split(maxsplit=7)][-2:]
            if path.startswith(b"@" + _PREFIX):
                found.append(BoundName(path[1:], int(inode), None))
    return found
