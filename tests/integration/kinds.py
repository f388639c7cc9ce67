"""Kinds of hosts that people have: their firewall, their addresses and the path of their visitors;
and which redirects work there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .firewalls import Firewalld, Ufw
from .netns import Namespace, Node, Street, bridged_street, container, street, unnumbered_street
from .proxy import Proxy
from .visitors import Visitors, visitors
from .website import PAGE, Website, website

FAMILIES = ("IPv4", "IPv6")
BRIDGE_SWITCHES = tuple(f"net.bridge.bridge-nf-call-{each}tables" for each in ("ip", "ip6"))


@dataclass(frozen=True)
class Host:
    """A host with its web server, and a visitor one cable away.

    @ivar families: the address families that visitors use.
    @ivar steered_from: the address that the web server sees for a steered visitor, if the proxy
        cannot connect to it from the visitor's address.
    @ivar options: the options that C{start} always needs here.
    @ivar path: the PATH of the proxy, if not the usual one.
    """

    road: Street
    site: Website
    families: tuple[str, ...] = FAMILIES
    steered_from: str = "127.0.0.1"
    options: tuple[str, ...] = ()
    path: str = ""

    @property
    def namespace(self) -> Namespace:
        return self.road.host.namespace

    def proxy(self, directory: Path) -> Proxy:
        """The proxy of this host, not started."""
        proxy = Proxy(self.namespace, directory)
        if self.path:
            proxy.wrapper = ("env", f"PATH={self.path}")
        return proxy

    def steered(self) -> bool:
        """Whether new visitors of each family, who get the page, come through the proxy."""
        found = set()
        for family in self.families:
            with self.site.visit(
                self.road.visitor.namespace, self.road.host.address(family)
            ) as visit:
                answer = visit.get()
            assert answer.body == PAGE
            found.add(answer.steered or answer.seen_from == self.steered_from)
        (same,) = found
        return same

    def crowd(self) -> AbstractContextManager[Visitors]:
        """Visitors who come again and again."""
        return visitors(
            self.site, self.road.visitor, self.road.host, self.families, self.steered_from
        )

    def ruleset(self) -> str:
        """All rules of the firewall, without counters, handles, empty chains and empty tables."""
        shown = self.namespace.run("nft", "--stateless", "list", "ruleset").stdout
        return "\n".join([*self.namespace.rules(), _without_empty(shown)])


def _without_empty(ruleset: str) -> str:
    """The ruleset without the chains and tables that iptables has made and emptied again."""
    chain = r"(?m)^\tchain \S+ \{\n(?:\t\ttype .*policy accept;\n)?\t\}\n\n?"
    return re.sub(r"(?m)^table \S+ \S+ \{\n\}\n", "", re.sub(chain, "", ruleset))


Made = Callable[[Path], AbstractContextManager[Host]]


@dataclass(frozen=True)
class Kind:
    """A kind of host.

    @ivar make: makes such a host, with files in a folder.
    @ivar default: the redirect that C{start} takes if nobody chooses.
    @ivar refusals: the redirects that are refused if they are named alone, with a pattern of the
        reason.
    """

    make: Made
    default: str
    refusals: Mapping[str, str] = field(default_factory=dict)


Arrange = Callable[[Namespace, Path, ExitStack], None]


def _on(
    streets: Callable[[], AbstractContextManager[Street]], arrange: Arrange | None = None
) -> Made:
    """A host on such a street, after C{arrange} was called for it."""

    @contextmanager
    def make(directory: Path) -> Iterator[Host]:
        with (
            streets() as road,
            website(road.host.namespace, directory / "site") as site,
            ExitStack() as ends,
        ):
            if arrange is not None:
                arrange(road.host.namespace, directory, ends)
            yield Host(road, site)

    return make


def _both_families(host: Namespace, rule: str) -> None:
    """Add a rule of iptables and of ip6tables. In each, the placeholders ICMP and STRANGER are
    replaced by the family's protocol and by an address."""
    for family, icmp, stranger in (("", "icmp", "203.0.113.7"), ("6", "icmpv6", "2001:db8:7::7")):
        words = rule.replace("ICMP", icmp).replace("STRANGER", stranger)
        host.run(f"ip{family}tables", *words.split())


def _warm_tracking(host: Namespace, directory: Path, ends: ExitStack) -> None:
    _both_families(host, "-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT")


def _ufw(host: Namespace, directory: Path, ends: ExitStack) -> None:
    ufw = Ufw(host, directory)
    ufw.run("allow", "443/tcp")
    ufw.run("--force", "enable")


