"""Redirect by a BPF program of type C{sk_lookup} (Linux 5.9).

When a SYN comes for a port, the kernel asks the program which listening socket shall have it,
before it looks for one by itself. Nothing of the firewall, of addresses or of connection tracking
changes: INPUT sees port 443, and the accepted socket has the address that the visitor dialled.
Connections that are established are never asked for. The program is attached by a link, a
descriptor: when the process ends, by SIGKILL too, the next SYN goes to the web server.

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
from typing import Any, Final

from twisted.internet.defer import Deferred, fail, inlineCallbacks, succeed
from twisted.logger import Logger
from zope.interface import implementer

from ..errors import StartError, not_permitted
from ..firewall.judgement import look_whether_sent_elsewhere
from ..host.facts import may_administer_network
from ..interfaces import ICommands, IRedirect
from . import bpf
from .bpf import Assembler

STEERED_PORT: Final = 443

PROGRAM_NAME: Final = "acme_alpn_proxy"
"""As bpftool shows it; the kernel takes 15 characters."""

_SLOTS: Final = {socket.AF_INET: 0, socket.AF_INET6: 1}
"""Where the map has the listener of each family."""

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
"""BPF_SK_LOOKUP_F_REPLACE: what a program attached before has chosen does not stand."""

_PASS: Final = 1
"""SK_PASS: with the socket that was assigned or, without one, by the kernel's own search."""


def _skip_own(program: Assembler) -> None:
    """To C{pass} with what this host sends to itself: it has the same address at both ends.

    The interface that the lookup tells (Linux 5.17) would not do: it is the loopback's only for
    loopback addresses, and another one's for the host's other addresses.
    """
    program.load_word(2, 6, _FAMILY)  # r2 = AF_INET or AF_INET6
    program.jump_if_number(2, socket.AF_INET6, "compare IPv6")
    _compare(program, _LOCAL_IP4, _REMOTE_IP4, otherwise="from outside")
    program.jump("pass")
    program.label("compare IPv6")
    for word in range(0, 16, 4):
        _compare(program, _LOCAL_IP6 + word, _REMOTE_IP6 + word, otherwise="from outside")
    program.jump("pass")
    program.label("from outside")


def _compare(program: Assembler, one: int, other: int, otherwise: str) -> None:
    program.load_word(2, 6, one)  # r2 = 32 bits of the one address
    program.load_word(3, 6, other)  # r3 = the same 32 bits of the other
    program.jump_unless_equal(2, 3, otherwise)


def steering_program(map_descriptor: int) -> bytes:
    """The program: TCP to port 443 that is not the host's own goes to the listener in the map."""
    program = Assembler()
    program.move(6, 1)  # r6 = the lookup; calls leave r6 to r9 alone
    program.load_word(2, 6, _LOCAL_PORT)  # r2 = port that was dialled
    program.jump_unless_number(2, STEERED_PORT, "pass")
    program.load_word(2, 6, _PROTOCOL)  # r2 = TCP or UDP
    program.jump_unless_number(2, socket.IPPROTO_TCP, "pass")
    _skip_own(program)
    program.move_number(8, _SLOTS[socket.AF_INET])  # r8 = slot for IPv4
    program.load_word(2, 6, _FAMILY)  # r2 = AF_INET or AF_INET6
    program.jump_if_number(2, socket.AF_INET, "look up")
    program.move_number(8, _SLOTS[socket.AF_INET6])  # r8 = slot for IPv6
    program.label("look up")
    program.store_word(10, -4, 8)  # the slot, on the stack, since the helper takes its address
    program.load_map(1, map_descriptor)  # r1 = map
    program.move(2, 10)  # r2 = end of the stack
    program.add_number(2, -4)  # r2 = address of the slot
    program.call(_MAP_LOOKUP)  # r0 = listener, referenced, or 0
    program.jump_if_number(0, 0, "pass")
    program.move(7, 0)  # r7 = listener
    program.move(1, 6)  # r1 = the lookup
    program.move(2, 7)  # r2 = listener
    program.move_number(3, _REPLACE)  # r3 = flags
    program.call(_SK_ASSIGN)  # the listener shall have it; if that fails, the kernel searches
    program.move(1, 7)  # r1 = listener
    program.call(_SK_RELEASE)  # give the reference back
    program.label("pass")
    program.move_number(0, _PASS)  # r0 = verdict
    program.exit()
    return program.code()


