"""The way back: the web server's answers to visitors, if it sees the visitors' own addresses.

A connection to the web server on loopback that comes from the visitor's address has its other end
in this process; but the kernel would send the web server's answers to the distant visitor. Two
things keep packets B{from} the web server's loopback address and port on this host:

  - IPv4: a rule, C{from 127.0.0.1 iif lo ipproto tcp sport 443 lookup TABLE}, where TABLE says
    C{local default dev TUN}. IPv4 has no routes by source.
  - IPv6: a route, C{local default from ::1 dev TUN}, and C{local ::1 dev TUN}, both in the table
    "local".

No packet with such a source may leave a host, so nothing else is affected: there is no mark, no
change to the host's settings, no firewall rule and no connection tracking. TUN is a device without
persistence. No packet passes it, because a local route delivers through C{lo}. But its routes exist
as long as this process has its descriptor: after SIGKILL nothing is left for IPv6, and for IPv4 a
rule with an empty table. A small process, the sweeper, whose program is L{main}, waits for the end
of this one and removes the rule; it can do that even if this one has dropped the privilege. If both
are killed, the next start or stop removes the rule (L{sweep}).

This module imports only the standard library and modules that do the same: the program may be
removed while that process runs.

Sources: ip-rule(8), ip-route(8), rtnetlink(7), the kernel's C{Documentation/networking/tuntap.rst}.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple

from .netlink import (
    ACKNOWLEDGE,
    CREATE,
    EXCLUSIVE,
    REQUEST,
    ROUTE,
    Message,
    Netlink,
    attribute,
    attributes,
    nested,
)

TUN: Final = "/dev/net/tun"

_NAME: Final = "acme-alpn"
"""The beginning of the device's name; the first free number follows."""

_TABLES: Final = 0x41430000
"""The table of the device C{acme-alpn0}; C{acme-alpn1} has the next one."""

_MOST_TABLES: Final = 0x10000

_PREFERENCE: Final = 1
"""The priority right after the table "local"; rules of other programs come much later."""

_SET_INTERFACE: Final = 0x400454CA
_TUN_WITHOUT_HEADER: Final = 0x1001
"""TUNSETIFF, and IFF_TUN with IFF_NO_PI (linux/if_tun.h)."""

_NEW_LINK: Final = 16
_NEW_ROUTE: Final = 24
_DELETE_ROUTE: Final = 25
_NEW_RULE: Final = 32
_DELETE_RULE: Final = 33
_GET_RULE: Final = 34
"""linux/rtnetlink.h."""

_UP: Final = 0x1
_LINK_FAMILIES: Final = 26
_ADDRESS_MODE: Final = 8
_NO_ADDRESSES: Final = 1
"""IFLA_AF_SPEC, IFLA_INET6_ADDR_GEN_MODE and IN6_ADDR_GEN_MODE_NONE (linux/if_link.h)."""

_TABLE_LOCAL: Final = 255
_BY_KERNEL: Final = 2
_BY_ADMINISTRATOR: Final = 4
_THIS_HOST: Final = 254
_LOCAL: Final = 2
_MULTICAST: Final = 5
"""RT_TABLE_LOCAL; RTPROT_KERNEL, RTPROT_STATIC; RT_SCOPE_HOST; RTN_LOCAL, RTN_MULTICAST."""

_RTA_DESTINATION: Final = 1
_RTA_SOURCE: Final = 2
_RTA_DEVICE: Final = 4
_RTA_METRIC: Final = 6
_RTA_TABLE: Final = 15

_TO_TABLE: Final = 1
_FRA_SOURCE: Final = 2
_FRA_INCOMING: Final = 3
_FRA_PREFERENCE: Final = 6
_FRA_TABLE: Final = 15
_FRA_PROTOCOL: Final = 21
_FRA_IP_PROTOCOL: Final = 22
_FRA_SOURCE_PORTS: Final = 23
"""FR_ACT_TO_TBL, and attributes of a rule (linux/fib_rules.h); the last two need Linux 4.17."""

_METRIC: Final = 1024
"""The default metric of IPv6. Two instances need two: each adds the index of its device."""

_RULE_HEADER: Final = 12

_NAME_OF_SWEEPER: Final = "acme-alpn-proxy-sweeper"
_PROGRAM: Final = (
    "import sys; sys.path.insert(0, sys.argv[2]);"
    " from acme_alpn_proxy.host.returnpath import main; main()"
)
"""Its command line: its name in the list of processes, and the folder (or zip file) of the
package."""

