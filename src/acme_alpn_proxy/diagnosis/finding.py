"""The result of a check: one line for the operator, or one object for a program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypedDict

from ..errors import cause_and_remedy


class Level(IntEnum):
    """How serious it is; the worst is the last."""

    OK = 0
    WARNING = 1
    FAILED = 2

    def __str__(self) -> str:
        return self.name.lower()


class FindingObject(TypedDict):
    """A finding in JSON."""

    name: str
    verdict: str
    cause: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    @ivar name: the name of the check.
    @ivar cause: what was found; may be empty if all is well.
    @ivar remedy: what to do; empty if all is well.
    """

    name: str
    level: Level
    cause: str = ""
    remedy: str = ""

    @classmethod
    def refused(cls, name: str, problem: Exception | str, level: Level = Level.FAILED) -> Finding:
        """Make a finding from an error for the operator: the cause, a semicolon, the remedy."""
        return cls(name, level, *cause_and_remedy(str(problem)))

    def at_most(self, level: Level) -> Finding:
        """The same finding, with C{level} if its own is worse."""
        return replace(self, level=min(self.level, level))

    def parts(self) -> tuple[str, str, str]:
        """Its line in three parts: the padded level, the name, and the rest."""
        told = "; ".join(filter(None, [self.cause, self.remedy]))
        return f"{self.level!s:<7}", self.name, f"{': ' * bool(told)}{told}"

    def __str__(self) -> str:
        level, name, rest = self.parts()
        return f"{level} {name}{rest}"

    def as_object(self) -> FindingObject:
        """The finding as an object for JSON."""
        return {
            "name": self.name,
            "verdict": str(self.level),
            "cause": self.cause,
            "remedy": self.remedy,
        }


def summary(findings: Sequence[Finding]) -> str:
    """The result of all checks, as a sentence."""
    count = {level: sum(each.level is level for each in findings) for level in Level}
    checks = f"{len(findings)} checks"
    if count[Level.FAILED]:
        but = f", {count[Level.WARNING]} warned" if count[Level.WARNING] else ""
        return f"It would not work here: {count[Level.FAILED]} of {checks} failed{but}."
    if count[Level.WARNING]:
        return f"It would work here, but there are warnings: {count[Level.WARNING]} of {checks}."
    return f"It would work here: {checks}, all ok."


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level of all."""
    return max((finding.level for finding in findings), default=Level.OK)
