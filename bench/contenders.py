"""The contenders: each a proxy that sends C{acme-tls/1} to one backend and the rest to another.

Each is Debian's package and runs on one thread. Each is configured for the number of connections of
the bench and for the same time limit for a ClientHello, and listens on the addresses of its
namespace.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.integration.netns import Node, terminate
from tests.integration.proxy import PORT, Proxy
from tests.integration.website import nginx

UNPACKED = Path(__file__).resolve().parents[1] / ".cache"
INSTALLED = UNPACKED / "program/bin"
"""The program as users install it, in an environment that has only its run-time packages."""
OURS = "acme-alpn-proxy"
STEERED = f"{OURS}, steered"
UNSEEN = f"{OURS}, --visitor-address off"
HAPROXY = "HAProxy"
SPLICING = "HAProxy, splice-auto"

_HELLO_SECONDS = 60
"""How long to wait for a ClientHello: longer than the measure of 5,000 silent connections takes."""
_DIALLED_PORT = 8080
_MOST_CONNECTIONS = 6_000


@dataclass(frozen=True)
class Place:
    """Where a contender runs, and its backends on 127.0.0.1."""

    host: Node
    directory: Path
    web_port: int
    acme_port: int


class Contender(Protocol):
    """One way for visitors to get to the web server."""

    name: str
    ours: bool
    most_open: int
    """The most connections that it can hold; 0 if it is no proxy."""

    def version(self) -> str:
        """Its version, in one line."""

    def port(self, place: Place) -> int:
        """The port that visitors connect to."""

    def running(self, place: Place) -> AbstractContextManager[int]:
        """Run it during the block; yields its first process, or 0 if there is none."""


class Direct:
    """No proxy: the cost of the load, the backend and the kernel."""

    name = "direct"
    ours = False
    most_open = 0

    def version(self) -> str:
        """See L{Contender}."""
        return "no proxy"

    def port(self, place: Place) -> int:
        """See L{Contender}."""
        return place.web_port

    @contextmanager
    def running(self, place: Place) -> Iterator[int]:
        """See L{Contender}."""
        yield 0


class Ours:
    """acme-alpn-proxy, started by its console script; visitors connect to its port."""

    name = OURS
    ours = True
    most_open = _MOST_CONNECTIONS
    redirect = "none"
    visitor_address = "require"

    def version(self) -> str:
        """See L{Contender}."""
        return f"{_first_line(INSTALLED / 'acme-alpn-proxy', '--version')}, {self._beneath()}"

    def _beneath(self) -> str:
        facts = (
            "import importlib.metadata as m, platform as p;"
            "print('Python', p.python_version() + ', Twisted', m.version('twisted'))"
        )
        return _first_line(INSTALLED / "python", "-c", facts)

    def port(self, place: Place) -> int:
        """See L{Contender}."""
        return PORT

    @contextmanager
    def running(self, place: Place) -> Iterator[int]:
        """See L{Contender}."""
        proxy = Proxy(place.host.namespace, place.directory / "proxy")
        proxy.program = INSTALLED / "acme-alpn-proxy"
        proxy.start(*self.options(place))
        try:
            yield proxy.pid
        finally:
            proxy.stop(wait=True)

    def options(self, place: Place) -> list[str]:
        """The options of C{start}."""
        options = {
            "alpn": f"127.0.0.1:{place.acme_port}",
            "fallback": f"127.0.0.1:{place.web_port}",
            "redirect": self.redirect,
            "visitor-address": self.visitor_address,
            "hello-timeout": _HELLO_SECONDS,
            "linger": 0,
            "drain-timeout": 2,
        }
        return [f"--{name}={value}" for name, value in options.items()]


class OursSteered(Ours):
    """acme-alpn-proxy with its iptables rules: visitors connect to port 443."""

    name = STEERED
    redirect = "iptables"

    def port(self, place: Place) -> int:
        """See L{Contender}."""
        return 443


class OursUnseen(Ours):
    """acme-alpn-proxy with C{--visitor-address off}: the web server sees 127.0.0.1 for all
    visitors."""

    name = UNSEEN
    visitor_address = "off"


class HAProxy:
    """HAProxy in mode tcp."""

    name = HAPROXY
    ours = False
    most_open = _MOST_CONNECTIONS
    option = ""

    _program = UNPACKED / "haproxy/usr/sbin/haproxy"
    _configuration = """\
global
    maxconn {most}
    nbthread 1
defaults
    mode tcp
    {option}
    timeout connect 10s
    timeout client 10m
    timeout server 10m
