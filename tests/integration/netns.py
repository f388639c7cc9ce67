"""Throwaway network namespaces joined by veth pairs, and commands and sockets inside them."""

from __future__ import annotations

import ctypes
import itertools
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, AddressFamily, socket
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
COMMAND_SECONDS = 60.0
LINK = "net0"

_serial = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


class NotRoot(RuntimeError):
    """Network namespaces can be made by root alone."""


def require_root() -> None:
    """Raise L{NotRoot}, with a remedy, if this process may not make network namespaces."""
    if os.geteuid() != 0:
        raise NotRoot("only root can make network namespaces: run this as root")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Poll C{condition} until it holds; raise C{TimeoutError} naming C{what} after C{seconds}."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.01)


@contextmanager
def pidfd(pid: int) -> Iterator[int]:
    """A pidfd for the process C{pid}: it never refers to another process."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def ended(descriptor: int, seconds: float) -> bool:
    """Whether the process of a pidfd ends within C{seconds}."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def terminate(process: subprocess.Popen[str], seconds: float = 5.0) -> None:
    """End a process we started: SIGTERM, then SIGKILL; reap it and close its pipes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(seconds)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


@contextmanager
def ready(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that we have started, after it has written the line C{ready}; it is ended at the
    end."""
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        terminate(process)


class CommandFailed(RuntimeError):
    """A command in a namespace ended with an exit code other than 0."""


@dataclass(frozen=True)
class Namespace:
    """A network namespace of ours; everything that runs in it is ours, too."""

    name: str

    @classmethod
    @contextmanager
    def made(cls, role: str) -> Iterator[Namespace]:
        """A new namespace with its loopback up; all that still runs in it is killed at the end."""
        require_root()
        namespace = cls(f"aap-{os.getpid()}-{next(_serial)}-{role}")
        _run("ip", "netns", "add", namespace.name)
        try:
            namespace.ip("link set lo up")
            # Duplicate address detection would keep every new IPv6 address unusable for a second.
            namespace.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
            yield namespace
        finally:
            namespace.kill_all()
            _run("ip", "netns", "delete", namespace.name)

    def ip(self, arguments: str) -> str:
        """Run C{ip} with these space-separated arguments in this namespace; return its output."""
        return _run("ip", "-n", self.name, *arguments.split()).stdout

    def argv(self, *command: str | Path) -> list[str]:
        """The words that run C{command} in this namespace; the process is C{command} itself."""
        return ["ip", "netns", "exec", self.name, *map(str, command)]

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = COMMAND_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in this namespace to its end, with C{env} added to our environment."""
        return _run(*self.argv(*command), check=check, env=env, timeout=timeout)

    def popen(
        self, *command: str | Path, log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command in this namespace that keeps running; append its output to C{log}."""
        with log.open("a") as output:
            return subprocess.Popen(
                self.argv(*command),
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def new_socket(self, family: AddressFamily) -> socket:
        """A new TCP socket that belongs to this namespace for good, for use from any thread."""
        return self.call(lambda: socket(family, SOCK_STREAM))

    def call(self, make: Callable[[], T]) -> T:
        """Call C{make} in this namespace, and return its result."""
        with ThreadPoolExecutor(1) as pool:  # setns(2) is per thread: this one ends with it
            return pool.submit(self._call, make).result()

    def _call(self, make: Callable[[], T]) -> T:
        descriptor = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(descriptor, CLONE_NEWNET) != 0:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), self.name)
            return make()
        finally:
            os.close(descriptor)

    def connect(self, address: str, port: int, timeout: float = 10.0) -> socket:
        """A TCP connection from this namespace to a literal address."""
        connection = self.new_socket(family_of(address))
        try:
            connection.settimeout(timeout)
            connection.connect((address, port))
        except BaseException:
            connection.close()
            raise
        return connection

    def listen(self, address: str, port: int) -> socket:
        """A listening TCP socket of this namespace on a literal address."""
        listener = self.new_socket(family_of(address))
        listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        listener.settimeout(10)
        listener.bind((address, port))
        listener.listen()
        return listener

    def accepts(self, address: str, port: int) -> bool:
        """Whether somebody listens there, seen from this namespace."""
        try:
            self.connect(address, port).close()
        except OSError:
            return False
        return True

    def wait_until_listening(self, process: subprocess.Popen[str], address: str, port: int) -> None:
        """Wait until our process listens there; raise if the process has ended."""

        def listens() -> bool:
            if process.poll() is not None:
                raise CommandFailed(f"{process.args!r} has ended with {process.returncode}")
            return self.accepts(address, port)

        wait_until(listens, f"{process.args!r} listens on {url_host(address)}:{port}")

    def rules(self) -> list[str]:
        """All iptables rules in here, both families: table, family, rule; no counters."""
        found = []
        for family in ("ip", "ip6"):
            table = ""
            for line in self.run(f"{family}tables-save").stdout.splitlines():
                if line.startswith("*"):
                    table = line[1:]
                elif line.startswith("-A"):
                    found.append(f"{family} {table} {line}")
        return found

    def pids(self) -> list[int]:
        """The processes that run in this namespace."""
        found = _run("ip", "netns", "pids", self.name).stdout.split()
        return [int(pid) for pid in found]

    def kill_all(self) -> None:
        """Send SIGKILL to all processes in this namespace, and wait for their end."""
        for pid in self.pids():
            try:
                with pidfd(pid) as descriptor:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    ended(descriptor, 5)
            except ProcessLookupError:
                continue


