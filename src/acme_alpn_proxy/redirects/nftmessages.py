"""Messages of nftables, best read together with C{linux/netfilter/nf_tables.h}.

There is one function for each message and for each expression. A rule is a list of expressions,
which pass values on in registers. Numbers are in network byte order, except those that L{compare}
compares with a value that the kernel holds in host byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from ..host.netlink import (
    ACKNOWLEDGE,
    APPEND,
    CREATE,
    EXCLUSIVE,
    REQUEST,
    Message,
    attribute,
    attributes,
    nested,
)

_SUBSYSTEM: Final = 10
"""NFNL_SUBSYS_NFTABLES of C{linux/netfilter/nfnetlink.h}."""

BATCH_BEGIN: Final = 0x10
_BATCH_END: Final = 0x11
NEW_TABLE: Final = _SUBSYSTEM << 8 | 0
GET_TABLE: Final = _SUBSYSTEM << 8 | 1
_DELETE_TABLE: Final = _SUBSYSTEM << 8 | 2
NEW_CHAIN: Final = _SUBSYSTEM << 8 | 3
NEW_RULE: Final = _SUBSYSTEM << 8 | 6

_INET: Final = 1
"""NFPROTO_INET: tables for IPv4 and IPv6."""

OWNER: Final = 2
"""NFT_TABLE_F_OWNER: the table belongs to the socket that makes it, and is removed with it."""

_PREROUTING: Final = 0
FILTER: Final = 0
BEFORE_DSTNAT: Final = -101
"""Priorities of chains: C{filter}, and the one just before C{dstnat}."""

EQUAL: Final = 0
UNEQUAL: Final = 1

IIFTYPE: Final = 8
NFPROTO: Final = 15
L4PROTO: Final = 16
"""Keys of L{meta}: the type of the incoming interface, the family, the protocol."""

_TRANSPORT_HEADER: Final = 2
_FIB_ADDRTYPE: Final = 3
_FIB_DADDR: Final = 2
_DNAT: Final = 1


def batch(messages: Sequence[Message]) -> list[Message]:
    """A batch of C{messages}: the kernel applies all of them or none."""
    begin, end = (
        Message(kind, REQUEST, _header(0, _SUBSYSTEM)) for kind in (BATCH_BEGIN, _BATCH_END)
    )
    return [begin, *messages, end]


def which_table(name: str) -> bytes:
    """The body of a L{GET_TABLE} message."""
    return _header(_INET) + _text(1, name)


def new_table(name: str, flags: int) -> Message:
    """Make a table, which must not exist yet."""
    return _make(NEW_TABLE, CREATE | EXCLUSIVE, _text(1, name) + _number(2, flags))


def delete_table(name: str) -> Message:
    """Delete a table with everything in it."""
    return _make(_DELETE_TABLE, 0, _text(1, name))


def new_chain(table: str, name: str, kind: str, priority: int) -> Message:
    """Make a chain for incoming packets: C{type KIND hook prerouting priority PRIORITY}."""
    hook = nested(4, _number(1, _PREROUTING), attribute(2, struct.pack("!i", priority)))
    return _make(NEW_CHAIN, CREATE, _text(1, table) + _text(3, name) + hook + _text(7, kind))


def new_rule(table: str, chain: str, *expressions: bytes) -> Message:
    """Add a rule at the end of the chain."""
    body = _text(1, table) + _text(2, chain) + nested(4, *expressions)
    return _make(NEW_RULE, CREATE | APPEND, body)


def expression_at(message: Message, offset: int) -> str:
    """The name of the expression that starts at C{offset} in the body of L{new_rule}'s message."""
    (length,) = struct.unpack_from("=H", message.body, offset)
    return attributes(message.body[offset + 4 : offset + length])[1].rstrip(b"\0").decode()


# Expressions. A register holds 16 bytes; functions without a register parameter use the first one.


def meta(key: int) -> bytes:
    """Load what the kernel knows about the packet besides its bytes."""
    return _expression("meta", _number(1, 1), _number(2, key))


def payload(offset: int, length: int) -> bytes:
    """Load bytes of the TCP header."""
    where = _number(2, _TRANSPORT_HEADER) + _number(3, offset) + _number(4, length)
    return _expression("payload", _number(1, 1), where)


def fib_type_of_destination() -> bytes:
    """Load the type of the dialled address (RTN_LOCAL and so on of C{linux/rtnetlink.h})."""
    return _expression("fib", _number(1, 1), _number(2, _FIB_ADDRTYPE), _number(3, _FIB_DADDR))


def mask(bits: bytes) -> bytes:
    """Set all other bits to 0."""
    registers = _number(1, 1) + _number(2, 1) + _number(3, len(bits))
    return _expression("bitwise", registers, _data(4, bits), _data(5, bytes(len(bits))))


def compare(value: bytes, how: int = EQUAL) -> bytes:
    """End the rule here unless the register holds this value (or another one, L{UNEQUAL})."""
    return _expression("cmp", _number(1, 1), _number(2, how), _data(3, value))


def load(register: int, value: bytes) -> bytes:
    """Load a constant."""
    return _expression("immediate", _number(1, register), _data(2, value))


def tproxy(family: int, address: int, port: int) -> bytes:
    """Give the packet to the listener at an address and port, unless a connection already has it.

    @param family: C{socket.AF_INET} or C{AF_INET6}.
    @param address: the register that holds the address.
    @param port: the register that holds the port.
    """
    return _expression("tproxy", _number(1, family), _number(2, address), _number(3, port))


def dnat_to_port(family: int, port: int) -> bytes:
    """Translate the port and keep the address; the SYN decides for the whole connection.

    @param port: the register that holds the port.
    """
    return _expression("nat", _number(1, _DNAT), _number(2, family), _number(5, port))


def _make(kind: int, flags: int, body: bytes) -> Message:
    return Message(kind, REQUEST | ACKNOWLEDGE | flags, _header(_INET) + body)


def _header(family: int, resource: int = 0) -> bytes:
    """struct nfgenmsg of C{linux/netfilter/nfnetlink.h}."""
    return struct.pack("!BBH", family, 0, resource)


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("!I", value))


def _data(kind: int, value: bytes) -> bytes:
    return nested(kind, attribute(1, value))


def _expression(name: str, *inner: bytes) -> bytes:
    """One element of a rule's list of expressions."""
    return nested(1, _text(1, name), nested(2, *inner))