_LOOK: Final = 0.01
_LOOKS: Final = 1_000
"""How the sweeper waits until the device has gone: the seconds between two checks, and the largest
number of checks."""

_PATIENCE: Final = 2.0
"""Seconds to wait for that process; normally some hundredths."""


class WebServer(NamedTuple):
    """The listening address of a web server.

    @ivar host: a numeric loopback address.
    """

    host: str
    port: int

    @property
    def family(self) -> int:
        """C{AF_INET} or C{AF_INET6}."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET


class ReturnPath:
    """Brings the answers of web servers back, until it is closed."""

    def __init__(self, servers: Iterable[WebServer]) -> None:
        """Raises C{OSError}; then nothing is left. If the kernel cannot do it for IPv6, IPv6
        answers do not come back.

        C{FileNotFoundError}: there is no /dev/net/tun; C{PermissionError}: CAP_NET_ADMIN is
        missing.
        """
        self._rules: list[bytes] = []
        self._sweeper: _Sweeper | None = None
        sweep()
        self._device = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)  # no child may inherit it
        try:
            self._open(servers)
            if self._rules:
                with suppress(OSError):  # then the rule stays behind if this process is killed
                    self._sweeper = _Sweeper(self._name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the rules, then the device with its routes. To be called after the last
        connection."""
        if self._rules:
            with suppress(OSError), Netlink(ROUTE) as kernel:
                for rule in self._rules:
                    with suppress(OSError):
                        kernel.do(_DELETE_RULE, rule)
        os.close(self._device)
        if self._sweeper is not None:
            self._sweeper.close()

    def _open(self, servers: Iterable[WebServer]) -> None:
        flags = struct.pack("16sH22x", f"{_NAME}%d".encode(), _TUN_WITHOUT_HEADER)
        answer = fcntl.ioctl(self._device, _SET_INTERFACE, flags)
        self._name = name = answer[:16].rstrip(b"\0").decode()
        index = socket.if_nametoindex(name)
        table = _TABLES + int(name.removeprefix(_NAME)) % _MOST_TABLES
        with Netlink(ROUTE) as kernel:
            _bring_up(kernel, name, index)
            for server in servers:
                if server.family == socket.AF_INET6:
                    # Without CONFIG_IPV6_SUBTREES, or without IPv6 on new devices, there are none.
                    with suppress(OSError):
                        kernel.send(_by_source(server, index))
                else:
                    rule = _rule(server, table)
                    # The rule is added last, when its table is complete.
                    route = _route(socket.AF_INET, table, index)
                    kernel.send([_new(_NEW_ROUTE, route), _new(_NEW_RULE, rule)])
                    self._rules.append(rule)


def _new(kind: int, body: bytes) -> Message:
    return Message(kind, REQUEST | ACKNOWLEDGE | CREATE | EXCLUSIVE, body)


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def _bring_up(kernel: Netlink, name: str, index: int) -> None:
    """Bring the device up without any address, so that it sends nothing: no solicitation, no
    report."""
    link = struct.pack("=BxHiII", 0, 0, index, 0, 0)
    mode = nested(socket.AF_INET6, attribute(_ADDRESS_MODE, bytes([_NO_ADDRESSES])))
    with suppress(OSError):  # no IPv6 in this kernel
        kernel.do(_NEW_LINK, link + nested(_LINK_FAMILIES, mode))
    disabled = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    # No IPv6 here; or no right to write: then the trial connection by IPv6 gets no answer.
    with suppress(OSError):
        if disabled.read_text() == "1\n":  # the default for new devices here
            disabled.write_text("0")
    kernel.do(_NEW_LINK, struct.pack("=BxHiII", 0, 0, index, _UP, _UP))
    multicast = _route(socket.AF_INET6, _TABLE_LOCAL, index, kind=_MULTICAST, to="ff00::/8", by=0)
    with suppress(OSError):
        kernel.do(_DELETE_ROUTE, multicast)


def _by_source(server: WebServer, index: int) -> list[Message]:
    """The routes for IPv6. The second one is for answers from sockets in TIME_WAIT: the kernel
    binds these to the device that the packet came from, which is this one."""
    metric = _number(_RTA_METRIC, _METRIC + index)
    routes = (
        _route(socket.AF_INET6, _TABLE_LOCAL, index, source=server.host),
        _route(socket.AF_INET6, _TABLE_LOCAL, index, to=f"{server.host}/128"),
    )
    return [_new(_NEW_ROUTE, route + metric) for route in routes]


