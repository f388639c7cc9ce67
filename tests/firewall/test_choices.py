"""What happens to a packet, depending on questions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from acme_alpn_proxy.firewall.choices import PASSED, Choice, Choices, Outcome

QUESTIONS = 4

formulas = st.recursive(
    st.booleans(),
    lambda inner: st.tuples(st.integers(0, QUESTIONS - 1), inner, inner),
    max_leaves=12,
)


def made(choices: Choices, formula: bool | tuple[int, object, object]) -> Outcome:
    if isinstance(formula, bool):
        return PASSED if formula else choices.caught("it")
    question, yes, no = formula
    number = choices.question(question, False)
    return choices.choose(number, made(choices, yes), made(choices, no))  # type: ignore[arg-type]


def value(outcome: Outcome, answer: Callable[[int], bool]) -> bool:
    while isinstance(outcome, Choice):
        outcome = outcome.yes if answer(outcome.question) else outcome.no
    return outcome is PASSED


def meaning(formula: object, answers: tuple[bool, ...]) -> bool:
    if isinstance(formula, bool):
        return formula
    assert isinstance(formula, tuple)
    question, yes, no = formula
    return meaning(yes if answers[question] else no, answers)


@given(formulas, formulas)
def test_all_answers(one: bool, other: bool) -> None:
    """For all answers, the outcome is the one that was composed, and equal outcomes are one object.
    C{lost} finds something exactly if, for some answers, the first outcome passes and the second
    does not."""
    choices = Choices()
    for question in range(QUESTIONS):
        choices.question(question, None)
    first, second = made(choices, one), made(choices, other)
    everything = list(product((False, True), repeat=QUESTIONS))
    for answers in everything:
        assert value(first, answers.__getitem__) is meaning(one, answers)
    pairs = [(meaning(one, each), meaning(other, each)) for each in everything]
    assert (first is second) is all(a is b for a, b in pairs)
    assert (choices.lost(first, second) is not None) is any(a and not b for a, b in pairs)
    assert choices.may_pass(first) is any(a for a, _ in pairs)
    ends = {end is PASSED for end in choices.usual_ends(first)}
    assert ends == {a for a, _ in pairs}


def test_usual() -> None:
    """An ordinary visitor is not in a set of few addresses, and not over a limit."""
    choices = Choices()
    few, most, unknown = (choices.question(n, usual) for n, usual in enumerate((False, True, None)))
    by = choices.caught
    for question, names in ((few, {"no"}), (most, {"yes"}), (unknown, {"yes", "no"})):
        outcome = choices.choose(question, by("yes"), by("no"))
        assert {end.by for end in choices.usual_ends(outcome)} == names
