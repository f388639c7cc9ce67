"""The rules of this program, as iptables(8) prints them.

It imports only the standard library, since the guard uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

COMMENT: Final = "acme-alpn-proxy"
"""The comment of every redirect; the original program uses the same one."""

KEEPER: Final = f"{COMMENT} keeper"
"""The beginning of every keeper's comment."""

KEEPER_MATCH: Final = ("-m", "conntrack", "--ctstate", "INVALID")
"""The match of the keeper's rule; the rule has no target."""

EXPIRY: Final = ("-m", "time", "--datestop")
"""The match of a rule that expires (iptables-extensions(8)); a time in UTC follows."""


def word_after(words: Sequence[str], flag: str) -> str:
    """The word after C{flag}, or nothing."""
    return words[words.index(flag) + 1] if flag in words[:-1] else ""


def is_redirect(words: Sequence[str], port: int) -> bool:
    """Whether a nat rule is a redirect of this program to C{port}."""
    target = (
        word_after(words, "--to-ports")
        or word_after(words, "--to-port")
        or word_after(words, "--to-destination").rpartition(":")[2]
    )
    return word_after(words, "--comment") == COMMENT and target == str(port)
