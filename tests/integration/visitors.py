"""Visitors of the site: a process that opens new HTTPS connections without pause and keeps count.

Run as a program this file needs nothing but the standard library. Each line that it reads is
answered with a report so far, a line of JSON; at the end of its input it ends with a last one.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import itertools
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from .netns import Node
    from .website import Website

VISITORS = 16
READING_SECONDS = 0.1
"""How long a visitor looks at the page before the next request: some are always half-way."""
VISIT_SECONDS = 10.0
MOST_SECONDS = 300.0
FIRST_PORT, LAST_PORT = 16_000, 60_999
STEERED = ("127.0.0.1", "::1")


@dataclass
class Tally:
    """What became of the visits of one address family.

    @ivar seen: of those steered, how many the web server saw come from the visitor's own address.
    """

    served: int = 0
    steered: int = 0
    seen: int = 0
    slowest_seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """The number of visits that failed."""
        return sum(self.failures.values())


@dataclass
class Report:
    """What became of all visits so far."""

    families: dict[str, Tally]
    first_failures: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, line: str) -> Report:
        """The report that the program wrote as one line."""
        found = json.loads(line)
        families = {name: Tally(**tally) for name, tally in found["families"].items()}
        return cls(families, found["first_failures"])

    @property
    def served(self) -> int:
        """The visits that got the page."""
        return sum(tally.served for tally in self.families.values())

    @property
    def steered(self) -> int:
        """The visits that got the page through the proxy."""
        return sum(tally.steered for tally in self.families.values())

    @property
    def failed(self) -> int:
        """The visits that did not get the page."""
        return sum(tally.failed for tally in self.families.values())


class Visitors:
    """The running program, seen from the test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._final: Report | None = None

    def report(self) -> Report:
        """What became of the visits so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("report\n")
        self._process.stdin.flush()
        return self._read()

    def leave(self) -> Report:
        """Let the visits under way end, and no new ones begin; the last report."""
        if self._final is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._final = self._read()
            self._process.wait(VISIT_SECONDS)
        return self._final

    def wait_for(self, visits: int, *, steered: bool = False, seconds: float = 30.0) -> Report:
        """Wait until each family has been served this many more times (and steered)."""

        def counts(report: Report) -> dict[str, int]:
            return {
                name: tally.steered if steered else tally.served
                for name, tally in report.families.items()
            }

        before = counts(self.report())
        deadline = time.monotonic() + seconds
        while True:
            report = self.report()
            now = counts(report)
            if all(now[name] >= before[name] + visits for name in now):
                return report
            if time.monotonic() > deadline:
                raise TimeoutError(f"{before} visits became {now} only: {report}")
            time.sleep(0.02)

    def _read(self) -> Report:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the visitors ended with exit code {self._process.wait(VISIT_SECONDS)}"
        return Report.from_json(line)


@contextmanager
def visitors(
    site: Website,
    visitor: Node,
    host: Node,
    families: tuple[str, ...] = ("IPv4", "IPv6"),
    steered: str = STEERED[0],
) -> Iterator[Visitors]:
    """Visitors of C{site} on C{host}, coming from C{visitor}, until the block is left.

    @param steered: the address that the web server sees if the proxy connects to it.
    """
    from .netns import terminate
    from .website import NAME, PAGE

    page = site.directory / "page-expected"
    page.write_bytes(PAGE)
    command: list[str | Path] = [sys.executable, "-I", "-S", Path(__file__).resolve()]
    for family in families:
        command += ["--address", host.address(family)]
    command += ["--steered", steered, "--name", NAME, "--page", page]
    command += ["--authority", site.authority.certificate]
    others = f"net.ipv4.ip_local_port_range={LAST_PORT + 1} 65535"
    visitor.namespace.run("sysctl", "-qw", others)
    process = subprocess.Popen(
        visitor.namespace.argv(*command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        running = Visitors(process)
        running.wait_for(3)
        yield running
    finally:
        terminate(process)


class WrongAnswer(Exception):
    """The answer was not the page, whole."""


class Load:
    """The visits themselves."""

    def __init__(
        self, addresses: list[str], steered: str, name: str, authority: Path, page: bytes
    ) -> None:
        self._steered = steered
        self._name = name
        self._page = page
        self._tls = ssl.create_default_context(cafile=str(authority))
        self._tls.set_alpn_protocols(["http/1.1"])
        # Visits stand for people with different addresses. With one address for all, ports would be
        # used again while connection tracking still has a steered connection from the same port;
        # when tracking is switched on again, that entry breaks the new connection.
        self._turns = zip(
            range(FIRST_PORT, LAST_PORT + 1), itertools.cycle(addresses), strict=False
        )
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._began = time.monotonic()
        self._report = Report({_family(address): Tally() for address in addresses})

    def run(self) -> None:
        """Visit until told to leave, on several threads."""
        threads = [threading.Thread(target=self._visit_again_and_again) for _ in range(VISITORS)]
        for thread in threads:
            thread.start()
        deadline = threading.Timer(MOST_SECONDS, os._exit, (3,))
        deadline.daemon = True
        deadline.start()
        try:
            for _ in sys.stdin:
                self._print()
        finally:
            self._over.set()
            for thread in threads:
                thread.join()
            deadline.cancel()
        self._print()

    def _print(self) -> None:
        with self._lock:
            line = json.dumps(asdict(self._report))
        print(line, flush=True)

    def _visit_again_and_again(self) -> None:
        while not self._over.is_set():
            with self._lock:
                turn = next(self._turns, None)
            if turn is None:
                return
            port, address = turn
            began = time.monotonic()
            try:
                steered, seen = self._visit(address, port)
                failure = ""
            except (OSError, ValueError, http.client.HTTPException, WrongAnswer) as error:
                steered = seen = False
                failure = f"{type(error).__name__}: {error}"
            now = time.monotonic()
            with self._lock:
                self._count(_family(address), failure, began, now)
                self._report.families[_family(address)].steered += steered
                self._report.families[_family(address)].seen += seen

    def _count(self, family: str, failure: str, began: float, now: float) -> None:
        tally = self._report.families[family]
        tally.slowest_seconds = max(tally.slowest_seconds, round(now - began, 3))
        if not failure:
            tally.served += 1
            return
        failures = collections.Counter(tally.failures)
        failures[failure] += 1
        tally.failures = dict(failures)
        if len(self._report.first_failures) < 10:
            when = f"at {began - self._began:.3f} s, for {now - began:.3f} s"
            self._report.first_failures.append(f"{family} {when}: {failure}")

    def _visit(self, address: str, port: int) -> tuple[bool, bool]:
        """Whether it came through the proxy, and whether the web server saw its own address."""
        with (
            socket.create_connection((address, 443), VISIT_SECONDS, ("", port)) as connection,
            # An end without close_notify must not pass for an orderly one.
            self._tls.wrap_socket(
                connection, server_hostname=self._name, suppress_ragged_eofs=False
            ) as tls,
            tls.makefile("rb") as answers,
        ):
            own = tls.getsockname()[0]
            self._get(tls, answers, "keep-alive")
            time.sleep(READING_SECONDS)
            headers = self._get(tls, answers, "close")
            if rest := answers.read():
                raise WrongAnswer(f"{len(rest)} bytes after the answer")
            steered = self._steered == headers["Seen-From"] or headers["Dialled"] in STEERED
            return steered, steered and headers["Seen-From"] == own

    def _get(
        self, tls: ssl.SSLSocket, answers: BinaryIO, afterwards: str
    ) -> http.client.HTTPMessage:
        request = f"GET / HTTP/1.1\r\nHost: {self._name}\r\nConnection: {afterwards}\r\n\r\n"
        tls.sendall(request.encode())
        status = answers.readline()
        headers = http.client.parse_headers(answers)
        body = answers.read(len(self._page))
        if b" 200 " not in status or body != self._page:
            raise WrongAnswer(f"{status!r}, {len(body)} bytes of body")
        return headers


def _family(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"


def main() -> None:
    """Visit until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", action="append", required=True)
    parser.add_argument("--steered", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--authority", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    options = parser.parse_args()
    page = options.page.read_bytes()
    Load(options.address, options.steered, options.name, options.authority, page).run()


if __name__ == "__main__":
    main()
