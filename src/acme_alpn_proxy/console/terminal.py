"""The operator's terminal: one line for each message, and the standard descriptors."""

from __future__ import annotations

import contextlib
import os
import sys


def tell(text: str) -> None:
    """Print one line to stderr. C{sys.stderr} itself may be redirected to the log by twistd."""
    stream = sys.__stderr__
    if stream is not None:
        line = " ".join(text.splitlines())  # a path, for one, may have several
        with contextlib.suppress(OSError):  # the exit status says it too
            print(f"acme-alpn-proxy: {line}", file=stream, flush=True)


def fill_standard_descriptors() -> None:
    """Open descriptors 0 to 2 if the caller has closed them, so that no file takes their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
