"""Settings for every test run, so that no test depends on how the run was started."""

from __future__ import annotations

import os
import signal
from types import FrameType

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing, as if the signal were ignored; a process that is started has its default."""


# A script ignores SIGINT and SIGQUIT for what it starts with "&", nohup ignores SIGHUP; an exec(2)
# keeps that, but not a handler. Python itself ignores the two exceptions, and resets them in
# processes that it starts.
for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, _ignore)
signal.pthread_sigmask(signal.SIG_SETMASK, [])

# Remove the operator's settings and systemd's socket from the environment of the tests.
for name in list(os.environ):
    if name.startswith("ACME_ALPN_PROXY_") or name == "NOTIFY_SOCKET":
        del os.environ[name]
