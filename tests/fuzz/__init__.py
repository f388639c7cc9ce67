"""Fuzzing: bytes that a stranger, a local user or a proxy that was taken over may send.

A target is a module in C{targets}, and nothing more is needed to add one. It has

  - C{check(data: bytes)}, which raises an exception if C{data} has a forbidden effect;
  - C{SEEDS}, some inputs to begin with, each of a different kind.

C{python -m tests.fuzz} runs them under atheris, which looks for inputs that reach new code. Those
worth keeping are in C{corpus/NAME.hex}, one a line; pytest runs each target on all of its corpus.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from . import targets

CORPUS = Path(__file__).with_name("corpus")


class Target(Protocol):
    """The contents of a module in C{targets}."""

    SEEDS: Sequence[bytes]

    def check(self, data: bytes) -> None:
        """Raise if C{data} has an effect that is not allowed."""


def names() -> list[str]:
    """The names of all targets."""
    return sorted(module.name for module in pkgutil.iter_modules(targets.__path__))


def target(name: str) -> Target:
    """The target of that name."""
    return cast(Target, importlib.import_module(f"{targets.__name__}.{name}"))


def kept(name: str) -> list[bytes]:
    """The inputs that are kept for it."""
    path = CORPUS / f"{name}.hex"
    return [bytes.fromhex(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(name: str, inputs: Sequence[bytes]) -> None:
    """Keep these inputs for it, and no others."""
    lines = sorted({data.hex() for data in inputs}, key=lambda line: (len(line), line))
    (CORPUS / f"{name}.hex").write_text("".join(f"{line}\n" for line in lines))