def _run(
    *command: str,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    timeout: float = COMMAND_SECONDS,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode != 0:
        raise CommandFailed(
            f"exit {done.returncode} of {' '.join(command)}\n{done.stdout}{done.stderr}"
        )
    return done


def family_of(address: str) -> AddressFamily:
    """The address family of a literal address."""
    return AF_INET6 if ":" in address else AF_INET


def url_host(address: str) -> str:
    """A literal address as it is written before C{:port}."""
    return f"[{address}]" if ":" in address else address


@dataclass(frozen=True)
class Node:
    """A namespace and the addresses that its neighbours know it by."""

    namespace: Namespace
    ipv4: str
    ipv6: str

    def address(self, family: str) -> str:
        """The address of the family C{"IPv4"} or C{"IPv6"}."""
        return {"IPv4": self.ipv4, "IPv6": self.ipv6}[family]


@dataclass(frozen=True)
class Street:
    """The host with the web server, and a visitor one cable away."""

    host: Node
    visitor: Node


@dataclass(frozen=True)
class Gateway:
    """A host that forwards between an inner neighbour and the world outside."""

    inner: Node
    host: Namespace
    outer: Node


def _cable(one: Namespace, one_link: str, other: Namespace, other_link: str) -> None:
    one.ip(f"link add {one_link} type veth peer name {other_link} netns {other.name}")
    one.ip(f"link set {one_link} up")
    other.ip(f"link set {other_link} up")


def _number(namespace: Namespace, link: str, ipv4: str, ipv6: str) -> None:
    namespace.ip(f"address add {ipv4}/24 dev {link}")
    namespace.ip(f"address add {ipv6}/64 dev {link} nodad")


@contextmanager
def _neighbours() -> Iterator[tuple[Namespace, Node]]:
    """Host and visitor; the visitor has addresses already."""
    with Namespace.made("host") as host, Namespace.made("visitor") as visitor:
        _cable(host, LINK, visitor, LINK)
        _number(visitor, LINK, "10.88.0.2", "fd88::2")
        yield host, Node(visitor, "10.88.0.2", "fd88::2")


@contextmanager
def street() -> Iterator[Street]:
    """Host and visitor, IPv4 and IPv6."""
    with _neighbours() as (host, visitor):
        _number(host, LINK, "10.88.0.1", "fd88::1")
        yield Street(Node(host, "10.88.0.1", "fd88::1"), visitor)


@contextmanager
def unnumbered_street() -> Iterator[Street]:
    """As L{street}, but the host's addresses are on its loopback, none on the visitor's cable."""
    with _neighbours() as (host, visitor):
        host.ip(f"address add fe80::1/64 dev {LINK} nodad")
        host.ip("address add 192.0.2.10/32 dev lo")
        host.ip("address add 2001:db8::10/128 dev lo nodad")
        host.ip(f"route add 10.88.0.0/24 dev {LINK} src 192.0.2.10")
        host.ip(f"route add fd88::/64 dev {LINK} src 2001:db8::10")
        visitor.namespace.ip(f"route add 192.0.2.10/32 dev {LINK}")
        visitor.namespace.ip(f"route add 2001:db8::10/128 via fe80::1 dev {LINK}")
        yield Street(Node(host, "192.0.2.10", "2001:db8::10"), visitor)


@contextmanager
def bridged_street() -> Iterator[Street]:
    """As L{street}, but the host's addresses are on a bridge, and so is the visitor's cable."""
    with street() as road:
        host = road.host.namespace
        host.ip("link add br0 type bridge")
        host.ip(f"address flush dev {LINK} scope global")
        host.ip(f"link set {LINK} master br0")
        host.ip("link set br0 up")
        host.ip(f"address add {road.host.ipv4}/24 dev br0")
        host.ip(f"address add {road.host.ipv6}/64 dev br0 nodad")
        host.ip(f"route add default via {road.visitor.ipv4}")
        host.ip(f"-6 route add default via {road.visitor.ipv6}")
        yield road


@contextmanager
def gateway() -> Iterator[Gateway]:
    """Inner, host and outer in a row; the host forwards both families between the two."""
    with ExitStack() as stack:
        inner = stack.enter_context(Namespace.made("inner"))
        host = stack.enter_context(Namespace.made("host"))
        outer = stack.enter_context(Namespace.made("outer"))
        host.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        _cable(host, "inside", inner, LINK)
        _cable(host, "outside", outer, LINK)
        _number(host, "inside", "10.88.1.1", "fd88:1::1")
        _number(host, "outside", "10.88.2.1", "fd88:2::1")
        _number(inner, LINK, "10.88.1.2", "fd88:1::2")
        _number(outer, LINK, "10.88.2.2", "fd88:2::2")
        for namespace, side in ((inner, 1), (outer, 2)):
            namespace.ip(f"route add default via 10.88.{side}.1")
            namespace.ip(f"-6 route add default via fd88:{side}::1")
        yield Gateway(
            Node(inner, "10.88.1.2", "fd88:1::2"), host, Node(outer, "10.88.2.2", "fd88:2::2")
        )


@contextmanager
def container(host: Namespace, number: int = 0, port: int = 443) -> Iterator[Node]:
    """A container on C{host} whose port 443 is published over IPv4, as Docker does it.

    @param number: differs for each container of a host; the first has 0.
    @param port: the port of the host.
    """
    link, network = f"docker{number}", f"172.{17 + number}.0"
    with Namespace.made("container") as inside:
        host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        _cable(host, link, inside, LINK)
        host.ip(f"address add {network}.1/16 dev {link}")
        inside.ip(f"address add {network}.2/16 dev {LINK}")
        inside.ip(f"route add default via {network}.1")
        chain = ["-N DOCKER", "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER"]
        target = f"-p tcp --dport {port} -j DNAT --to-destination {network}.2:443"
        rules = [f"-A DOCKER -i {link} -j RETURN", f"-A DOCKER ! -i {link} {target}"]
        for rule in [*chain, *rules] if number == 0 else rules:
            host.run("iptables", "-t", "nat", *rule.split())
        yield Node(inside, f"{network}.2", "")
