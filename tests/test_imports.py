"""Importing the program changes nothing in a process."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import atexit, gc, importlib, pkgutil, signal, sys
# Their own effects are not ours:
import certbot.plugins.common, twisted.application.app, twisted.internet.epollreactor
before = gc.get_threshold(), atexit._ncallbacks(), [signal.getsignal(n) for n in range(1, 32)]
import acme_alpn_proxy
for found in pkgutil.walk_packages(acme_alpn_proxy.__path__, "acme_alpn_proxy."):
    importlib.import_module(found.name)
after = gc.get_threshold(), atexit._ncallbacks(), [signal.getsignal(n) for n in range(1, 32)]
print(before == after, "twisted.internet.reactor" in sys.modules)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, timeout=60
    )


def test_nothing_changes() -> None:
    """No module touches the collector, the exit, the signals, or chooses a reactor."""
    done = run("-c", SCRIPT)
    assert (done.stdout.split(), done.stderr) == (["True", "False"], "")


def test_module() -> None:
    """C{python -m acme_alpn_proxy} is the console script, with its exit statuses."""
    assert run("-m", "acme_alpn_proxy", "--version").stdout.startswith("acme-alpn-proxy ")
    done = run("-m", "acme_alpn_proxy", "begin")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("acme-alpn-proxy: one command is needed")


def test_nothing_is_loaded_before_the_signal_is_taken() -> None:
    """Until the program handles SIGINT, Ctrl-C prints a traceback: so the start imports no other
    module of the program before that."""
    line = "import sys; old = {*sys.modules}; import acme_alpn_proxy.__main__"
    done = run("-c", f"{line}; print(*sys.modules.keys() - old)")
    assert set(done.stdout.split()) - {"__future__"} == {
        "acme_alpn_proxy",
        "acme_alpn_proxy.__main__",
    }
