"""The first thing that the one-file program runs: choose the folder that it unpacks itself to.

Its runner takes C{~/.shiv}. Where there is no writable home, or no room in it, another folder is
taken; a folder that other users could change never is.
"""

import os
import signal
import sys

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # To unpack takes a second: Ctrl-C ends it without a traceback, and the next run begins again.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

ROOM = 64 << 20
"""Bytes that must be free; it takes half of that."""


def usable(folder):
    """Whether this user, and no other, can write to a folder, which is made if it is not there."""
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        about = os.lstat(folder)
        free = os.statvfs(folder)
    except OSError:
        return False
    private = about.st_uid == os.geteuid() and not about.st_mode & 0o022
    return private and os.access(folder, os.W_OK) and free.f_bavail * free.f_frsize >= ROOM


def choose():
    """The folder, or C{None}."""
    candidates = [
        os.environ.get("SHIV_ROOT"),
        os.path.expanduser("~/.shiv"),
        "/var/cache/acme-alpn-proxy-pyz",
        f"/tmp/acme-alpn-proxy-pyz.{os.geteuid()}",  # noqa: S108
    ]
    return next((each for each in candidates if each and usable(each)), None)


root = choose()
if root is None:
    sys.exit(
        "acme-alpn-proxy: no folder to unpack this file to; set SHIV_ROOT to one of your own, with"
        f" {ROOM >> 20} MiB free"
    )
os.environ["SHIV_ROOT"] = root

from _bootstrap import bootstrap  # noqa: E402

bootstrap()
