"""Starts an acme-alpn-proxy that steers until this process stops it or ends."""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Final

_PROGRAM: Final = (sys.executable, "-P", "-m", "acme_alpn_proxy")
"""The Python that has loaded this module: the console script may not be on PATH, or may belong to
another version of the package. C{-P}: import nothing from the folder in which certbot runs."""

_LET_GO: Final = 60.0
"""Seconds to wait until the proxy has stopped steering; C{run} itself waits for half of that."""

_UNIT: Final = "INVOCATION_ID"
"""A variable in the environment of every process of a systemd unit (systemd.exec(5))."""

_LOOK_AGAIN: Final = 0.5
"""Seconds between two checks for draining proxies."""

_log = logging.getLogger(__name__)


class CannotStart(Exception):
    """The proxy does not steer; the text is its own line, with cause and remedy."""


class OwnProxy:
    """Runs C{acme-alpn-proxy run -- cat}, with pipes to cat's input and from its output.

    cat repeats a line once new connections are steered. It ends when its input does: when L{end}
    closes that, or when this process ends for any reason. Then C{run} stops steering.

    If an instance without a control socket already runs, C{--shared} keeps it running until then.
    """

    def __init__(self, options: Sequence[str]) -> None:
        """Start it, and return once it steers; raises L{CannotStart}."""
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*_PROGRAM, *options, "run", "--shared", "--", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            start_new_session=True,  # Ctrl-C is for certbot, which then cleans up
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print("steered", file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass
        if not self._process.stdout.readline():
            self._process.communicate()
            raise CannotStart(self._last_words())
        if _UNIT in os.environ:
            atexit.register(_await_drain)

    def end(self) -> None:
        """Make it stop steering, and return when it has; problems are logged."""
        try:
            self._process.communicate(timeout=_LET_GO)
        except subprocess.TimeoutExpired:
            _log.warning(
                "acme-alpn-proxy has not yet stopped steering port 443; see its log, and run:"
                " acme-alpn-proxy stop"
            )
            return
        words = self._last_words()
        if self._process.returncode != 0:
            _log.warning("acme-alpn-proxy: %s", words)

    def _last_words(self) -> str:
        """The last line of its output, once it has ended."""
        with self._told:
            self._told.seek(0)
            lines = self._told.read().splitlines()
        last = lines[-1] if lines else f"exit status {self._process.returncode}"
        return last.removeprefix("acme-alpn-proxy: ")


def _await_drain() -> None:
    """Wait for the connections that are still under way through proxies that have stopped steering.

    If the end of this process is the end of a systemd unit, systemd ends all processes of the unit,
    and with them these connections.
    """
    from ..monitoring.status import instances
    from ..options import DEFAULT_PIDFILE, PIDFILE_VARIABLE

    pidfile = os.environ.get(PIDFILE_VARIABLE) or DEFAULT_PIDFILE
    while any(found["state"] == "draining" for found in instances(pidfile, None)):
        time.sleep(_LOOK_AGAIN)
