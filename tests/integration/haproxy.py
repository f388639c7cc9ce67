"""HAProxy in mode tcp: as a load balancer in front of the host, or as its web server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .netns import Namespace, terminate

PROGRAM = Path(__file__).resolve().parents[2] / ".cache/haproxy/usr/sbin/haproxy"

_CONFIGURATION = """\
defaults
    mode tcp
    timeout connect 10s
    timeout client 1m
    timeout server 1m
"""

_WAY = """\
listen way{number}
    bind {bind}
    server server {server}
"""


@contextmanager
def haproxy(
    namespace: Namespace, directory: Path, *ways: tuple[str, str], probe: tuple[str, int]
) -> Iterator[None]:
    """HAProxy in a namespace, until the block is left.

    @param ways: the words of a C{bind} line, and of its C{server}.
    @param probe: address and port at which it listens when it is ready.
    """
    directory.mkdir()
    configuration = directory / "haproxy.cfg"
    configuration.write_text(
        _CONFIGURATION
        + "".join(
            _WAY.format(number=number, bind=bind, server=server)
            for number, (bind, server) in enumerate(ways)
        )
    )
    process = namespace.popen(PROGRAM, "-f", configuration, log=directory / "log")
    try:
        namespace.wait_until_listening(process, *probe)
        yield
    finally:
        terminate(process)
