"""Redirect with a BPF program of type C{sk_lookup} (Linux 5.9).

When a SYN arrives, the kernel asks the program which listening socket gets it, before it searches
for one itself. Firewall, addresses and connection tracking stay unchanged: INPUT sees port 443, and
the accepted socket has the address that the visitor connected to. The program is never asked about
established connections. It is attached with a link, which is a descriptor: when the process ends,
also after SIGKILL, the next SYN goes to the web server.

Sources: bpf-helpers(7); the kernel's C{Documentation/bpf/prog_sk_lookup.rst} and
C{include/linux/filter.h} (BPF_PROG_SK_LOOKUP_RUN_ARRAY).
"""

from __future__ import annotations

import errno
import os
import platform
import socket
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

from twisted.internet.defer import Deferred, fail, inlineCallbacks, succeed
from zope.interface import implementer

from ..addresses import HTTPS
from ..errors import StartError
from ..firewall import judgement
from ..host.routes import own_addresses
from ..interfaces import ICommands, IRedirect
from . import bpf
from .bpf import Assembler
from .loopback import LoopbackRedirect

PROGRAM_NAME: Final = "acme_alpn_proxy"
"""The name that bpftool shows; the kernel takes 15 characters."""

_MOST_ADDRESSES: Final = 65_536

_SLOTS: Final = {socket.AF_INET: 0, socket.AF_INET6: 1}
"""The slot in the map for each family's listener."""

# struct bpf_sk_lookup of linux/bpf.h: offsets of its fields.
_FAMILY: Final = 8
_PROTOCOL: Final = 12
_REMOTE_IP4: Final = 16
_REMOTE_IP6: Final = 20
_LOCAL_IP4: Final = 40
_LOCAL_IP6: Final = 44
_LOCAL_PORT: Final = 60

_MAP_LOOKUP: Final = 1
_SK_RELEASE: Final = 86
_SK_ASSIGN: Final = 124

_REPLACE: Final = 1
"""BPF_SK_LOOKUP_F_REPLACE: override the choice of a program that was attached earlier."""

_PASS: Final = 1
"""SK_PASS: use the assigned socket or, if none is assigned, the kernel's own search."""


def _skip_own(program: Assembler, addresses: int) -> None:
    """Jump to C{pass} for what this host sends itself: the destination is a loopback address, the
    source is one of the host's own addresses, or both are the same address.

    The proxy makes such a connection to a target, or another local program does; it is never a
    visitor's. The interface (Linux 5.17) is not enough to tell: it is lo only for loopback
    addresses.
    """
    program.load_word(2, 6, _FAMILY)  # r2 = AF_INET or AF_INET6
    program.jump_if_number(2, socket.AF_INET6, "IPv6")
    for word in (_LOCAL_IP4, _REMOTE_IP4):
        program.load_word(2, 6, word)
        program.and_number(2, 0xFF)  # its first byte in network order
        program.jump_if_number(2, 127, "pass")
    _skip_if_same(program, _LOCAL_IP4, _REMOTE_IP4, 1)
    program.store_number(10, -16, 0)  # the key: ::ffff:a.b.c.d
    program.store_number(10, -12, 0)
    program.store_number(10, -8, socket.htonl(0xFFFF) - (1 << 32))
    program.load_word(2, 6, _REMOTE_IP4)
    program.store_word(10, -4, 2)
    program.jump("search")
    program.label("IPv6")
    for word, value in zip(range(0, 16, 4), (0, 0, 0, socket.htonl(1)), strict=True):
        program.load_word(2, 6, _LOCAL_IP6 + word)
        program.jump_unless_number(2, value, "no loopback")
    program.jump("pass")
    program.label("no loopback")
    _skip_if_same(program, _LOCAL_IP6, _REMOTE_IP6, 4)
    for word in range(0, 16, 4):
        program.load_word(2, 6, _REMOTE_IP6 + word)
        program.store_word(10, word - 16, 2)
    program.label("search")
    program.load_map(1, addresses)  # r1 = map
    program.move(2, 10)  # r2 = end of the stack
    program.add_number(2, -16)  # r2 = address of the key
    program.call(_MAP_LOOKUP)  # r0 = whether it is an address of this host
    program.jump_unless_number(0, 0, "pass")