def _firewalld(host: Namespace, directory: Path, ends: ExitStack) -> None:
    firewalld = Firewalld(host, directory)
    ends.enter_context(firewalld.running())
    firewalld.run("--add-service", "https")


def _default_drop(host: Namespace, directory: Path, ends: ExitStack) -> None:
    host.run(
        "nft",
        "table inet filter { chain input { type filter hook input priority 0; policy drop; "
        "iif lo accept; ct state established,related accept; meta l4proto icmpv6 accept; "
        "tcp dport { 22, 443 } accept; }; }",
    )


def _default_drop_by_iptables(host: Namespace, directory: Path, ends: ExitStack) -> None:
    for rule in (
        "-A INPUT -i lo -j ACCEPT",
        "-A INPUT -p ICMP -j ACCEPT",
        "-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT",
        "-A INPUT -p tcp --dport 443 -j ACCEPT",
        "-P INPUT DROP",
    ):
        _both_families(host, rule)


def _ban(host: Namespace, directory: Path, ends: ExitStack) -> None:
    _both_families(host, "-A INPUT -p tcp --dport 443 -s STRANGER -j REJECT")


def _untracked(host: Namespace, directory: Path, ends: ExitStack) -> None:
    _both_families(host, "-t raw -A PREROUTING -p tcp --dport 443 -j NOTRACK")
    _both_families(host, "-t raw -A OUTPUT -p tcp --sport 443 -j NOTRACK")


def _bridge_nf(value: int) -> Arrange:
    def arrange(host: Namespace, directory: Path, ends: ExitStack) -> None:
        host.run("sysctl", "-qw", *(f"{switch}={value}" for switch in BRIDGE_SWITCHES))

    return arrange


@contextmanager
def _without_iptables(directory: Path) -> Iterator[Host]:
    programs = directory / "programs"
    programs.mkdir()
    nft = shutil.which("nft", path="/usr/sbin:/usr/bin:/sbin")
    assert nft is not None
    (programs / "nft").symlink_to(nft)
    with street() as road, website(road.host.namespace, directory / "site") as site:
        yield Host(road, site, path=str(programs))


@contextmanager
def _published(directory: Path) -> Iterator[Host]:
    with street() as road, container(road.host.namespace) as box:
        yield from _site_in(road, box, directory)


@contextmanager
def _two_published(directory: Path) -> Iterator[Host]:
    with (
        street() as road,
        container(road.host.namespace) as box,
        container(road.host.namespace, 1, 8443),
    ):
        yield from _site_in(road, box, directory)


def _site_in(road: Street, box: Node, directory: Path) -> Iterator[Host]:
    with website(box.namespace, directory / "site") as site:
        yield Host(
            road,
            site,
            families=("IPv4",),
            steered_from="172.17.0.1",
            options=("-fallback", f"{box.ipv4}:443"),
        )


DROPPED = "the firewall would drop the IPv. visitors after the redirect to port 21443: "
ELSEWHERE = "sends the IPv4 visitors( that arrive at net0)? to another port or host: .* DOCKER"

KINDS: Mapping[str, Kind] = {
    "cold tracking": Kind(_on(street), "iptables"),
    "warm tracking": Kind(_on(street, _warm_tracking), "iptables"),
    "ufw": Kind(_on(street, _ufw), "nftables", {"iptables": DROPPED}),
    "firewalld": Kind(_on(street, _firewalld), "iptables"),
    "default drop by nft": Kind(_on(street, _default_drop), "nftables", {"iptables": DROPPED}),
    "default drop by iptables": Kind(
        _on(street, _default_drop_by_iptables), "nftables", {"iptables": DROPPED}
    ),
    "a ban": Kind(_on(street, _ban), "nftables"),
    "NOTRACK": Kind(
        _on(street, _untracked), "nftables", {"iptables": "from connection tracking.* -j "}
    ),
    "service address on lo": Kind(
        _on(unnumbered_street), "nftables", {"iptables": "where REDIRECT finds no IPv. address"}
    ),
    "no iptables": Kind(_without_iptables, "nftables", {"iptables": "not found on PATH"}),
    "bridge": Kind(_on(bridged_street, _bridge_nf(0)), "iptables"),
    "bridge with bridge-nf": Kind(
        _on(bridged_street, _bridge_nf(1)),
        "iptables",
        {"nftables": "through the bridge br0, .*bridge-nf-call-ip6?tables"},
    ),
    "published container": Kind(_published, "iptables", {"sk-lookup": ELSEWHERE}),
    "two published containers": Kind(_two_published, "iptables", {"sk-lookup": ELSEWHERE}),
}