frontend visitors
    bind [::]:{port} v4v6
    tcp-request inspect-delay {hello_seconds}s
    tcp-request content accept if {{ req.ssl_hello_type 1 }}
    use_backend acme if {{ req.ssl_alpn -m sub acme-tls/1 }}
    default_backend web
backend acme
    server acme 127.0.0.1:{acme_port}
backend web
    server web 127.0.0.1:{web_port}
"""

    def version(self) -> str:
        """See L{Contender}."""
        return _first_line(self._program, "-v").partition(" - ")[0]

    def port(self, place: Place) -> int:
        """See L{Contender}."""
        return _DIALLED_PORT

    def running(self, place: Place) -> AbstractContextManager[int]:
        """See L{Contender}."""
        path = _written(place, self._configuration, option=self.option)
        return _server(place, self._program, "-db", "-f", path)


class HAProxySplicing(HAProxy):
    """HAProxy with C{option splice-auto}: it decides when to splice."""

    name = SPLICING
    option = "option splice-auto"


class NginxStream:
    """nginx as a stream proxy that reads the ALPN list ahead."""

    name = "nginx stream"
    ours = False
    most_open = _MOST_CONNECTIONS

    _module = UNPACKED / "libnginx-mod-stream/usr/lib/nginx/modules/ngx_stream_module.so"
    _configuration = """\
load_module {module};
daemon off;
user root;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {directory}/contender.pid;
error_log {directory}/contender.log;
events {{ worker_connections 12288; }}
stream {{
    upstream acme {{ server 127.0.0.1:{acme_port}; }}
    upstream web {{ server 127.0.0.1:{web_port}; }}
    map $ssl_preread_alpn_protocols $backend {{
        ~\\bacme-tls/1\\b acme;
        default web;
    }}
    server {{
        listen [::]:{port} ipv6only=off backlog=4096;
        ssl_preread on;
        preread_timeout {hello_seconds}s;
        proxy_timeout 10m;
        proxy_pass $backend;
    }}
}}
"""

    def version(self) -> str:
        """See L{Contender}."""
        return _first_line(nginx(), "-v").removeprefix("nginx version: ")

    def port(self, place: Place) -> int:
        """See L{Contender}."""
        return _DIALLED_PORT

    def running(self, place: Place) -> AbstractContextManager[int]:
        """See L{Contender}."""
        path = _written(place, self._configuration, module=self._module)
        log = place.directory / "contender.log"
        return _server(place, nginx(), "-e", log, "-p", place.directory, "-c", path)


class Sslh:
    """sslh, the variant with one process, which probes for TLS and ALPN."""

    name = "sslh"
    ours = False
    most_open = 400
    """sslh uses select(2), which is limited to 1,024 descriptors."""

    _program = UNPACKED / "sslh/usr/sbin/sslh-select"
    _configuration = """\
foreground: true;
timeout: {hello_seconds};
on_timeout: "tls";
listen: ( {{ host: "{address}"; port: "{port}"; }},
          {{ host: "127.0.0.1"; port: "{port}"; }} );
protocols: (
    {{ name: "tls"; host: "127.0.0.1"; port: "{acme_port}"; log_level: 0;
       alpn_protocols: [ "acme-tls/1" ]; }},
    {{ name: "tls"; host: "127.0.0.1"; port: "{web_port}"; log_level: 0; }}
);
"""

    def version(self) -> str:
        """See L{Contender}."""
        return _first_line(self._program, "-V")

    def port(self, place: Place) -> int:
        """See L{Contender}."""
        return _DIALLED_PORT

    def running(self, place: Place) -> AbstractContextManager[int]:
        """See L{Contender}."""
        return _server(place, self._program, f"-F{_written(place, self._configuration)}")


CONTENDERS: tuple[Contender, ...] = (
    Direct(),
    Ours(),
    OursUnseen(),
    HAProxy(),
    HAProxySplicing(),
    NginxStream(),
    Sslh(),
    OursSteered(),
)


def _written(place: Place, text: str, **more: object) -> Path:
    path = place.directory / "contender.conf"
    path.write_text(
        text.format(
            address=place.host.ipv4,
            port=_DIALLED_PORT,
            most=_MOST_CONNECTIONS,
            hello_seconds=_HELLO_SECONDS,
            directory=place.directory,
            web_port=place.web_port,
            acme_port=place.acme_port,
            **more,
        )
    )
    return path


@contextmanager
def _server(place: Place, *command: str | Path) -> Iterator[int]:
    namespace = place.host.namespace
    process = namespace.popen(*command, log=place.directory / "contender.log")
    try:
        namespace.wait_until_listening(process, "127.0.0.1", _DIALLED_PORT)
        yield process.pid
    finally:
        terminate(process)


def _first_line(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return (done.stdout + done.stderr).partition("\n")[0].strip()