def _skip_if_same(program: Assembler, one: int, other: int, words: int) -> None:
    """Jump to C{pass} if C{words} words of the lookup at the offset C{one} equal those at the
    offset C{other}. A local route may make a whole network this host's; no map has all its
    addresses."""
    behind = f"differ at {one}"
    for word in range(0, 4 * words, 4):
        program.load_word(2, 6, one + word)
        program.load_word(3, 6, other + word)
        program.jump_unless_equal(2, 3, behind)
    program.jump("pass")
    program.label(behind)


def steering_program(sockets: int, addresses: int) -> bytes:
    """The program: TCP to port 443 goes to the listener in the map, unless this host itself sent
    it.

    @param sockets: the map of listeners.
    @param addresses: the set of this host's addresses.
    """
    program = Assembler()
    program.move(6, 1)  # r6 = the lookup; calls do not change r6 to r9
    program.load_word(2, 6, _LOCAL_PORT)  # r2 = destination port
    program.jump_unless_number(2, HTTPS, "pass")
    program.load_word(2, 6, _PROTOCOL)  # r2 = TCP or UDP
    program.jump_unless_number(2, socket.IPPROTO_TCP, "pass")
    _skip_own(program, addresses)
    program.move_number(8, _SLOTS[socket.AF_INET])  # r8 = slot for IPv4
    program.load_word(2, 6, _FAMILY)  # r2 = AF_INET or AF_INET6
    program.jump_if_number(2, socket.AF_INET, "look up")
    program.move_number(8, _SLOTS[socket.AF_INET6])  # r8 = slot for IPv6
    program.label("look up")
    program.store_word(10, -4, 8)  # the slot, on the stack, since the helper takes its address
    program.load_map(1, sockets)  # r1 = map
    program.move(2, 10)  # r2 = end of the stack
    program.add_number(2, -4)  # r2 = address of the slot
    program.call(_MAP_LOOKUP)  # r0 = listener, referenced, or 0
    program.jump_if_number(0, 0, "pass")
    program.move(7, 0)  # r7 = listener
    program.move(1, 6)  # r1 = the lookup
    program.move(2, 7)  # r2 = listener
    program.move_number(3, _REPLACE)  # r3 = flags
    program.call(_SK_ASSIGN)  # assign the listener; if that fails, the kernel searches
    program.move(1, 7)  # r1 = listener
    program.call(_SK_RELEASE)  # give the reference back
    program.label("pass")
    program.move_number(0, _PASS)  # r0 = verdict
    program.exit()
    return program.code()


