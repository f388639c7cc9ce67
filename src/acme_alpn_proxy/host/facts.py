"""Facts about this host (this network namespace), as the kernel shows them in proc(5)."""

from __future__ import annotations

import fcntl
import socket
import struct
from ipaddress import IPv6Address
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")

_SIOCGIFADDR: Final = 0x8915
"""netdevice(7): the first IPv4 address of an interface."""

_IPV6_GLOBAL: Final = 0x00
"""The scope of a global address in /proc/net/if_inet6."""

_NOT_USABLE: Final = 0x48
"""IFA_F_DADFAILED and IFA_F_TENTATIVE of linux/if_addr.h."""

_CAP_NET_ADMIN: Final = 12

_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC
"""The inode of that namespace, PROC_PID_INIT_INO of linux/proc_ns.h."""

_ROUTE_UP: Final = 0x0001
_ROUTE_REJECT: Final = 0x0200
_ROUTE_LOCAL: Final = 0x80000000
"""linux/route.h and linux/ipv6_route.h."""


def has_ipv6(proc: Path = PROC) -> bool:
    """Whether any interface has an IPv6 address."""
    try:
        return bool((proc / "net/if_inet6").read_text().strip())
    except OSError:  # no IPv6 in this kernel
        return False


def ipv6_to_listen_on(proc: Path = PROC) -> str:
    """The loopback address; if IPv6 is off on C{lo}, one of the host's global addresses."""
    addresses = []
    for line in _lines(proc / "net/if_inet6"):
        digits, _, _, scope, flags, _ = line.split()
        if digits == f"{1:032x}":
            return "::1"
        if int(scope, 16) == _IPV6_GLOBAL and not int(flags, 16) & _NOT_USABLE:
            addresses.append(str(IPv6Address(int(digits, 16))))
    return addresses[0] if addresses else "::1"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # no such family in this kernel
        return []


def _default_route_interfaces_v4(proc: Path) -> set[str]:
    """The interfaces of the default routes; without default routes, of all routes
    (/proc/net/route)."""
    routes: list[tuple[str, bool]] = []
    for line in (proc / "net/route").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & _ROUTE_UP and not int(fields[3], 16) & _ROUTE_REJECT:
            routes.append((fields[0], int(fields[1], 16) == 0 and int(fields[7], 16) == 0))
    return {name for name, is_default in routes if is_default} or {name for name, _ in routes}


def _default_route_interfaces_v6(proc: Path) -> set[str]:
    """Interfaces of the default routes by IPv6 (/proc/net/ipv6_route).

    The list has all tables, and routes to this host itself, such as those of a
    L{acme_alpn_proxy.host.returnpath.ReturnPath}: no visitor arrives through these.
    """
    found = set()
    for line in (proc / "net/ipv6_route").read_text().splitlines():
        destination, length, *_, flags, name = line.split()
        usable = int(flags, 16) & (_ROUTE_UP | _ROUTE_REJECT | _ROUTE_LOCAL) == _ROUTE_UP
        if usable and int(length, 16) == 0 and int(destination, 16) == 0:
            found.add(name)
    return found - {"lo"}


def _has_address_v4(interface: str) -> bool:
    request = struct.pack("16s24x", interface.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            fcntl.ioctl(probe, _SIOCGIFADDR, request)
        except OSError:
            return False
    return True


def _numbered_interfaces_v6(proc: Path) -> set[str]:
    """The interfaces that have a global address.

    Since Linux 6.7, REDIRECT takes an address with the same scope as the one that the visitor
    connected to, so a link-local address is no use for visitors from elsewhere.
    """
    return {
        fields[5]
        for fields in map(str.split, (proc / "net/if_inet6").read_text().splitlines())
        if int(fields[3], 16) == _IPV6_GLOBAL
    }


def visitor_interfaces(family: int, proc: Path = PROC) -> set[str]:
    """The interfaces through which visitors arrive, according to the routes; empty if unknown.

    @param family: 4 or 6.
    """
    try:
        find = _default_route_interfaces_v4 if family == 4 else _default_route_interfaces_v6
        return find(proc)
    except OSError:  # no such family in this kernel
        return set()


def unnumbered_interfaces(family: int, proc: Path = PROC) -> list[str]:
    """The interfaces without an address through which visitors arrive, according to the routes.

    REDIRECT leads to the incoming interface's address (iptables-extensions(8)); if it has none, the
    kernel drops the packet.

    @param family: 4 or 6.
    """
    names = visitor_interfaces(family, proc)
    if family == 4:
        return sorted(name for name in names if not _has_address_v4(name))
    return sorted(names - _numbered_interfaces_v6(proc)) if names else []


def legacy_tables(family: int, proc: Path = PROC) -> list[str]:
    """The existing tables of the legacy iptables (/proc/net/ip_tables_names)."""
    try:
        return (proc / f"net/{'ip' if family == 4 else 'ip6'}_tables_names").read_text().split()
    except OSError:  # not loaded
        return []


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except OSError:
        return None


def new_interfaces_have_ipv6(proc: Path = PROC) -> bool:
    """Whether an interface that is made now gets IPv6."""
    return _number(proc / "sys/net/ipv6/conf/default/disable_ipv6") == 0


def tracked_connections(proc: Path = PROC) -> int:
    """Entries in the connection tracking table; 0 if it is not loaded."""
    return _number(proc / "sys/net/netfilter/nf_conntrack_count") or 0


def max_tracked_connections(proc: Path = PROC) -> int | None:
    """The largest number of entries (nf_conntrack_max); L{None} if the table is not loaded."""
    return _number(proc / "sys/net/netfilter/nf_conntrack_max")


def tcp_connections(proc: Path = PROC) -> int:
    """TCP sockets in use and in TIME_WAIT, both families (/proc/net/sockstat, sockstat6)."""
    total = 0
    for name in ("sockstat", "sockstat6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            kind, *words = line.split()
            if kind in ("TCP:", "TCP6:"):
                counts = dict(zip(words[::2], map(int, words[1::2]), strict=True))
                total += counts.get("inuse", 0) + counts.get("tw", 0)
    return total


def has_capabilities(*numbers: int, proc: Path = PROC) -> bool:
    """Whether all of these are in effect for this process (capabilities(7),
    <linux/capability.h>)."""
    status = (proc / "self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return all(effective >> number & 1 for number in numbers)


def may_administer_network() -> bool:
    """Whether this process may change the firewall's rules."""
    return has_capabilities(_CAP_NET_ADMIN)


def process_start_time(pid: int | str, proc: Path = PROC) -> str | None:
    """When a process started, in clock ticks since boot (proc_pid_stat(5), field 22).

    PID and start time together identify a process for ever: the kernel reuses PIDs. L{None} if
    there is no such process, or if it has ended and its parent has not waited for it yet (state Z).
    """
    try:
        stat = (proc / str(pid) / "stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name may contain blanks and brackets
    return None if state == "Z" else fields[18]


def pid_namespace(proc: Path = PROC) -> int:
    """A number for this process's PID namespace (the inode of namespaces(7)); 0 if unknown."""
    try:
        return (proc / "self/ns/pid").stat().st_ino
    except OSError:
        return 0


def in_first_pid_namespace(proc: Path = PROC) -> bool:
    """Whether this is the first PID namespace of the kernel; a container has another one."""
    return pid_namespace(proc) in (0, _FIRST_PID_NAMESPACE)
