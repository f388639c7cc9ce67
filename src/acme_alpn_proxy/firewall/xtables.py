"""What is common to all uses of iptables(8) and ip6tables(8)."""

from __future__ import annotations

import re
import shlex
from typing import Final

BINARIES: Final = {4: "iptables", 6: "ip6tables"}

LOCK_WAIT: Final = "5"
"""Seconds that iptables waits for its lock (C{-w})."""


def listed(output: str) -> list[list[str]]:
    """The words of each command that C{iptables -S} prints, from C{-A}, C{-N} or C{-P} on.

    A comment may hold anything, line ends too: what cannot be taken apart is left out, and is no
    rule of ours. Warnings that stand between the rules are left out as well.
    """
    found = []
    for command in re.split(r"^(?=-[ANP] |#)", output, flags=re.MULTILINE):
        if command.startswith("-"):
            try:
                found.append(shlex.split(command))
            except ValueError:
                pass
    return found
