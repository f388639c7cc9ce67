"""The first code that the one-file program runs: it chooses the folder for the unpacked files.

The usual folder is C{~/.shiv}. If there is no writable home, or not enough room in it, another
folder is used, but never one that other users could change.
"""

import os
import signal
import sys

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # Unpacking takes a second. Ctrl-C ends it without a traceback, and the next run starts again.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

ROOM = 64 << 20
"""Bytes that must be free; the unpacked files need half of them."""


def usable(folder):
    """Whether only this user can write to the folder; a missing folder is made."""
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        about = os.lstat(folder)
        free = os.statvfs(folder)
    except OSError:
        return False
    private = about.st_uid == os.geteuid() and not about.st_mode & 0o022
    return private and os.access(folder, os.W_OK) and free.f_bavail * free.f_frsize >= ROOM


def choose():
    """The first usable folder, or C{None}."""
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
