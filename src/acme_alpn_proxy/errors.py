"""What can go wrong at start and stop, in words for the operator."""

from __future__ import annotations


class StartError(Exception):
    """The proxy cannot start, or cannot go on; nothing is left applied.

    The text is one line: the cause first, the remedy second.
    """


class AlreadyRunning(StartError):
    """Another instance holds the PID file."""
