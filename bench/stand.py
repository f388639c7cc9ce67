"""A stand (test bed): a contender in its own namespaces, with its backends and load generators.

The contender has one CPU for itself. Load generators and backends share the others, if there are
any.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.hellos import openssl_hello
from tests.integration.netns import Node, street, terminate, wait_until
from tests.integration.website import NAME, website

from .contenders import Contender, Place

LOAD = Path(__file__).resolve().parents[1] / ".cache" / "bench" / "load"

_COMMAND_AT = 11
"""The position of the random field in a ClientHello. There C{load.c} writes what the backend has to
do."""
_ONE_BYTE = b"B" + bytes(8)


class WrongRoute(Exception):
    """A contender sent a hello to the wrong backend."""


def build_load() -> None:
    """Compile C{load.c}, unless the program is newer than its source."""
    source = Path(__file__).with_name("load.c")
    if LOAD.exists() and LOAD.stat().st_mtime >= source.stat().st_mtime:
        return
    LOAD.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", LOAD, source], check=True)


@contextmanager
def on_cpus(cpus: Sequence[int]) -> Iterator[None]:
    """Processes that are started during the block run on these CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpus() -> tuple[list[int], list[int]]:
    """The CPU of the contender, and the CPUs of loads and backends."""
    # The last one, because the interrupts of a machine often go to the first.
    *others, last = sorted(os.sched_getaffinity(0))
    return [last], others or [last]


class Stand:
    """One running contender."""

    def __init__(
        self, contender: Contender, visitor: Node, place: Place, contender_cpus: Sequence[int]
    ) -> None:
        self.contender = contender
        self.visitor = visitor
        self.place = place
        self._contender_cpus = contender_cpus
        self._running = ExitStack()
        self._pid = 0
        self._hello = place.directory / "hello"
        self._hello.write_bytes(openssl_hello(b"h2", b"http/1.1", server_name=NAME.encode()))

    @classmethod
    @contextmanager
    def made(
        cls, contender: Contender, directory: Path, contender_cpus: Sequence[int], *, tls: bool
    ) -> Iterator[Stand]:
        """A running contender in front of nginx (C{tls}) or of the backend of C{load.c}."""
        directory.mkdir()
        with street() as road, ExitStack() as stack:
            host, visitor = road.host, road.visitor
            for node in (host, visitor):
                # Room for the connections of a minute, while their ports are not free yet.
                node.namespace.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=22000 65535")
            place = Place(host, directory, 443 if tls else 8443, 8444)
            ports = {"A": place.acme_port}
            if tls:
                stack.enter_context(website(host.namespace, directory / "site"))
            else:
                ports["W"] = place.web_port
            for letter, port in ports.items():
                log = directory / f"backend-{letter}.log"
                backend = host.namespace.popen(LOAD, "serve", str(port), letter, log=log)
                stack.callback(terminate, backend)
                host.namespace.wait_until_listening(backend, "127.0.0.1", port)
            stand = cls(contender, visitor, place, contender_cpus)
            stand._start()
            try:
                stand._check_routes(tls=tls)
                yield stand
            finally:
                stand._running.close()

    def restart(self) -> float:
        """Stop the contender and start it again. Return the seconds that the start took."""
        self._running.close()
        return self._start()

    def _start(self) -> float:
        with on_cpus(self._contender_cpus):
            began = time.perf_counter()
            self._pid = self._running.enter_context(self.contender.running(self.place))
            return time.perf_counter() - began

    def _check_routes(self, *, tls: bool) -> None:
        hellos = {} if tls else {b"W": self._hello.read_bytes()}
        if self._pid:
            hellos[b"A"] = openssl_hello(b"acme-tls/1", server_name=NAME.encode())
        for letter, hello in hellos.items():
            with self.visitor.namespace.connect(*self.address) as connection:
                after = _COMMAND_AT + len(_ONE_BYTE)
                connection.sendall(hello[:_COMMAND_AT] + _ONE_BYTE + hello[after:])
                answer = connection.recv(1)
            if answer != letter:
                raise WrongRoute(f"{self.contender.name}: {answer!r} instead of {letter!r}")

    @property
    def is_proxy(self) -> bool:
        """Whether the contender has processes to measure."""
        return self._pid != 0

    @property
    def address(self) -> tuple[str, int]:
        """The address and port that visitors connect to."""
        return self.place.host.ipv4, self.contender.port(self.place)

    def load(self, what: str, *arguments: object) -> dict[str, Any]:
        """Run a load of C{load.c} with a hello. Return what it prints at its end."""
        done = self.visitor.namespace.run(*self._load_command(what, self._hello, *arguments))
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    @contextmanager
    def holding(self, number: int, *, silent: bool = False) -> Iterator[None]:
        """Keep this many connections open during the block: established pairs, or silent ones."""
        arguments = ["silence"] if silent else ["hold", self._hello]
        with subprocess.Popen(
            self.visitor.namespace.argv(*self._load_command(*arguments, number)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                told = json.loads(process.stdout.readline())
                assert told == {"open": number, "failed": 0}, told
                self.quieten()
                yield
            finally:
                terminate(process)
        self.quieten()

    def _load_command(self, what: object, *arguments: object) -> list[str | Path]:
        address, port = self.address
        hello_and_more = [str(argument) for argument in arguments]
        return [LOAD, str(what), address, str(port), *hello_and_more]

    def cpu_seconds(self) -> float:
        """User and system time that the contender's processes have taken, to the nanosecond."""
        total = 0
        for pid in self._processes():
            for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                total += int(path.read_text().split()[0])
        return total / 1e9

    def memory_mib(self) -> float:
        """Proportional set size of the contender's processes together (proc(5), smaps_rollup)."""
        total = 0
        for pid in self._processes():
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if "Pss:" in line)
        return total / 1024

    def descriptors(self) -> int:
        """Open descriptors of the contender's processes together."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self._processes())

    def quieten(self) -> None:
        """Wait until the contender has nothing left to do."""
        last = -1.0

        def quiet() -> bool:
            nonlocal last
            before, last = last, self.cpu_seconds()
            time.sleep(0.05)
            return before >= 0 and last - before < 0.000_5

        wait_until(quiet, f"{self.contender.name} has nothing to do", 15)

    def _processes(self) -> list[int]:
        found = [self._pid] if self._pid else []
        for pid in found:  # the list grows during the loop
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, path.read_text().split())
        return found
