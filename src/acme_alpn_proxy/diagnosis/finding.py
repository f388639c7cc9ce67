"""What a check has found: one line for the operator, or one object for a program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypedDict

from ..errors import cause_and_remedy


class Level(IntEnum):
    """How bad it is, the worst last."""

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
    """The verdict of one check.

    @ivar name: of the check.
    @ivar cause: what was seen; may be empty where all is well.
    @ivar remedy: what to do; empty where all is well.
    """

    name: str
    level: Level
    cause: str = ""
    remedy: str = ""

    @classmethod
    def refused(cls, name: str, problem: Exception | str, level: Level = Level.FAILED) -> Finding:
        """Of an error for the operator: the cause, a semicolon, the remedy."""
        return cls(name, level, *cause_and_remedy(str(problem)))

    def at_most(self, level: Level) -> Finding:
        """The same, but no worse than this."""
        return replace(self, level=min(self.level, level))

    def parts(self) -> tuple[str, str, str]:
        """Its line in three: the level, padded, the name, and the rest."""
        told = "; ".join(filter(None, [self.cause, self.remedy]))
        return f"{self.level!s:<7}", self.name, f"{': ' * bool(told)}{told}"

    def __str__(self) -> str:
        level, name, rest = self.parts()
        return f"{level} {name}{rest}"

    def as_object(self) -> FindingObject:
        """For JSON."""
        return {
            "name": self.name,
            "verdict": str(self.level),
            "cause": self.cause,
            "remedy": self.remedy,
        }


def summary(findings: Sequence[Finding]) -> str:
    """The verdict on all together, as a sentence."""
    count = {level: sum(each.level is level for each in findings) for level in Level}
    checks = f"{len(findings)} checks"
    if count[Level.FAILED]:
        but = f", {count[Level.WARNING]} warned" if count[Level.WARNING] else ""
        return f"It would not work here: {count[Level.FAILED]} of {checks} failed{but}."
    if count[Level.WARNING]:
        return f"It would work here, but there are warnings: {count[Level.WARNING]} of {checks}."
    return f"It would work here: {checks}, all ok."


def worst(findings: Iterable[Finding]) -> Level:
    """The verdict on all together."""
    return max((finding.level for finding in findings), default=Level.OK)
