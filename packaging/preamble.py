"""What the one-file program does first. Its runner gives it C{site_packages}, its own folder."""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit(
        f"acme-alpn-proxy: this is Python {found}, but 3.11 or newer is needed; install that, and"
        " run it with the path of this file"
    )


def foreign(folder):
    """Whether packages of the machine are in there, not those of this file."""
    packages = folder.rstrip("/").endswith(("site-packages", "dist-packages"))
    return packages and folder != str(site_packages)  # noqa: F821


# What else is installed on the machine may not fit: nothing of it is used, nor what its .pth files
# loaded when Python started. Debian's python3-zope.interface has such a file.
sys.path[:] = [folder for folder in sys.path if not foreign(folder)]
for name, module in list(sys.modules.items()):
    if any(foreign(os.path.dirname(path)) for path in getattr(module, "__path__", ())):
        del sys.modules[name]
