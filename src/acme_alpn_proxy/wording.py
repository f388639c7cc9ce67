"""Words for people that several messages share."""

from __future__ import annotations


def counted(count: int, what: str) -> str:
    """A number of things, in words: C{1 rule}, C{2 rules}."""
    return f"{count:,} {what}{'s' * (count != 1)}"