def _route(
    family: int,
    table: int,
    index: int,
    *,
    kind: int = _LOCAL,
    by: int = _BY_ADMINISTRATOR,
    to: str = "",
    source: str = "",
) -> bytes:
    """C{struct rtmsg} and its attributes.

    @param index: the device's index.
    @param by: the program that made it; 0: any.
    @param to: address and length; empty: all destinations.
    @param source: an address; empty: all sources.
    """
    destination, _, length = to.partition("/")
    body = struct.pack(
        "=BBBBBBBBI",
        family,
        int(length or 0),
        8 * len(_packed(source)),
        0,
        table if table <= _TABLE_LOCAL else 0,
        by,
        _THIS_HOST,
        kind,
        0,
    )
    body += _number(_RTA_TABLE, table) + _number(_RTA_DEVICE, index)
    if destination:
        body += attribute(_RTA_DESTINATION, _packed(destination))
    if source:
        body += attribute(_RTA_SOURCE, _packed(source))
    return body


def _packed(host: str) -> bytes:
    """A numeric address as bytes; empty for an empty text."""
    return ip_address(host).packed if host else b""


def _rule(server: WebServer, table: int) -> bytes:
    """C{struct fib_rule_hdr} and its attributes. It is marked as a rule of the kernel, so that
    programs that remove rules of others, such as systemd-networkd, leave it."""
    source = _packed(server.host)
    header = struct.pack("=BBBBBBBBI", server.family, 0, 8 * len(source), 0, 0, 0, 0, _TO_TABLE, 0)
    return header + b"".join(
        (
            attribute(_FRA_SOURCE, source),
            attribute(_FRA_INCOMING, b"lo\0"),
            _number(_FRA_PREFERENCE, _PREFERENCE),
            _number(_FRA_TABLE, table),
            attribute(_FRA_PROTOCOL, bytes([_BY_KERNEL])),
            attribute(_FRA_IP_PROTOCOL, bytes([socket.IPPROTO_TCP])),
            attribute(_FRA_SOURCE_PORTS, struct.pack("=HH", server.port, server.port)),
        )
    )


def _own_rules(kernel: Netlink) -> Iterator[tuple[bytes, str]]:
    """The rules of this program, of any instance, with the device that each needs."""
    for body in kernel.dump(_GET_RULE, struct.pack("=B11x", socket.AF_INET)):
        told = attributes(body[_RULE_HEADER:])
        if told.get(_FRA_PREFERENCE) == struct.pack("=I", _PREFERENCE) and _FRA_TABLE in told:
            (table,) = struct.unpack("=I", told[_FRA_TABLE])
            if _TABLES <= table < _TABLES + _MOST_TABLES:
                yield body, f"{_NAME}{table - _TABLES}"


def _is_there(device: str) -> bool:
    try:
        socket.if_nametoindex(device)
    except OSError:
        return False
    return True


def sweep() -> int:
    """Remove the rules of killed instances: their device no longer exists, and their table is
    empty.

    @return: the number removed. Rules that this process may not remove, or not list, stay.
    """
    count = 0
    with suppress(OSError), Netlink(ROUTE) as kernel:
        for rule, device in list(_own_rules(kernel)):
            if not _is_there(device):
                kernel.do(_DELETE_RULE, rule)
                count += 1
    return count


def count_left() -> int:
    """The number of rules that L{sweep} would remove."""
    with suppress(OSError), Netlink(ROUTE) as kernel:
        return sum(not _is_there(device) for _, device in _own_rules(kernel))
    return 0


class _Sweeper:
    """The process that removes the rules of a device after the device has gone."""

    def __init__(self, device: str) -> None:
        """Start it; raises C{OSError}."""
        self._line, theirs = socket.socketpair()
        package = str(Path(__file__).parents[2])
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _PROGRAM, _NAME_OF_SWEEPER, package, device],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError:
                self._line.close()
                raise

    def close(self) -> None:
        """Wait until it has finished: when this process has ended, systemd kills all others."""
        self._line.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)


def main() -> None:
    """Wait until standard input is closed, and until the device has gone."""
    for number in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "PIPE"):
        signal.signal(getattr(signal, f"SIG{number}"), signal.SIG_IGN)
    with suppress(OSError):
        os.read(0, 1)
    for _ in range(_LOOKS):
        if not _is_there(sys.argv[-1]):
            break
        time.sleep(_LOOK)
    sweep()
