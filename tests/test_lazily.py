"""What is not used is not loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from acme_alpn_proxy.lazily import load_when_used

SCRIPT = """
import sys
import acme_alpn_proxy.cli
print("http.client" in sys.modules)
from twisted.python.compat import cookielib
print(cookielib.CookieJar().__class__.__name__, "http.client" in sys.modules)
"""

NO_LOOK = """
import gc, os
usual = gc.get_threshold()
looks = lambda: gc.get_stats()[0]["collections"]
import acme_alpn_proxy.lazily
before = looks()
import acme_alpn_proxy.cli, acme_alpn_proxy.launch
print(looks() - before <= 1, gc.get_freeze_count(), flush=True)
acme_alpn_proxy.lazily.loaded()
print(gc.get_threshold() == usual, gc.get_freeze_count() > 10_000, flush=True)
class Left:
    def __del__(self, write=os.write):
        write(1, b"found")
left = Left()
left.itself = left
del left
"""


def test_when_used() -> None:
    """The console script does without what Twisted only names, and who uses that has it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "CookieJar", "True"]


@pytest.mark.parametrize("name", ["cookies", "no_such_module"])
def test_left_alone(name: str) -> None:
    """What is loaded already stays what it is; what does not exist is nobody's."""
    import http.cookies

    before = dict(sys.modules)
    load_when_used("http", name)
    assert sys.modules == before
    assert http.cookies.SimpleCookie


def test_no_garbage_is_looked_for() -> None:
    """What is loaded stays: nobody goes over all of it meanwhile, nor later, nor at the end."""
    done = subprocess.run(
        [sys.executable, "-c", NO_LOOK], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["True", "0", "True", "True"]
