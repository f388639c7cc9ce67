"""What the one-file program runs after it is unpacked. C{site_packages} is its own folder; shiv
sets it."""

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit(
        f"acme-alpn-proxy: this is Python {found}, but 3.11 or newer is needed; install that, and"
        " run it with the path of this file"
    )


def foreign(folder):
    """Whether the folder has packages of the machine, not those of this file."""
    packages = folder.rstrip("/").endswith(("site-packages", "dist-packages"))
    return packages and folder != str(site_packages)  # noqa: F821


# The Python packages of the machine may not fit, so none of them is used. Their .pth files may have
# loaded modules when Python started (python3-zope.interface has such a file); these modules are
# removed, too.
sys.path[:] = [folder for folder in sys.path if not foreign(folder)]
for name, module in list(sys.modules.items()):
    if any(foreign(os.path.dirname(path)) for path in getattr(module, "__path__", ())):
        del sys.modules[name]
