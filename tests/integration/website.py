"""The web server of the tests: a real nginx with a page and a big file, in a namespace."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .netns import Namespace, Street, terminate, url_host
from .pki import Authority

NAME = "site.example"
PAGE = b"<!doctype html><title>site</title><p>The page that every visitor came for.</p>\n" * 20
BIG_FILE_BYTES = 20 * 1024 * 1024
STEERED = ("127.0.0.1", "::1")
"""The web server's own addresses, as it sees them in connections from the proxy."""

TOLD = "127.0.0.1:10443"
TOLD_BY_UNIX_SOCKET = "told.sock"
"""The address, and the Unix socket in the site's folder, at which the web server expects a PROXY
header."""

_EVERYWHERE = ("0.0.0.0:443", "[::]:443")

_CHECKOUT = Path(__file__).resolve().parents[2]

_CONFIGURATION = """\
daemon off;
user root;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 8192; }}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    default_type text/html;
    keepalive_timeout 60;
    keepalive_requests 100000;
    server {{
{listen}
        server_name {name};
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.2 TLSv1.3;
        root {directory}/pages;
        add_header Seen-From $remote_addr;
        add_header Dialled $server_addr;
        location /banned/ {{ deny 10.88.0.2; deny fd88::2; alias {directory}/pages/; }}
        location /slow/ {{ alias {directory}/pages/; limit_rate 8m; }}
    }}
    server {{
{listen_told}
        server_name {name};
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        root {directory}/pages;
        add_header Seen-From $proxy_protocol_addr:$proxy_protocol_port;
        add_header Dialled $proxy_protocol_server_addr:$proxy_protocol_server_port;
    }}
}}
"""


class NoWebServer(RuntimeError):
    """There is no nginx on this machine."""


def nginx() -> str:
    """The path of nginx: the one unpacked for the tests, or the machine's."""
    unpacked = _CHECKOUT / ".cache" / "nginx" / "usr" / "sbin" / "nginx"
    if unpacked.exists():
        return str(unpacked)
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if found is None:
        raise NoWebServer("nginx is missing: run tests/install-debian-packages")
    return found


@dataclass(frozen=True)
class Answer:
    """What a visitor got: the body, and the source and the destination of the connection as the web
    server saw them, or as its PROXY header gave them."""

    body: bytes
    seen_from: str
    dialled: str | None = None

    @property
    def steered(self) -> bool:
        """Whether the connection went through the proxy."""
        return self.dialled in STEERED


class Visit(http.client.HTTPConnection):
    """One HTTPS connection, kept alive over any number of requests, never silently reopened."""

    auto_open = 0

    def __init__(self, tls: ssl.SSLSocket) -> None:
        super().__init__(NAME)
        self.sock = tls

    def get(self, path: str = "/") -> Answer:
        """Request a path and read the whole answer."""
        return read_answer(self.ask(path))

    def ask(self, path: str) -> http.client.HTTPResponse:
        """Request a path and leave the body to be read."""
        response = self.request_of(path)
        assert response.status == 200, response.status
        return response

    def request_of(self, path: str) -> http.client.HTTPResponse:
        """Request a path, and return the answer, whatever its status."""
        self.request("GET", path)
        return self.getresponse()


def read_answer(response: http.client.HTTPResponse) -> Answer:
    """The rest of an answer."""
    return Answer(response.read(), response.headers["Seen-From"], response.headers["Dialled"])


def _lines(addresses: Sequence[str], how: str) -> str:
    return "\n".join(f"        listen {address} {how};" for address in addresses)


