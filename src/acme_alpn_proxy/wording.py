"""Words for people that several messages share."""

from __future__ import annotations


def counted(count: int, what: str, plural: str = "") -> str:
    """A number of things, in words: C{1 rule}, C{2 rules}.

    @param plural: if it is not C{what} with an s.
    """
    return f"{count:,} {what if count == 1 else plural or f'{what}s'}"
