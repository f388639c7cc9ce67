"""What the documents say of errors, against the source."""

from __future__ import annotations

import ast
import importlib
import os
import re
from collections.abc import Iterator

from .documents import ROOT
from .test_house import MODULES, PACKAGE

ERRORS = ("StartError", "AlreadyRunning", "CannotRun", "Unusable")
SYSEXITS = {f"os.{name}": getattr(os, name) for name in dir(os) if name.startswith("EX_")}
PLACEHOLDER = "X"

Rows = dict[str, set[str]]
"""Statuses by line, in which placeholders and other words in capitals are all the same."""


def alike(line: str) -> str:
    return re.sub(r"[A-Z][A-Z0-9_]+", PLACEHOLDER, line)


def text_of(node: ast.Constant | ast.JoinedStr, names: dict[str, object]) -> str:
    """A literal's text, with constants of its module in their places."""
    text = ""
    for part in node.values if isinstance(node, ast.JoinedStr) else [node]:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue):
            known = names.get(ast.unparse(part.value))
            text += known if isinstance(known, str) else PLACEHOLDER
    return text


def raised(module: str) -> Iterator[tuple[str, str]]:
    """Each error that a module makes: its line, and its status if that is a constant."""
    names = vars(importlib.import_module(f"{PACKAGE}.{module}"))
    constants = {name: value for name, value in names.items() if name.isupper()}
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ERRORS:
            text, *status = node.args
            assert isinstance(text, ast.Constant | ast.JoinedStr), f"{module}: no literal"
            known = SYSEXITS | constants
            yield (
                text_of(text, constants),
                "".join(str(known.get(ast.unparse(each), "")) for each in status),
            )


def in_the_source() -> Rows:
    found: Rows = {}
    for module in MODULES:
        if module:
            for line, status in raised(module):
                found.setdefault(alike(line), set()).update({status} - {""})
    return found


def in_the_document() -> Rows:
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.partition("\n## Errors\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \|.*\|(.*)\|$", section, re.MULTILINE)
    return {alike(line): set(re.findall("[0-9]+", status)) for line, status in rows}


def test_every_error_is_in_the_document() -> None:
    """Every line by which the program refuses has a row, and every row is such a line."""
    assert in_the_source().keys() == in_the_document().keys()


def test_status() -> None:
    """Its row tells the exit status that goes with a line."""
    told = in_the_document()
    assert {
        line for line, statuses in in_the_source().items() if not statuses <= told[line]
    } == set()


def test_cause_and_remedy() -> None:
    """A line is one, and has the remedy behind the cause."""
    lines = [line for line in in_the_source() if not line.startswith("already running")]
    assert [line for line in lines if "\n" in line or "; " not in line] == []