class Website:
    """A running nginx, its files, and the ways to visit it."""

    def __init__(
        self,
        namespace: Namespace,
        directory: Path,
        wrapper: Sequence[str] = (),
        hosts: Sequence[str] = (),
    ) -> None:
        self._wrapper = wrapper
        self.hosts = hosts or ("127.0.0.1", "::1")
        self.listen = [f"{url_host(host)}:443" for host in hosts] or _EVERYWHERE
        self.told = [] if hosts else [TOLD]
        self.told.append(f"unix:{directory / TOLD_BY_UNIX_SOCKET}")
        self.namespace = namespace
        self.directory = directory
        self.authority = Authority(directory)
        pages = directory / "pages"
        pages.mkdir()
        (pages / "index.html").write_bytes(PAGE)
        big_file = os.urandom(BIG_FILE_BYTES)
        (pages / "big").write_bytes(big_file)
        self.big_file_sha256 = hashlib.sha256(big_file).hexdigest()
        self._tls = ssl.create_default_context(cafile=str(self.authority.certificate))
        self._tls.set_alpn_protocols(["http/1.1"])

    def start(self) -> subprocess.Popen[str]:
        """Start nginx and return once it listens everywhere."""
        pair = self.authority.issue("site", NAME)
        configuration = self.directory / "nginx.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                directory=self.directory,
                name=NAME,
                certificate=pair.certificate,
                key=pair.key,
                listen=_lines(self.listen, "ssl backlog=4096"),
                listen_told=_lines(self.told, "ssl proxy_protocol"),
            )
        )
        log = self.directory / "error.log"
        process = self.namespace.popen(
            *self._wrapper, nginx(), "-e", log, "-p", self.directory, "-c", configuration, log=log
        )
        try:
            for host in self.hosts:
                self.namespace.wait_until_listening(process, host, 443)
        except BaseException:
            terminate(process)
            raise
        return process

    def visit_on(self, connection: socket.socket) -> Visit:
        """Do the TLS handshake of a visitor on a connected socket, which is closed if it fails."""
        # A connection cut without close_notify must not pass for one that ended.
        return Visit(
            self._tls.wrap_socket(connection, server_hostname=NAME, suppress_ragged_eofs=False)
        )

    @contextmanager
    def visit(self, visitor: Namespace, address: str, timeout: float = 10.0) -> Iterator[Visit]:
        """An HTTPS connection from a namespace to the site at a literal address."""
        with closing(self.visit_on(visitor.connect(address, 443, timeout))) as visit:
            yield visit

    def slow_client(self, connection: socket.socket) -> SlowClient:
        """A visitor that sends its ClientHello in parts, on a connected socket."""
        return SlowClient(self._tls, connection)


class SlowClient:
    """A TLS client that sends its ClientHello in parts."""

    def __init__(self, context: ssl.SSLContext, connection: socket.socket) -> None:
        self._connection = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=NAME)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._hello = self._outgoing.read()

    def say_hello(self, share: float) -> None:
        """Send the next part of the ClientHello: C{share} of what is left of it."""
        end = round(len(self._hello) * share)
        self._connection.sendall(self._hello[:end])
        self._hello = self._hello[end:]

    def get(self) -> bytes:
        """Send what is left of the ClientHello, end the handshake, request the page, and read to
        the end of the connection."""
        self.say_hello(1)
        self._pumped(self._tls.do_handshake)
        request = f"GET / HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n"
        self._tls.write(request.encode())
        answer = b""
        while part := self._pumped(lambda: self._tls.read(65536)):
            answer += part
        return answer.partition(b"\r\n\r\n")[2]

    def _pumped(self, step: Callable[[], Any]) -> Any:
        while True:
            self._connection.sendall(self._outgoing.read())
            try:
                return step()
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLWantReadError:
                self._connection.sendall(self._outgoing.read())
                received = self._connection.recv(65536)
                if not received:
                    raise EOFError("cut without close_notify") from None
                self._incoming.write(received)


@contextmanager
def website(
    namespace: Namespace,
    directory: Path,
    wrapper: Sequence[str] = (),
    hosts: Sequence[str] = (),
    kind: type[Website] | None = None,
) -> Iterator[Website]:
    """The site, served from C{directory}, which must be empty.

    @param wrapper: words that come before the web server's command, and run it.
    @param hosts: the addresses at which the site is served; by default all addresses.
    @param kind: the web server; by default nginx.
    """
    directory.mkdir(parents=True, exist_ok=True)
    site = (kind or Website)(namespace, directory, wrapper, hosts)
    process = site.start()
    try:
        yield site
    finally:
        terminate(process)


def steers(road: Street, site: Website) -> bool:
    """Whether a new visitor, who gets the page, goes through the proxy."""
    with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
        answer = visit.get()
    assert answer.body == PAGE
    return answer.steered
