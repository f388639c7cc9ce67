"""What happens to a packet in the firewall, if some conditions of rules have unknown results.

Each such condition is a question (see L{acme_alpn_proxy.firewall.packets}). An outcome is an end,
or a choice between two outcomes by the answer to a question. Equal outcomes are one object (a
reduced, ordered binary decision diagram): if the same happens to two packets, they have the same
outcome; if not, their outcomes differ exactly where the answers matter.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """The packet passes; or a rule or policy catches it: takes the action that a
    L{acme_alpn_proxy.firewall.rules.Course} looks for, such as a drop.

    @ivar by: the text of the rule or policy that catches it; empty if it passes.
    """

    by: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """@ivar question: its number; questions of the outcomes below it have smaller numbers."""

    question: int
    yes: Outcome
    no: Outcome


Outcome: TypeAlias = End | Choice

PASSED = End()


class Choices:
    """Makes outcomes that can be compared with each other."""

    def __init__(self) -> None:
        self._ends: dict[str, End] = {"": PASSED}
        self._numbers: dict[Hashable, int] = {}
        self._usual: list[bool | None] = []
        self._made: dict[tuple[int, int, int], Choice] = {}
        self._chosen: dict[tuple[int, int, int], Outcome] = {}
        self._kept: list[Outcome] = []

    def caught(self, by: str) -> End:
        return self._ends.setdefault(by, End(by))

    def question(self, text: Hashable, usual: bool | None) -> int:
        """Return the number of a question.

        @param usual: the answer for an ordinary visitor; L{None} if unknown.
        """
        number = self._numbers.setdefault(text, len(self._numbers))
        if number == len(self._usual):
            self._usual.append(usual)
        return number

    def choose(self, question: int, yes: Outcome, no: Outcome) -> Outcome:
        """Return C{yes} where the answer to the question is yes, and C{no} where it is no."""
        if yes is no:
            return yes
        key = question, id(yes), id(no)
        found = self._chosen.get(key)
        if found is None:
            top = max(question, _question(yes), _question(no))
            if top == question:
                found = self._choice(question, _below(yes, top, True), _below(no, top, False))
            else:
                found = self._choice(
                    top,
                    self.choose(question, _below(yes, top, True), _below(no, top, True)),
                    self.choose(question, _below(yes, top, False), _below(no, top, False)),
                )
            self._chosen[key] = found
            self._kept += yes, no  # Python would reuse the id() of a freed object
        return found

    def _choice(self, question: int, yes: Outcome, no: Outcome) -> Outcome:
        if yes is no:
            return yes
        return self._made.setdefault((question, id(yes), id(no)), Choice(question, yes, no))

    def lost(self, before: Outcome, after: Outcome) -> str | None:
        """The rule or policy that catches the packet of C{after} although, with the same answers,
        the packet of C{before} passes; L{None} if there is none."""
        to_do, done = [(before, after)], set()
        while to_do:
            before, after = pair = to_do.pop()
            if before is after or (id(before), id(after)) in done:
                continue
            done.add((id(before), id(after)))
            if isinstance(before, End) and isinstance(after, End):
                if before is PASSED:
                    return after.by
                continue
            top = max(map(_question, pair))
            unusual = not self._usual[top]
            to_do += [  # the last one added is examined first
                (_below(before, top, answer), _below(after, top, answer))
                for answer in (unusual, not unusual)
            ]
        return None

    def usual_ends(self, outcome: Outcome) -> Iterator[End]:
        """The ends that ordinary visitors may reach."""
        to_do, done = [outcome], set()
        while to_do:
            outcome = to_do.pop()
            if isinstance(outcome, End):
                yield outcome
            elif id(outcome) not in done:
                done.add(id(outcome))
                usual = self._usual[outcome.question]
                to_do += [outcome.no] if usual is not True else []
                to_do += [outcome.yes] if usual is not False else []

    def may_pass(self, outcome: Outcome) -> bool:
        """Whether the packet passes for some answers."""
        to_do, done = [outcome], set()
        while to_do:
            outcome = to_do.pop()
            if outcome is PASSED:
                return True
            if isinstance(outcome, Choice) and id(outcome) not in done:
                done.add(id(outcome))
                to_do += outcome.no, outcome.yes
        return False


def _question(outcome: Outcome) -> int:
    return -1 if isinstance(outcome, End) else outcome.question


def _below(outcome: Outcome, question: int, answer: bool) -> Outcome:
    """The part of the outcome that remains when the question has that answer."""
    if isinstance(outcome, End) or outcome.question != question:
        return outcome
    return outcome.yes if answer else outcome.no
