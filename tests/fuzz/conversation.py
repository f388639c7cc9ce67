"""A conversation as one input: what is sent at a time, with L{TURN} between."""

from __future__ import annotations

from typing import Final

TURN: Final = b"\0"
MOST_TURNS: Final = 64


def pieces(data: bytes) -> list[bytes]:
    """What is sent, piece by piece."""
    return data.split(TURN, MOST_TURNS)
