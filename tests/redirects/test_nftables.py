"""The table, and the texts of refusals; tests/integration/test_nftables.py steers with it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import formatEvent
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.firewall import judgement
from acme_alpn_proxy.firewall.judgement import Host, Surroundings
from acme_alpn_proxy.firewall.nftrules import OWN_TABLE
from acme_alpn_proxy.firewall.reading import CannotLook, Firewall
from acme_alpn_proxy.host import facts
from acme_alpn_proxy.host.netlink import Message, Refused
from acme_alpn_proxy.host.processes import BlockingCommands
from acme_alpn_proxy.interfaces import ICommands, IRedirect
from acme_alpn_proxy.redirects import nftables
from acme_alpn_proxy.redirects import nftmessages as nft
from acme_alpn_proxy.redirects.nftables import NftablesRedirect, steering_table

from ..firewall.hosts import NET0, dport, ruleset
from ..memory import log_of

COMMANDS = BlockingCommands()


class Kernel:
    """A netlink socket whose other end does what a test says.

    @ivar has_table: whether the table is there.
    """

    def __init__(self, refuse: Callable[[Sequence[Message]], None]) -> None:
        self._refuse = refuse
        self.has_table = False
        self.is_open = True
        self.problem: OSError | None = None
        self.batches = 0

    def send(self, messages: Sequence[Message]) -> None:
        self._refuse(messages)
        self.batches += 1
        kinds = [message.kind for message in messages]
        assert (kinds[0], kinds[-1]) == (0x10, 0x11)
        self.has_table = nft.delete_table("").kind not in kinds

    def ask(self, kind: int, body: bytes) -> bytes:
        assert (kind, body) == (nft.GET_TABLE, nft.which_table("acme_alpn_proxy"))
        if self.problem is not None:
            raise self.problem
        if not self.has_table:
            raise FileNotFoundError(errno.ENOENT, "none")
        return b""

    def close(self) -> None:
        self.is_open = self.has_table = False


def translating(priority: int) -> Firewall:
    """It sends visitors to another port."""
    base = {"family": "ip", "hook": "prerouting", "prio": priority, "type": "nat"}
    return Firewall(ruleset(base, [dport(443), {"redirect": {"port": 8443}}]))


def message(table: Iterable[Message], kind: int) -> Message:
    """The first one of this kind."""
    return next(each for each in table if each.kind == kind)


class NftablesCase(SynchronousTestCase):
    """A host whose visitors come in by eth0, with a kernel that gives set answers."""

    def setUp(self) -> None:
        self.events = log_of(self)
        self.kernels: list[Kernel] = []
        self.refused: Callable[[Sequence[Message]], OSError | None] = lambda messages: None
        self.options: list[tuple[int, int, int]] = []
        self.bridges: dict[int, set[str]] = {4: set(), 6: set()}
        self.patch(nftables, "Netlink", self.new_kernel)
        self.patch(nftables, "filtered_bridges", lambda family: self.bridges[family])
        self.patch(facts, "visitor_interfaces", lambda family: {"eth0"})
        self.patch(facts, "has_ipv6", lambda: True)
        self.patch(facts, "ipv6_to_listen_on", lambda: "::1")
        self.patch(facts, "may_administer_network", lambda: True)
        self.firewall = Firewall()
        self.patch(judgement, "look", self.look)
        self.redirect = NftablesRedirect()

    def look(self, commands: ICommands, families: Iterable[int]) -> Deferred[Host]:
        firewalls = dict.fromkeys(families, self.firewall)
        return succeed(Host(firewalls, Surroundings(NET0, lambda *packet: None)))

    def new_kernel(self, protocol: int) -> Kernel:
        def refuse(messages: Sequence[Message]) -> None:
            problem = self.refused(messages)
            if problem is not None:
                raise problem

        self.kernels.append(Kernel(refuse))
        return self.kernels[-1]

    def listen(self, *hosts: str) -> list[Any]:
        case = self

        class Listener(socket.socket):
            def setsockopt(self, *option: Any) -> None:
                case.options.append(option)

        listeners = []
        for host in hosts or ("127.0.0.1", "::1"):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listeners.append(Listener(family))
            self.addCleanup(listeners[-1].close)
            listeners[-1].bind((host, 0))
        return listeners

    def applied(self, *hosts: str) -> Kernel:
        self.successResultOf(self.redirect.prepare(COMMANDS))
        self.successResultOf(self.redirect.apply(COMMANDS, self.listen(*hosts)))
        (kernel,) = self.kernels
        return kernel

    @property
    def lines(self) -> list[str]:
        return [formatEvent(event) for event in self.events]


class RedirectTests(NftablesCase):
    def test_interface(self) -> None:
        """It is a redirect, and has a text."""
        verifyObject(IRedirect, self.redirect)
        self.assertEqual(str(self.redirect), "nftables")

    def test_loopback_alone(self) -> None:
        """It listens on loopback only, with IPv6 switched off on IPv4 only, and leaves no table."""
        both = self.successResultOf(self.redirect.prepare(COMMANDS))
        self.assertEqual(both, ("127.0.0.1:0", "[::1]:0"))
        one = self.successResultOf(NftablesRedirect(ipv6=False).prepare(COMMANDS))
        self.assertEqual(one, ("127.0.0.1:0",))
        self.assertEqual([kernel.has_table for kernel in self.kernels], [False, False])

    def test_only_prepared(self) -> None:
        """A redirect that is prepared, and never applied, leaves no socket."""
        self.successResultOf(self.redirect.prepare(COMMANDS))
        del self.redirect
        self.assertFalse(self.kernels[0].is_open)

    def test_table(self) -> None:
        """The table is there until the redirect is removed; removing it twice does nothing."""
        kernel = self.applied()
        self.assertTrue(kernel.has_table)
        self.assertEqual(self.options, [(0, 19, 1), (41, 75, 1)], "both listeners are transparent")
        self.successResultOf(self.redirect.look_after(COMMANDS))
        self.assertEqual(kernel.batches, 2, "one trial, one table")
        self.successResultOf(self.redirect.remove(COMMANDS))
        self.assertFalse(kernel.is_open)
        self.successResultOf(self.redirect.remove(COMMANDS))
        self.successResultOf(self.redirect.release(COMMANDS))
        self.successResultOf(self.redirect.look_after(COMMANDS))
        self.assertEqual(self.lines, [])

    def test_no_ipv6(self) -> None:
        """If ::1 does not exist, only IPv4 is steered, and that is logged."""
        self.patch(facts, "has_ipv6", lambda: False)
        self.applied("127.0.0.1")
        self.assertEqual(
            self.lines,
            [
                "This host has no IPv6 loopback address: the proxy steers IPv4 only; IPv6"
                " connections go to the web server"
            ],
        )

    def test_gone(self) -> None:
        """A table that has gone is put back, and that is logged."""
        kernel = self.applied()
        kernel.has_table = False
        self.successResultOf(self.redirect.look_after(COMMANDS))
        self.assertTrue(kernel.has_table)
        self.assertEqual(
            self.lines, ["The proxy's nftables table was removed; the proxy has created it again"]
        )

    def test_gone_for_good(self) -> None:
        """If the table cannot be put back, the operator reads why."""
        kernel = self.applied()
        kernel.has_table = False
        self.refused = lambda messages: OSError(errno.ENOMEM, "no memory")
        look = self.redirect.look_after(COMMANDS)
        self.assertRegex(
            str(self.failureResultOf(look, StartError).value), "^cannot steer with nft"
        )

    def test_cannot_look(self) -> None:
        """Without privileges the table cannot be seen, and nothing is asked; an error is noted."""
        kernel = self.applied()
        kernel.problem = OSError(errno.ENOBUFS, "no buffer")
        self.successResultOf(self.redirect.look_after(COMMANDS))
        self.assertRegex(self.lines[0], "^Cannot see the nftables table: .*no buffer")
        self.patch(facts, "may_administer_network", lambda: False)
        kernel.problem = AssertionError()  # type: ignore[assignment]
        self.successResultOf(self.redirect.look_after(COMMANDS))

    def chains(self) -> list[str]:
        """Those of the table, of which one has to be there if port 443 is translated."""
        sent: list[Message] = []

        def note(messages: Sequence[Message]) -> None:
            sent[:] = messages

        self.refused = note
        self.redirect = NftablesRedirect()
        self.kernels.clear()
        self.applied()
        chains = [each.body for each in sent if each.kind == nft.NEW_CHAIN]
        return [name for name in ("steer", "pin") for body in chains if name.encode() in body]

    def test_pin(self) -> None:
        """Only where port 443 is translated there is a chain that prevents it."""
        self.assertEqual(self.chains(), ["steer"])
        self.firewall = translating(-100)
        self.assertEqual(self.chains(), ["steer", "pin"])

    def test_nothing_waits_for_the_trial(self) -> None:
        """The table is tried when the firewall has been read: programs that read it would take 20
        ms longer afterwards, since the kernel has them wait until the trial's table is gone."""
        look = self.look

        def look_first(commands: ICommands, families: Iterable[int]) -> Deferred[Host]:
            self.assertEqual(self.kernels, [])
            return look(commands, families)

        self.patch(judgement, "look", look_first)
        self.applied()

    def test_both_refuse(self) -> None:
        """If both the kernel and the firewall prevent it, the kernel's reason comes first."""
        self.firewall = translating(-150)
        self.refused = lambda messages: OSError(errno.EPERM, "not permitted")
        problem: Any = self.failureResultOf(self.redirect.prepare(COMMANDS), StartError).value
        self.assertRegex(str(problem), "^no permission to use nftables")

    def test_translated_before(self) -> None:
        """If an earlier translation cannot be prevented, it refuses; with --force it steers."""
        self.firewall = translating(-150)
        attempt = self.redirect.prepare(COMMANDS)
        problem: Any = self.failureResultOf(attempt, StartError).value
        self.assertRegex(
            str(problem),
            "to another port or host.*'ip t c' .*; remove that rule.* \\(--force skips",
        )
        self.successResultOf(NftablesRedirect(force=True).prepare(COMMANDS))

    def test_firewall_not_seen(self) -> None:
        """A firewall that cannot be seen is a reason to refuse. With --force it may translate."""

        def look(commands: ICommands, families: Iterable[int]) -> Any:
            return fail(CannotLook("it cannot be seen"))

        self.patch(judgement, "look", look)
        attempt = self.redirect.prepare(COMMANDS)
        problem: Any = self.failureResultOf(attempt, StartError).value
        self.assertRegex(
            str(problem), "^it cannot be seen; run that command .* \\(--force skips this check"
        )
        self.successResultOf(NftablesRedirect(force=True).prepare(COMMANDS))

    def test_length_of_the_name(self) -> None:
        """nft 1.0.6 prints invalid JSON for an owner's table with a longer name."""
        self.assertLessEqual(len(OWN_TABLE), 23)


