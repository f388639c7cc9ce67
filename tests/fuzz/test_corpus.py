"""Each target on its seeds and on the inputs that are kept for it."""

from __future__ import annotations

import pytest

from . import kept, names, target


@pytest.mark.parametrize("name", names())
def test_corpus(name: str) -> None:
    """The inputs that fuzzing has found, and those that it begins with, have no forbidden
    effect."""
    for data in [b"", *target(name).SEEDS, *kept(name)]:
        target(name).check(data)
