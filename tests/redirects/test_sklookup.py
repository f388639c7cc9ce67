"""The BPF program and the texts of its refusals; tests/integration/test_promises.py runs it."""

from __future__ import annotations

import errno
import os
import platform
import resource
import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.logger import formatEvent
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.firewall import judgement
from acme_alpn_proxy.host import facts
from acme_alpn_proxy.host.processes import BlockingCommands
from acme_alpn_proxy.interfaces import IRedirect
from acme_alpn_proxy.redirects import bpf, sklookup
from acme_alpn_proxy.redirects.sklookup import SkLookupRedirect, steering_program

from ..memory import log_of

COMMANDS = BlockingCommands()


class AssemblerTests(SynchronousTestCase):
    def test_jumps(self) -> None:
        """A jump counts from the instruction after it to the label, forwards and backwards."""
        program = bpf.Assembler()
        program.label("start")
        program.jump_if_number(2, 443, "end")
        program.jump("start")
        program.label("end")
        program.exit()
        decoded = [
            struct.unpack("=BBhi", program.code()[at : at + 8])
            for at in range(0, len(program.code()), 8)
        ]
        self.assertEqual(decoded, [(0x15, 2, 1, 443), (0x05, 0, -2, 0), (0x95, 0, 0, 0)])

    def test_program(self) -> None:
        """The program's size is whole instructions, few of them, and it names the map."""
        code = steering_program(77, 78)
        self.assertEqual(len(code) % 8, 0)
        self.assertLess(len(code) // 8, 96)
        for descriptor in (77, 78):
            self.assertIn(struct.pack("=BBhi", 0x18, 0x11, 0, descriptor), code)


class SystemCallTests(SynchronousTestCase):
    def test_unknown_machine(self) -> None:
        """On a machine with an unknown number of the system call, the error is ENOSYS."""
        self.patch(platform, "machine", lambda: "vax")
        with self.assertRaises(OSError) as caught:
            bpf.make_socket_map(1)
        self.assertEqual(caught.exception.errno, errno.ENOSYS)

    def locked_memory(self, soft: int, hard: int) -> list[tuple[int, int]]:
        """The value that the limit is set to, from this one."""
        told: list[tuple[int, int]] = []
        self.patch(resource, "getrlimit", lambda which: (soft, hard))
        self.patch(resource, "setrlimit", lambda which, limits: told.append(limits))
        bpf.allow_locked_memory()
        return told

    def test_locked_memory(self) -> None:
        """A small limit of locked memory is raised to what is needed; a large one is not
        changed."""
        unlimited = resource.RLIM_INFINITY
        self.assertEqual(self.locked_memory(65_536, 65_536), [(1 << 20, 1 << 20)])
        self.assertEqual(self.locked_memory(65_536, unlimited), [(1 << 20, unlimited)])
        self.assertEqual(self.locked_memory(65_536, 1 << 30), [(1 << 20, 1 << 30)])
        self.assertEqual(self.locked_memory(1 << 30, 1 << 30), [])
        self.assertEqual(self.locked_memory(unlimited, unlimited), [])

    def test_locked_memory_not_allowed(self) -> None:
        """If the limit may not be raised, nothing fails here; a later call to the kernel may."""

        def refuse(which: int, limits: tuple[int, int]) -> None:
            raise ValueError("not allowed to raise maximum limit")

        self.patch(resource, "getrlimit", lambda which: (0, 0))
        self.patch(resource, "setrlimit", refuse)
        bpf.allow_locked_memory()


class RedirectTests(SynchronousTestCase):
    """The redirect with a kernel that gives set answers."""

    def setUp(self) -> None:
        self.redirect = SkLookupRedirect()
        self.sockets: list[tuple[int, int]] = []
        self.attached: list[int] = []
        host = judgement.Host({}, judgement.Surroundings({}))
        self.patch(judgement, "look", lambda commands, families: succeed(host))
        self.patch(facts, "ipv6_to_listen_on", lambda: "::1")
        self.kernel("count_sk_lookup", lambda: 0)
        self.kernel("allow_locked_memory", lambda: None)
        self.own: set[bytes] = set()
        self.kernel("make_socket_map", lambda slots: os.dup(0))
        self.kernel("make_set", lambda key_bytes, size: os.dup(0))
        self.kernel("add_key", lambda where, key: self.own.add(key))
        self.kernel("remove_key", lambda where, key: self.own.remove(key))
        self.kernel("put_socket", lambda where, slot, which: self.sockets.append((slot, which)))
        self.kernel("load_sk_lookup", lambda code, name: os.dup(0))
        self.kernel("attach_sk_lookup", self.attach)
        self.events = log_of(self)

    def kernel(self, call: str, answer: Callable[..., Any]) -> None:
        self.patch(bpf, call, answer)

    def attach(self, program: int) -> int:
        link = os.dup(0)
        self.attached.append(link)
        return link

    @property
    def lines(self) -> list[str]:
        """The log events."""
        return [formatEvent(event) for event in self.events]

    def listen(self, *hosts: str) -> list[socket.socket]:
        listeners = []
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listeners.append(socket.create_server((host, 0), family=family))
            self.addCleanup(listeners[-1].close)
        return listeners

    def apply(self, *hosts: str) -> Deferred[None]:
        return self.redirect.apply(COMMANDS, self.listen(*(hosts or ("127.0.0.1", "::1"))))

    def refusal(self, problem: OSError, status: int) -> str:
        """The line for a kernel that refuses the program so, which goes with this exit status."""

        def refuse(code: bytes, name: str) -> int:
            raise problem

        self.kernel("load_sk_lookup", refuse)
        prepared: Any = self.failureResultOf(self.redirect.prepare(COMMANDS), StartError).value
        applied: Any = self.failureResultOf(self.apply(), StartError).value
        self.assertEqual(str(prepared), str(applied))
        self.assertEqual((prepared.status, applied.status), (status, status))
        return str(applied)

    def is_open(self, descriptor: int) -> bool:
        try:
            os.fstat(descriptor)
        except OSError:
            return False
        return True

    def test_interface(self) -> None:
        """It is a redirect, and has a text."""
        verifyObject(IRedirect, self.redirect)
        self.assertEqual(str(self.redirect), "sk-lookup")

    def test_loopback_alone(self) -> None:
        """It listens on loopback only, on IPv4 only if IPv6 is not wanted."""
        both = self.successResultOf(self.redirect.prepare(COMMANDS))
        self.assertEqual(both, ("127.0.0.1:0", "[::1]:0"))
        one = self.successResultOf(SkLookupRedirect(ipv6=False).prepare(COMMANDS))
        self.assertEqual(one, ("127.0.0.1:0",))

    def test_own_addresses(self) -> None:
        """The program knows this host's addresses, also those that change while it steers."""
        addresses = {ip_address("192.0.2.1"), ip_address("2001:db8::1")}
        self.patch(sklookup, "own_addresses", lambda: addresses)
        self.successResultOf(self.apply())
        mapped = ip_address("::ffff:192.0.2.1").packed
        self.assertEqual(self.own, {mapped, ip_address("2001:db8::1").packed})
        addresses = {ip_address("2001:db8::2")}
        self.successResultOf(self.redirect.look_after(COMMANDS))
        self.assertEqual(self.own, {ip_address("2001:db8::2").packed})

        def refuse() -> None:
            raise OSError(errno.EPERM, "no more")

        self.patch(sklookup, "own_addresses", refuse)
        self.successResultOf(self.redirect.look_after(COMMANDS))

    def test_no_loopback_address(self) -> None:
        """If IPv6 is off on the loopback, the proxy listens on another address of the host."""
        self.patch(facts, "ipv6_to_listen_on", lambda: "2001:db8::2")
        both = self.successResultOf(self.redirect.prepare(COMMANDS))
        self.assertEqual(both, ("127.0.0.1:0", "[2001:db8::2]:0"))

    def test_link(self) -> None:
        """The link stays open until the redirect is removed; a second removal is harmless."""
        self.successResultOf(self.apply())
        self.assertEqual([slot for slot, _ in self.sockets], [0, 1])
        self.successResultOf(self.redirect.look_after(COMMANDS))
        self.assertTrue(self.is_open(self.attached[0]))
        self.successResultOf(self.redirect.remove(COMMANDS))
        self.assertFalse(self.is_open(self.attached[0]))
        self.successResultOf(self.redirect.remove(COMMANDS))
        self.successResultOf(self.redirect.release(COMMANDS))

    def test_no_ipv6(self) -> None:
        """If ::1 does not exist, only IPv4 is steered, and that is logged."""
        self.successResultOf(self.apply("127.0.0.1"))
        self.assertEqual(
            self.lines,
            [
                "This host has no IPv6 loopback address: the proxy steers IPv4 only; IPv6"
                " connections go to the web server"
            ],
        )

    def test_others(self) -> None:
        """If another program is attached, the log says which one wins."""
        self.kernel("count_sk_lookup", lambda: 1)
        self.successResultOf(self.apply())
        self.assertRegex(
            self.lines[0], "^Another sk_lookup program .*The proxy's program was attached last"
        )

    def test_refused_by_the_verifier(self) -> None:
        """A refused program's error has the verifier's own words."""
        problem = bpf.Refused(errno.EACCES, "R1 type=scalar expected=ctx")
        line = self.refusal(problem, os.EX_UNAVAILABLE)
        self.assertRegex(line, r"refuses the BPF program: R1 type=scalar.*; report this line")
        self.assertEqual(self.attached, [])

    def test_not_permitted(self) -> None:
        """Without the capability the remedy is root."""
        line = self.refusal(bpf.Refused(errno.EPERM, ""), os.EX_NOPERM)
        self.assertRegex(line, r"^no permission to use BPF; run this as root.*CAP_NET_ADMIN\)$")

    def test_too_old(self) -> None:
        """For a kernel without such programs, the error says that it is too old."""
        for number in (errno.EINVAL, errno.ENOSYS):
            line = self.refusal(OSError(number, os.strerror(number)), os.EX_UNAVAILABLE)
            self.assertRegex(line, r"has no BPF sk_lookup; run Linux 5\.9 or newer, on x86-64")

    def test_no_memory(self) -> None:
        """Any other error has the kernel's text."""
        problem = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        line = self.refusal(problem, os.EX_OSERR)
        self.assertRegex(line, "^cannot steer with BPF sk_lookup: Cannot allocate memory; check")


class VerifierTests(SynchronousTestCase):
    """The answers of the real kernel; needs root."""

    def test_log(self) -> None:
        """The reason of a refusal is the end of the verifier's log."""
        program = bpf.Assembler()
        program.move(0, 5)  # r5 was never written
        program.exit()
        with self.assertRaises(bpf.Refused) as caught:
            bpf.load_sk_lookup(program.code(), "refused")
        self.assertIn("R5 !read_ok", caught.exception.reason)
