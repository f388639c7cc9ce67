"""The rules of a firewall, independent of their language, and what they do with a packet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from typing import Final, NamedTuple, TypeAlias

from .choices import PASSED, Choices, Outcome
from .packets import Answer, Packet, all_of, any_of

Test: TypeAlias = Callable[[Packet], Answer]


Reads: TypeAlias = Callable[[Packet], object]
"""The part of a packet that a test depends on."""


def of_family(packet: Packet) -> object:
    return packet.family, packet.reply


def of_source(packet: Packet) -> object:
    return packet.family, packet.reply and packet.local


def of_destination(packet: Packet) -> object:
    return packet.family, packet.reply or packet.local


class Action(Enum):
    """What a rule does with a packet that it matches."""

    CONTINUE = "continue"
    ACCEPT = "accept"
    DROP = "drop"
    QUEUE = "queue"
    """A program in user space decides."""
    RETURN = "return"
    JUMP = "jump"
    GOTO = "goto"
    MARK = "mark"
    NOTRACK = "notrack"
    TRANSLATE = "translate"


_ENDING = frozenset(Action) - {Action.CONTINUE, Action.JUMP, Action.MARK, Action.NOTRACK}
"""After these actions the kernel does not consult the next rule."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of a rule.

    @ivar usual: the answer for an ordinary visitor, if C{test} returns a question; L{None}:
        unknown.
    @ivar reads: what C{test} depends on; given only if C{test} is slow.
    """

    test: Test
    negated: bool = False
    usual: bool | None = False
    reads: Reads | None = None
    _known: dict[object, Answer] = field(default_factory=dict, compare=False, repr=False)

    def answer(self, packet: Packet) -> Answer:
        """The result of C{test}."""
        if self.reads is None:
            return self.test(packet)
        key = self.reads(packet)
        answer = self._known.get(key)
        if answer is None:
            answer = self._known[key] = self.test(packet)
        return answer


class Question(NamedTuple):
    """@ivar answer: the answer with which the rule matches."""

    text: str
    answer: bool
    usual: bool | None


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    @ivar text: describes the rule for the operator.
    @ivar target: the chain if C{action} is a jump or a goto; the port if it translates.
    """

    text: str
    conditions: Sequence[Condition]
    action: Action
    target: str = ""

    def matches(self, packet: Packet) -> list[Question] | None:
        """The questions, with the answers for which it matches; L{None}: it never matches."""
        questions = []
        for condition in self.conditions:
            answer = condition.answer(packet)
            if isinstance(answer, str):
                questions.append(Question(answer, not condition.negated, condition.usual))
            elif answer is condition.negated:
                return None
        return questions


_FEW: Final = 8


def bundled(rules: Iterable[Rule]) -> list[Rule]:
    """The rules; many successive ones that ban or allow single addresses become one rule."""
    found: list[Rule] = []
    for (action, reads), row in groupby(rules, _bundle):
        bundle = list(row)
        if reads is None or len(bundle) < _FEW:
            found += bundle
        else:
            text = f"{bundle[0].text}, or one of the {len(bundle) - 1} rules after it"
            found.append(Rule(text, (Condition(_any_of(bundle), reads=reads),), action))
    return found


def _bundle(rule: Rule) -> tuple[Action, Reads | None]:
    """What the rules of one bundle have in common; nothing to read if the rule fits in no
    bundle."""
    if rule.action not in (Action.ACCEPT, Action.DROP):
        return rule.action, None
    reads = {each.reads for each in rule.conditions} - {of_family}
    plain = all(each.usual is False and not each.negated for each in rule.conditions)
    fits = plain and reads in ({of_source}, {of_destination})
    return rule.action, reads.pop() if fits else None


def _any_of(rules: Sequence[Rule]) -> Test:
    return lambda packet: any_of(
        all_of(condition.answer(packet) for condition in rule.conditions) for rule in rules
    )


@dataclass(slots=True)
class Chain:
    """The rules of a chain, and its policy, L{Action.DROP} or L{Action.ACCEPT}."""

    policy: Action = Action.ACCEPT
    policy_text: str = ""
    rules: list[Rule] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Base:
    """A base chain, and where the kernel consults it.

    @ivar chains: the chains of its table, by name.
    @ivar table: the name of its table, with the family: C{ip nat}.
    @ivar age: a number that is larger for a newer table; L{None} if unknown.
    """

    chains: Mapping[str, Chain]
    name: str
    hook: str
    priority: int
    kind: str = "filter"
    table: str = ""
    age: int | None = None


class Course:
    """The path of a packet through base chains.

    @ivar marked: the rules that may mark it.
    """

    def __init__(
        self, packet: Packet, choices: Choices, catches: Action = Action.DROP, own_port: str = ""
    ) -> None:
        """
        @param catches: the action that counts as catching the packet.
        @param own_port: a translation to this port is intended, so it does not count.
        """
        self._packet = packet
        self._choices = choices
        self._catches = catches
        self._own_port = own_port
        self.marked: set[tuple[str, tuple[Question, ...]]] = set()

    def through(self, bases: Sequence[Base]) -> Outcome:
        """What happens to the packet in these chains, one after the other."""
        outcome: Outcome = PASSED
        for base in reversed(bases):
            chain = base.chains[base.name]
            end = outcome
            if chain.policy is not Action.ACCEPT:
                end = self._caught(Action.DROP, chain.policy_text)
            outcome = self._chain(base.chains, base.name, end, outcome)
        return outcome

    def _caught(self, action: Action, by: str) -> Outcome:
        return self._choices.caught(by) if action is self._catches else PASSED

    def _chain(
        self, chains: Mapping[str, Chain], name: str, fallen: Outcome, accepted: Outcome
    ) -> Outcome:
        """
        @param fallen: the outcome if the packet leaves the chain at its end, or returns.
        @param accepted: the outcome if the packet is accepted.
        """
        met = []
        for rule in chains[name].rules:
            questions = rule.matches(self._packet)
            if questions is not None:
                met.append((rule, questions))
                if not questions and rule.action in _ENDING:
                    break
        outcome = fallen
        for rule, questions in reversed(met):
            done = self._done(chains, rule, questions, fallen, accepted, outcome)
            for text, answer, usual in questions:
                number = self._choices.question(text, usual)
                yes, no = (done, outcome) if answer else (outcome, done)
                done = self._choices.choose(number, yes, no)
            outcome = done
        return outcome

    def _done(
        self,
        chains: Mapping[str, Chain],
        rule: Rule,
        questions: Sequence[Question],
        fallen: Outcome,
        accepted: Outcome,
        rest: Outcome,
    ) -> Outcome:
        """The outcome for a packet that the rule matches.

        @param rest: the outcome of the rules after this one.
        """
        action = rule.action
        if action is Action.MARK:
            self.marked.add((rule.text, tuple(questions)))
        if action is Action.JUMP:
            return self._chain(chains, rule.target, rest, accepted)
        if action is Action.GOTO:
            return self._chain(chains, rule.target, fallen, accepted)
        if action is Action.RETURN:
            return fallen
        if action is Action.ACCEPT:
            return accepted
        if action is Action.DROP:
            return self._caught(action, rule.text)
        if action is Action.QUEUE:
            decides = self._choices.question(rule.text, True)
            return self._choices.choose(decides, accepted, self._caught(Action.DROP, rule.text))
        if action is Action.TRANSLATE:
            if rule.target and rule.target == self._own_port:
                return PASSED
            return self._choices.caught(rule.text) if action is self._catches else accepted
        if action is Action.NOTRACK and action is self._catches:
            return self._choices.caught(rule.text)
        return rest
