"""A faster start and end for processes of this program.

L{load_lightly} is called before Twisted is imported. It defers the import of C{http.cookiejar},
which C{twisted.python.compat} imports although nothing uses it: with urllib and email, that takes a
tenth of the time of all imports. It also keeps the garbage collector from scanning the loaded
modules again and again while more are imported, and once more at the end.
"""

from __future__ import annotations

import atexit
import gc
import sys
from importlib import import_module
from importlib.util import LazyLoader, find_spec, module_from_spec
from typing import Final

_USUAL_THRESHOLD: Final = gc.get_threshold()
_LOADING_THRESHOLD: Final = 100_000
"""The garbage collector's threshold during the imports, above the number of objects that they make
(46,000; 64,000 if cryptography is installed). With Python's default threshold, the collector runs
sixty times during the imports."""


def load_lightly() -> None:
    """Change how this process loads modules. To be called first, and only by this program's
    processes."""
    gc.set_threshold(_LOADING_THRESHOLD)
    load_when_used("http", "cookiejar")
    atexit.register(gc.freeze)


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
    # Without this attribute, "from package import name" would load the module.
    setattr(import_module(package), name, module)


def loading_done() -> None:
    """Collect garbage as usual, but not among the loaded modules. To be called by the daemon."""
    gc.freeze()
    gc.set_threshold(*_USUAL_THRESHOLD)
