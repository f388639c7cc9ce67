"""Modules that are not used are not loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from acme_alpn_proxy.console.startup import load_when_used

SCRIPT = """
import sys
from acme_alpn_proxy.console.startup import load_lightly
load_lightly()
import acme_alpn_proxy.console.cli
print("http.client" in sys.modules)
from twisted.python.compat import cookielib
print(cookielib.CookieJar().__class__.__name__, "http.client" in sys.modules)
"""

NO_LOOK = """
import gc, os
looks = lambda: gc.get_stats()[0]["collections"]
from acme_alpn_proxy.console.startup import load_lightly
load_lightly()
before = looks()
import acme_alpn_proxy.console.cli, acme_alpn_proxy.console.daemon
print(looks() - before, flush=True)
class Left:
    def __del__(self, write=os.write):
        write(1, b"found")
left = Left()
left.itself = left
del left
"""

DAEMON = """
import gc
usual = gc.get_threshold()
from acme_alpn_proxy.console.startup import load_lightly
load_lightly()
from acme_alpn_proxy.console import daemon
from acme_alpn_proxy.options import ConsoleOptions
from acme_alpn_proxy.host.pidfile import PIDFile
options = ConsoleOptions()
options.parseOptions(["--nodaemon", "start"])
daemon.runApp = lambda config: print(gc.get_threshold() == usual, gc.get_freeze_count() > 10_000)
daemon.serve(options, PIDFile("unused"), lambda: True)
"""


def output_of(script: str) -> list[str]:
    """The words that another Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


def test_when_used() -> None:
    """The console script does not load what Twisted only imports; a program that uses it still
    can."""
    assert output_of(SCRIPT) == ["False", "CookieJar", "True"]


@pytest.mark.parametrize("name", ["cookies", "no_such_module"])
def test_left_alone(name: str) -> None:
    """A loaded module stays as it is; for a missing module, nothing changes."""
    import http.cookies

    before = dict(sys.modules)
    load_when_used("http", name)
    assert sys.modules == before
    assert http.cookies.SimpleCookie().__class__.__name__ == "SimpleCookie"


def test_no_garbage_is_looked_for() -> None:
    """Loaded modules stay in memory: the collector does not scan them, during imports or at the
    end."""
    assert output_of(NO_LOOK) == ["0"]


def test_daemon_collects() -> None:
    """The daemon collects garbage as usual, but not among the loaded modules."""
    assert output_of(DAEMON) == ["True", "True"]