class RefusalTests(NftablesCase):
    def refusal(self, number: int, kind: int | None = None, offset: int | None = None) -> Any:
        """The error if the kernel refuses the first message of this kind with this number."""

        def refused(messages: Sequence[Message]) -> OSError:
            if kind is None:
                return OSError(number, os.strerror(number))
            return Refused(number, message(messages, kind), offset)

        self.refused = refused
        prepared: Any = self.failureResultOf(self.redirect.prepare(COMMANDS), StartError).value
        applied: Any = self.failureResultOf(
            self.redirect.apply(COMMANDS, self.listen()), StartError
        ).value
        self.assertEqual((str(prepared), prepared.status), (str(applied), applied.status))
        self.assertNotEqual(prepared.remedy, "")
        self.assertEqual([kernel.is_open for kernel in self.kernels], [False] * len(self.kernels))
        return prepared

    def refuses(self, pattern: str, status: int, *how: Any) -> None:
        problem = self.refusal(*how)
        self.assertRegex(str(problem), pattern)
        self.assertEqual(problem.status, status)

    def test_not_permitted(self) -> None:
        """Without the capability the remedy is root."""
        pattern = (
            r"^no permission to use nftables; run this as root \(in a container: with CAP_NET_ADMIN"
        )
        self.refuses(pattern, os.EX_NOPERM, errno.EPERM, nft.BATCH_BEGIN)
        self.refuses(pattern, os.EX_NOPERM, errno.EPERM)

    def test_another_owner(self) -> None:
        """A table of another owner is another instance."""
        pattern = "^another instance already steers with nftables; stop that"
        self.refuses(pattern, os.EX_TEMPFAIL, errno.EPERM, nft.NEW_TABLE)

    def test_foreign_table(self) -> None:
        """A table without owner is another program's."""
        pattern = "already, which is not this program's; remove it .nft delete table inet acme"
        self.refuses(pattern, os.EX_CONFIG, errno.EEXIST, nft.NEW_TABLE)

    def test_too_old(self) -> None:
        """A kernel without nftables, or without the flag, is too old."""
        for how in (
            (errno.EOPNOTSUPP, nft.BATCH_BEGIN),
            (errno.EOPNOTSUPP, nft.NEW_TABLE),
            (errno.EINVAL, nft.NEW_TABLE),
            (errno.EPROTONOSUPPORT,),
        ):
            self.refuses("can have an owner; run Linux 5.12 or newer", os.EX_UNAVAILABLE, *how)

    def test_missing_expression(self) -> None:
        """An expression that the kernel lacks is named, and its module."""
        table = steering_table([("127.0.0.1", 443), ("::1", 443)], pin=False)
        body = message(table, nft.NEW_RULE).body
        for name, module in (("fib", "nft_fib_inet"), ("tproxy", "nft_tproxy")):
            at = body.index(b"\x01\x00" + name.encode() + b"\0") - 6
            pattern = f"lacks the expression '{name}' of nftables; load the module {module}$"
            how = (errno.ENOENT, nft.NEW_RULE, at)
            self.refuses(pattern, os.EX_UNAVAILABLE, *how)
        pattern = "one of the expressions fib, tproxy and nat"
        self.refuses(pattern, os.EX_UNAVAILABLE, errno.ENOENT, nft.NEW_RULE)

    def test_missing_chain_type(self) -> None:
        """A type of chain that the kernel lacks is named, and its module."""
        pattern = "lacks a type of chain, .*; load the module nft_chain_nat"
        self.refuses(pattern, os.EX_UNAVAILABLE, errno.ENOENT, nft.NEW_CHAIN)

    def test_no_memory(self) -> None:
        """Any other error has the kernel's text."""
        pattern = "^cannot steer with nftables: Cannot allocate memory; check the free memory"
        self.refuses(pattern, os.EX_OSERR, errno.ENOMEM, nft.NEW_TABLE)

    def test_bridge(self) -> None:
        """Visitors over a bridge whose packets pass the firewall while bridged would not be
        steered; with --force, this is not checked."""
        self.patch(facts, "visitor_interfaces", lambda family: {"br0", "eth0"})
        for family, switch in ((4, "bridge-nf-call-iptables"), (6, "bridge-nf-call-ip6tables")):
            self.bridges = {4: set(), 6: set(), family: {"br0", "docker0"}}
            problem: Any = self.failureResultOf(self.redirect.prepare(COMMANDS), StartError).value
            self.assertRegex(
                str(problem), f"through the bridge br0, .*{switch}=1.*; set net.bridge.{switch}"
            )
            self.assertEqual(problem.status, os.EX_CONFIG)
        self.successResultOf(NftablesRedirect(force=True).prepare(COMMANDS))

    def test_bridges_unknown(self) -> None:
        """If the bridges cannot be read, that is no reason to refuse."""

        def fail(family: int) -> set[str]:
            raise OSError

        self.patch(nftables, "filtered_bridges", fail)
        self.successResultOf(self.redirect.prepare(COMMANDS))
