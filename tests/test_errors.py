"""The page of errors, against the texts that the source makes."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import acme_alpn_proxy
from acme_alpn_proxy.interfaces import Result

from .documents import ROOT

ERRORS = ("StartError", "VisitorsLost", "CannotRun", "Unusable", "ControlError", "NotListening")
SYSEXITS = {f"os.{name}": getattr(os, name) for name in dir(os) if name.startswith("EX_")}
PLACEHOLDER = "X"

MADE_ELSEWHERE = {
    "result.failure": Result(("COMMAND",), cast(int, "NUMBER"), "OUTPUT").failure,
}
"""By expression: the text, with placeholders, of an error whose text is made elsewhere."""

MODULES = [
    found.name for found in pkgutil.walk_packages(acme_alpn_proxy.__path__, "acme_alpn_proxy.")
]

Rows = dict[str, set[str]]
"""Statuses by line, in which placeholders and other words in capitals are all the same."""


def alike(line: str) -> str:
    return re.sub(r"[A-Z][A-Z0-9_]+", PLACEHOLDER, line)


def text_of(node: ast.expr, names: dict[str, object]) -> str:
    """The value of an expression with placeholders in it; constants of its module have their
    values."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, names)
    expression = ast.unparse(node)
    known = names.get(expression, MADE_ELSEWHERE.get(expression))
    return known if isinstance(known, str) else PLACEHOLDER


def arguments(tree: ast.Module) -> Iterator[list[ast.expr]]:
    """The arguments of each error: where it is raised, or in the class that makes its text.

    Errors that another process has reported are left out: they are raised with one starred value.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "StartError" in map(ast.unparse, node.bases):
            calls = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
            yield from (each.args for each in calls if ast.unparse(each.func) == "super().__init__")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ERRORS:
            yield from [node.args] if not isinstance(node.args[0], ast.Starred) else []


def made_by(module: str) -> Iterator[tuple[str, str]]:
    """Each error that a module makes: its line, and its status if that is a constant."""
    loaded = importlib.import_module(module)
    constants = {name: value for name, value in vars(loaded).items() if name.isupper()}
    known = SYSEXITS | constants
    assert loaded.__file__ is not None
    for text, *status in arguments(ast.parse(Path(loaded.__file__).read_text())):
        statuses = (str(known.get(ast.unparse(each), "")) for each in status)
        yield text_of(text, constants), "".join(statuses)


def in_the_source() -> Rows:
    found: Rows = {}
    for module in MODULES:
        for line, status in made_by(module):
            found.setdefault(alike(line), set()).update({status} - {""})
    return found


ENTRY = re.compile(r"(.+)\n\n`(.+)`\n\n- \*\*Cause:\*\* .+\n(?:- \*\*What to do:\*\* .+\n)?(.*)")
"""Heading, line, and the exit status or nothing."""


def entries() -> list[tuple[str, str, str]]:
    """Heading, line and statuses of each error of the page."""
    _, *sections = re.split("^### ", (ROOT / "docs" / "errors.md").read_text(), flags=re.MULTILINE)
    found = [(section, ENTRY.match(section)) for section in sections]
    assert [section for section, entry in found if entry is None] == []
    return [(entry[1], entry[2], entry[3]) for _, entry in found if entry is not None]


def in_the_document() -> Rows:
    found: Rows = {}
    for _, line, statuses in entries():
        found.setdefault(alike(line), set()).update(re.findall("[0-9]+", statuses))
    return found


def test_anchors() -> None:
    """Each error has a heading of its own, from which the same anchor is made everywhere."""
    headings = [heading for heading, _, _ in entries()]
    assert len(set(headings)) == len(headings)
    assert [each for each in headings if not re.fullmatch("[A-Z][A-Za-z0-9_ -]+", each)] == []


def test_every_error_is_in_the_document() -> None:
    """The page has every error line of the program, and no other line."""
    assert in_the_source().keys() == in_the_document().keys()


def test_status() -> None:
    """The page has the exit status that belongs to a line."""
    told = in_the_document()
    assert {
        line for line, statuses in in_the_source().items() if not statuses <= told[line]
    } == set()


def test_cause_and_remedy() -> None:
    """Each error is one line: first the cause, then the remedy."""
    lines = [line for line in in_the_source() if not line.startswith("already running")]
    assert [line for line in lines if "\n" in line or "; " not in line] == []
