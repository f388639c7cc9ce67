"""To be imported before Twisted by a process that is the program's own: it starts and ends without
work that nobody needs.

What Twisted draws in and nobody here uses is loaded when somebody does: C{twisted.python.compat}
has a name for C{http.cookiejar}, which takes a tenth of the time of all imports, with urllib and
email behind it. And what has been loaded stays, so nobody looks for garbage in it again and again
while it is loaded, nor once more at the end.
"""

from __future__ import annotations

import atexit
import gc
import sys
from importlib import import_module
from importlib.util import LazyLoader, find_spec, module_from_spec
from typing import Final

_USUAL: Final = gc.get_threshold()
_WHILE_LOADING: Final = 100_000
"""More objects than imports leave behind (46,000; 64,000 where cryptography is installed): so many
call the collector, which otherwise would go over them sixty times."""


def load_when_used(package: str, name: str) -> None:
    """Import C{package.name} at the first use of an attribute (C{importlib.util.LazyLoader})."""
    full_name = f"{package}.{name}"
    spec = find_spec(full_name)
    if full_name in sys.modules or spec is None or spec.loader is None:
        return
    spec.loader = LazyLoader(spec.loader)
    module = module_from_spec(spec)
    sys.modules[full_name] = module
    spec.loader.exec_module(module)
    setattr(import_module(package), name, module)  # else "from package import name" would use it


def loaded() -> None:
    """To be called by the daemon, which goes on for long, when it has loaded what it needs."""
    gc.freeze()
    gc.set_threshold(*_USUAL)


gc.set_threshold(_WHILE_LOADING)
load_when_used("http", "cookiejar")
atexit.register(gc.freeze)
