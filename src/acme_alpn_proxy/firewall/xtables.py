"""What all uses of iptables(8) and ip6tables(8) share."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from typing import Final

from ..errors import AS_ADMINISTRATOR, StartError
from ..host.facts import may_administer_network
from ..interfaces import NOT_FOUND, Result

BINARIES: Final = {4: "iptables", 6: "ip6tables"}

_VARIANTS: Final = {"xtables-nft-multi": "-nft", "xtables-legacy-multi": "-legacy"}
"""For each program to which the link C{iptables} may lead: the ending of the name that always means
this variant."""

LOCK_WAIT: Final = "5"
"""Seconds that iptables waits for its lock (C{-w})."""

NO_SUCH_RULE: Final = 1
"""Exit status of C{-D} and C{-C} if the rule does not exist. If the lock is held or the rule is
wrong, the status is another one."""

NO_SUCH_TABLE: Final = 3
"""Exit status if the kernel has no such table, or does not know this family."""


def command(family: int, table: str, *words: str, variant: str = "") -> list[str]:
    """The command line.

    @param family: 4 or 6.
    @param words: the operation, and the rule.
    @param variant: C{-nft} or C{-legacy}; empty: the one that the host has chosen.
    """
    return [f"{BINARIES[family]}{variant}", "-w", LOCK_WAIT, "-t", table, *words]


def pinned(family: int) -> str:
    """The variant of iptables that makes a rule of this family now, by its own name if it has one.

    C{iptables} is C{iptables-nft} or C{iptables-legacy}, as the host chooses
    (update-alternatives(1)); the choice may change while a rule exists.
    """
    name = BINARIES[family]
    path = shutil.which(name)
    variant = _VARIANTS.get(os.path.basename(os.path.realpath(path))) if path else None
    if variant is not None and shutil.which(f"{name}{variant}"):
        return f"{name}{variant}"
    return name


def failed(result: Result, *, custom_rule: bool = False) -> StartError:
    """The error for a failed command of iptables.

    @param custom_rule: whether it is the operator's own rule.
    """
    binary = result.argv[0]
    if result.code == NOT_FOUND:
        status = os.EX_UNAVAILABLE
        remedy = f"install {binary}, or put its folder (often /usr/sbin) on PATH"
    elif not may_administer_network():
        status, remedy = os.EX_NOPERM, AS_ADMINISTRATOR
    elif "open lock file" in result.one_line:
        status = os.EX_CONFIG
        remedy = "make the folder of that file writable"
    elif "lock" in result.one_line:
        status = os.EX_TEMPFAIL
        remedy = "another program holds the lock of iptables: try again when it has finished"
    elif custom_rule:
        status = os.EX_CONFIG
        remedy = "see whether ACME_ALPN_PROXY_RULESPEC is right for this command"
    else:
        status, remedy = (
            os.EX_OSERR,
            f"run '{binary} -t nat -L' as root, and correct what it reports",
        )
    if binary.startswith(BINARIES[6]) and status != os.EX_NOPERM:
        remedy += ", or set ACME_ALPN_PROXY_DISABLEV6=y to steer IPv4 only"
    return StartError(f"{result.failure}; {remedy}", status)


def listed(output: str) -> list[list[str]]:
    """The words of each command that C{iptables -S} prints, from C{-A}, C{-N} or C{-P} on.

    A comment may contain anything, even line ends: a command that cannot be split into words is
    left out; it is not a rule of this program. Warnings between the rules are left out, too.
    """
    found = []
    for line in re.split(r"^(?=-[ANP] |#)", output, flags=re.MULTILINE):
        if line.startswith("-"):
            try:
                found.append(shlex.split(line))
            except ValueError:
                pass
    return found
