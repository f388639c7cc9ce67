"""Hostile neighbours: strangers on the Internet, and local users without privileges."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from .netns import Street, ready, wait_until
from .proxy import AT_ONCE, NOBODY, PORT, Proxy
from .website import Website, steers

STALLED = 10
BYTES_EACH = 5_000_000
"""What a visitor who stops reading may cost; HAProxy takes 4.9 MB for one."""

_LISTENER = """
import socket
for host in ("127.0.0.1", "::1"):
    globals()[host] = socket.create_server((host, {port}), family=socket.AF_INET6 if ":" in host
                                           else socket.AF_INET)
print("ready", flush=True)
input()
"""


def test_stalled_downloads(road: Street, site: Website, proxy: Proxy) -> None:
    """Visitors who stop reading hold little of the kernel's memory, which the whole host shares."""
    proxy.start(*AT_ONCE)
    with ExitStack() as stack:
        for _ in range(STALLED):
            place = road.visitor.namespace, road.host.ipv4
            stack.enter_context(site.visit(*place)).ask("/big")
        wait_until(lambda: _is_steady(road), "nothing more is buffered")
        assert 0 < _buffered(road) < STALLED * BYTES_EACH
        assert steers(road, site)
    proxy.stop()


@pytest.mark.parametrize("redirect", ["nftables", "sk-lookup", "auto"])
def test_port_of_another_user(road: Street, site: Website, proxy: Proxy, redirect: str) -> None:
    """A local user who listens on the proxy's port does not keep it from steering."""
    script = _LISTENER.format(port=PORT)
    words = road.host.namespace.argv(*NOBODY, sys.executable, "-I", "-S", "-c", script)
    with ready(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)):
        proxy.start(*AT_ONCE, "--redirect", redirect)
        assert steers(road, site)
        proxy.stop()
        assert not steers(road, site)


def _buffered(road: Street) -> int:
    """Bytes of all TCP sockets of the host that wait to be read or to be acknowledged (ss(8))."""
    listing = road.host.namespace.run("ss", "-tmnH").stdout
    return sum(
        int(read) + int(written) for read, written in re.findall(r"\(r(\d+),.*?,w(\d+)", listing)
    )


def _is_steady(road: Street) -> bool:
    before = _buffered(road)
    time.sleep(0.3)
    return before == _buffered(road)
