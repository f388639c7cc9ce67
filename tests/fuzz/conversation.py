"""A conversation as one input: the pieces that are sent, with L{TURN} between them."""

from __future__ import annotations

from typing import Final

TURN: Final = b"\0"
MOST_TURNS: Final = 64


def pieces(data: bytes) -> list[bytes]:
    """The pieces to send, one by one."""
    return data.split(TURN, MOST_TURNS)