@implementer(IRedirect)
class SkLookupRedirect(LoopbackRedirect):
    """Steers with a program for the lookup of listening sockets; leaves nothing to remove."""

    def __init__(self, *, ipv6: bool = True, force: bool = False) -> None:
        super().__init__(ipv6=ipv6, force=force)
        self._link: int | None = None
        self._addresses = AddressSet()

    def __str__(self) -> str:
        return "sk-lookup"

    @inlineCallbacks
    def prepare(self, commands: ICommands) -> Generator[Deferred[Any], Any, Sequence[str]]:
        """Listen on loopback only; load the program once, to learn whether the kernel accepts
        it."""
        try:
            with AddressSet() as addresses, _loaded_program([], addresses):
                pass
        except OSError as problem:
            raise _refusal(problem) from None
        if not self._force:
            yield judgement.require(judgement.SK_LOOKUP, commands, self._families)
        return self._hosts()

    def apply(self, commands: ICommands, listeners: Sequence[socket.socket]) -> Deferred[None]:
        try:
            self._link = self._attach(listeners)
        except OSError as problem:
            return fail(_refusal(problem))
        self._note_families(listeners)
        return succeed(None)

    def look_after(self, commands: ICommands) -> Deferred[None]:
        """The link needs no check; the host's addresses may have changed."""
        try:
            self._addresses.refresh()
        except OSError as problem:
            self._log.debug("Cannot follow this host's addresses: {problem}", problem=problem)
        return succeed(None)

    def remove(self, commands: ICommands) -> Deferred[None]:
        link, self._link = self._link, None
        if link is not None:
            os.close(link)
        self._addresses.close()
        return succeed(None)

    def _attach(self, listeners: Sequence[socket.socket]) -> int:
        """Load and attach; returns the link; raises L{OSError}."""
        others = bpf.count_sk_lookup()
        self._addresses.refresh()
        with _loaded_program(listeners, self._addresses) as program:
            link = bpf.attach_sk_lookup(program)
        if others:
            self._log.warn(
                "Another sk_lookup program is attached to this network namespace. The proxy's"
                " program was attached last, so the proxy receives the new connections to port 443"
                " until it stops (see: bpftool link)"
            )
        return link


class AddressSet:
    """The set of this host's addresses, for the BPF program. Its methods raise C{OSError}."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._keys: frozenset[bytes] = frozenset()

    def __enter__(self) -> AddressSet:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    @property
    def descriptor(self) -> int:
        """The map's descriptor."""
        if self._descriptor is None:
            self._descriptor = bpf.make_set(16, _MOST_ADDRESSES)
        return self._descriptor

    def refresh(self) -> None:
        """Update the set to the addresses that the host has now."""
        keys = frozenset(_key(address) for address in own_addresses())
        for key in keys - self._keys:
            bpf.add_key(self.descriptor, key)
        for key in self._keys - keys:
            bpf.remove_key(self.descriptor, key)
        self._keys = keys

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._keys = None, frozenset()


def _key(address: IPv4Address | IPv6Address) -> bytes:
    """An IPv6 address, or an IPv4 address mapped to one (RFC 4291 section 2.5.5.2)."""
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


@contextmanager
def _loaded_program(listeners: Sequence[socket.socket], addresses: AddressSet) -> Iterator[int]:
    """The program's descriptor; raises L{OSError}.

    Once a link holds the program, and the program its maps, their own descriptors can be closed.
    """
    bpf.allow_locked_memory()
    with ExitStack() as descriptors:
        sockets = bpf.make_socket_map(len(_SLOTS))
        descriptors.callback(os.close, sockets)
        for listener in listeners:
            bpf.put_socket(sockets, _SLOTS[listener.family], listener.fileno())
        program = bpf.load_sk_lookup(steering_program(sockets, addresses.descriptor), PROGRAM_NAME)
        descriptors.callback(os.close, program)
        yield program


def _refusal(problem: OSError) -> StartError:
    kernel = f"{platform.release()} on {platform.machine()}"
    if isinstance(problem, bpf.Refused) and problem.reason:
        return StartError(
            f"the kernel ({kernel}) refuses the BPF program: {problem.reason}; report this line, as"
            " a defect of acme-alpn-proxy",
            os.EX_UNAVAILABLE,
        )
    if problem.errno == errno.EPERM:
        return StartError(
            "no permission to use BPF; run this as root (in a container: with CAP_BPF and"
            " CAP_NET_ADMIN)",
            os.EX_NOPERM,
        )
    if problem.errno in (errno.ENOSYS, errno.EINVAL):
        return StartError(
            f"this kernel ({kernel}) has no BPF sk_lookup; run Linux 5.9 or newer, on x86-64 or"
            " aarch64",
            os.EX_UNAVAILABLE,
        )
    return StartError(
        f"cannot steer with BPF sk_lookup: {problem.strerror}; check the free memory (free -m) and"
        " the limits (ulimit -a)",
        os.EX_OSERR,
    )
