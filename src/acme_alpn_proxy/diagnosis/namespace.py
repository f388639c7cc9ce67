"""A network namespace without a name, from which the probe connects to this host."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

from ..errors import AS_ADMINISTRATOR, StartError
from ..host.facts import may_administer_network
from ..host.processes import BlockingCommands
from ..interfaces import NOT_FOUND, Result

_CLONE_NEWNET: Final = 0x40000000

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Subnet:
    """Two addresses: the host's, and that of the caller in the namespace."""

    family: int
    host: str
    dialler: str
    length: int


def _in_use(listing: str) -> Iterator[ipaddress.IPv4Network]:
    """The destinations in C{ip -4 route show table all}, without very large networks (/16 or
    larger)."""
    for line in listing.splitlines():
        for word in line.split()[:2]:  # the route's type may come before the destination
            try:
                network = ipaddress.IPv4Network(word)
            except ValueError:
                continue
            if network.prefixlen > 16:
                yield network


def free_subnet(listing: str, choices: Iterable[int]) -> Subnet:
    """A link-local /30 (RFC 3927) that overlaps with no route of the host.

    @param choices: numbers to try, of any size.
    """
    taken = list(_in_use(listing))
    for number in choices:
        # From 169.254.192.0 on: cloud providers use lower addresses, such as 169.254.169.254.
        network = ipaddress.IPv4Network((0xA9FEC000 + number % 0x3E00 // 4 * 4, 30))
        if not any(network.overlaps(each) for each in taken):
            return Subnet(4, str(network[1]), str(network[2]), 30)
    raise StartError(
        "no link-local IPv4 network is free; remove a route in 169.254.0.0/16 (see: ip route"
        " show table all)"
    )


def unique_local_subnet() -> Subnet:
    """A subnet with a random global ID of 40 bits (RFC 4193), which collides with no other."""
    prefix = int.from_bytes(b"\xfd" + secrets.token_bytes(5), "big") << 80
    host, dialler = (str(ipaddress.IPv6Address(prefix + number)) for number in (1, 2))
    return Subnet(6, host, dialler, 64)


class Namespace:
    """A network namespace without a name, connected to this process's own by a veth pair.

    @ivar subnets: the addresses on the pair, by family.
    """

    def __init__(self, link: str, families: Sequence[int]) -> None:
        """Make it; raises L{StartError}.

        @param link: a name for both ends of the pair.
        """
        self._link = link
        self._commands = BlockingCommands()
        self._inside = ThreadPoolExecutor(1)
        self._joined = False
        self.subnets: dict[int, Subnet] = {}
        try:
            self._join(families)
        except BaseException:
            self.close()
            raise

    def socket(self, family: int) -> socket.socket:
        """A TCP socket in the namespace, for use by any thread."""
        of = {4: socket.AF_INET, 6: socket.AF_INET6}[family]
        return self._in_there(lambda: socket.socket(of, socket.SOCK_STREAM))

    def close(self) -> None:
        """Remove the pair at once, and release the namespace."""
        if self._joined:
            self._commands.run(["ip", "link", "delete", self._link])
        self._inside.shutdown()

    def _join(self, families: Sequence[int]) -> None:
        listing = self._ip("-4", "route", "show", "table", "all")
        self.subnets[4] = free_subnet(listing, (secrets.randbits(16) for _ in range(1_000)))
        if 6 in families:
            self.subnets[6] = unique_local_subnet()
        thread = self._in_there(_unshare)
        pair = ["type", "veth", "peer", "name", self._link, "netns", str(thread)]
        self._ip("link", "add", self._link, *pair)  # one step: both ends or none
        self._joined = True
        self._number([subnet.host for subnet in self.subnets.values()])
        self._in_there(lambda: self._number([subnet.dialler for subnet in self.subnets.values()]))

    def _number(self, addresses: list[str]) -> None:
        self._ip("link", "set", self._link, "up")
        for address, subnet in zip(addresses, self.subnets.values(), strict=True):
            nodad = ["nodad"] if subnet.family == 6 else []
            self._ip("address", "add", f"{address}/{subnet.length}", "dev", self._link, *nodad)

    def _ip(self, *words: str) -> str:
        done: list[Result] = []
        self._commands.run(["ip", *words]).addCallback(done.append)
        (result,) = done
        if result.code != 0:
            remedy = "see why that command fails"
            if result.code == NOT_FOUND:
                remedy = "install ip (iproute2)"
            elif not may_administer_network():
                remedy = AS_ADMINISTRATOR
            raise StartError(f"{result.failure}; {remedy}")
        return result.output

    def _in_there(self, work: Callable[[], _T]) -> _T:
        return self._inside.submit(work).result()


def _unshare() -> int:
    """Move this thread to a new network namespace; returns its number in the kernel."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        problem = os.strerror(ctypes.get_errno())
        raise StartError(
            f"cannot make a network namespace: {problem}; run this as root (in a"
            " container: with CAP_SYS_ADMIN)"
        )
    return threading.get_native_id()
