"""What the one-file program does first. Its runner gives it C{site_packages}, its own folder."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit(
        f"acme-alpn-proxy: this is Python {found}, but 3.11 or newer is needed; install that, and"
        " run it with the path of this file"
    )

# What else is installed on the machine may not fit: nothing of it is used.
others = ("site-packages", "dist-packages")
sys.path[:] = [
    path
    for path in sys.path
    if path == str(site_packages) or not path.rstrip("/").endswith(others)  # noqa: F821
]

# Debian's zope.interface begins this package when Python starts, in a folder of its own.
sys.modules.pop("zope", None)