@implementer(IRedirect)
class SkLookupRedirect:
    """Steers by a program on the lookup of listening sockets; leaves nothing to remove."""

    _log = Logger()

    def __init__(self, *, ipv6: bool = True, force: bool = False) -> None:
        """
        @param ipv6: whether to steer IPv6 too, where there is any.
        @param force: whether to steer even if visitors seem to be sent elsewhere.
        """
        self._hosts = {4: "127.0.0.1", 6: "::1"} if ipv6 else {4: "127.0.0.1"}
        self._force = force
        self._link: int | None = None

    def __str__(self) -> str:
        return "sk-lookup"

    @inlineCallbacks
    def prepare(self, commands: ICommands) -> Generator[Deferred[Any], Any, Sequence[str]]:
        """On loopback alone. The kernel is asked whether it takes the program."""
        try:
            with _loaded_program([]):
                pass
        except OSError as problem:
            raise _refusal(problem) from None
        if not self._force:
            yield self._refuse_sent_elsewhere(commands)
        return tuple(self._hosts.values())

    @inlineCallbacks
    def _refuse_sent_elsewhere(self, commands: ICommands) -> Generator[Deferred[Any], Any, None]:
        reason = yield look_whether_sent_elsewhere(commands, self._hosts)
        if reason is None:
            return
        if not may_administer_network():
            raise not_permitted(reason)
        raise StartError(
            f"{reason}; use --redirect iptables, whose rule comes first, or steer all the"
            " same with --force",
            os.EX_CONFIG,
        )

    def apply(self, commands: ICommands, listeners: Sequence[socket.socket]) -> Deferred[None]:
        try:
            self._link = self._attach(listeners)
        except OSError as problem:
            return fail(_refusal(problem))
        if len(listeners) < len(self._hosts):
            self._log.info("This host has no IPv6 loopback address: steering IPv4 alone")
        return succeed(None)

    def look_after(self, commands: ICommands) -> Deferred[None]:
        """Nobody can take the link away."""
        return succeed(None)

    def remove(self, commands: ICommands) -> Deferred[None]:
        link, self._link = self._link, None
        if link is not None:
            os.close(link)
        return succeed(None)

    def release(self, commands: ICommands) -> Deferred[None]:
        """Established connections need nothing."""
        return succeed(None)

    def _attach(self, listeners: Sequence[socket.socket]) -> int:
        """The link; raises L{OSError}."""
        others = bpf.count_sk_lookup()
        with _loaded_program(listeners) as program:
            link = bpf.attach_sk_lookup(program)
        if others:
            self._log.warn(
                "Another sk_lookup program is attached to this network namespace; the one attached"
                " last wins, so new connections to :443 come here until this one lets go"
                " (see: bpftool link)"
            )
        return link


@contextmanager
def _loaded_program(listeners: Sequence[socket.socket]) -> Iterator[int]:
    """The program's descriptor; raises L{OSError}.

    A link to the program holds it, and the program its map: their descriptors are not needed then.
    """
    bpf.allow_locked_memory()
    with ExitStack() as descriptors:
        sockets = bpf.make_socket_map(len(_SLOTS))
        descriptors.callback(os.close, sockets)
        for listener in listeners:
            bpf.put_socket(sockets, _SLOTS[listener.family], listener.fileno())
        program = bpf.load_sk_lookup(steering_program(sockets), PROGRAM_NAME)
        descriptors.callback(os.close, program)
        yield program


def _refusal(problem: OSError) -> StartError:
    kernel = f"{platform.release()} on {platform.machine()}"
    if isinstance(problem, bpf.Refused) and problem.reason:
        return StartError(
            f"the kernel ({kernel}) refuses the BPF program: {problem.reason}; report this, or use"
            " --redirect iptables",
            os.EX_UNAVAILABLE,
        )
    if problem.errno == errno.EPERM:
        return StartError(
            "BPF is not permitted; run this as root, with CAP_BPF and CAP_NET_ADMIN where it runs"
            " in a container, or use --redirect iptables",
            os.EX_NOPERM,
        )
    if problem.errno in (errno.ENOSYS, errno.EINVAL):
        return StartError(
            f"this kernel ({kernel}) has no BPF sk_lookup; run Linux 5.9 or newer, on x86-64 or"
            " aarch64, or use --redirect iptables",
            os.EX_UNAVAILABLE,
        )
    return StartError(
        f"cannot steer by BPF sk_lookup: {problem.strerror}; free some memory and look at the"
        " limits (ulimit -a), or use --redirect iptables",
        os.EX_OSERR,
    )
