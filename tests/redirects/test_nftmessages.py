"""Messages of nftables, byte for byte; tests/integration/test_nftmessages.py asks the kernel."""

from __future__ import annotations

import socket
import struct
import sys

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.host.netlink import Message
from acme_alpn_proxy.redirects import nftmessages as nft

INET = b"\x01\x00\x00\x00"
MAKE, DELETE = 0x1 | 0x4 | 0x400, 0x1 | 0x4


def field(kind: int, value: bytes) -> bytes:
    """An attribute as the kernel wants it: length and kind in its own order, then the value."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def listed(name: bytes, data: bytes) -> bytes:
    """An expression as an element of a rule: NFTA_LIST_ELEM (1) of NFTA_EXPR_NAME (1) and _DATA."""
    return field(0x8001, field(1, name + b"\0") + field(0x8002, data))


class MessageTests(SynchronousTestCase):
    def test_batch(self) -> None:
        """A batch has a begin and an end, for the subsystem 10 of nfnetlink."""
        inner = Message(0x0A00, 0x405, b"body")
        begin, middle, end = nft.batch([inner])
        self.assertEqual(begin, Message(0x10, 1, b"\0\0\x00\x0a"))
        self.assertIs(middle, inner)
        self.assertEqual(end, Message(0x11, 1, b"\0\0\x00\x0a"))

    def test_new_table(self) -> None:
        """NFT_MSG_NEWTABLE: name, flags; it must not be there."""
        body = INET + field(1, b"mine\0") + field(2, b"\0\0\0\x02")
        self.assertEqual(nft.new_table("mine", nft.OWNER), Message(0x0A00, MAKE | 0x200, body))

    def test_delete_table(self) -> None:
        """NFT_MSG_DELTABLE: name."""
        self.assertEqual(
            nft.delete_table("mine"), Message(0x0A02, DELETE, INET + field(1, b"mine\0"))
        )

    def test_which_table(self) -> None:
        """NFT_MSG_GETTABLE: name."""
        self.assertEqual(nft.GET_TABLE, 0x0A01)
        self.assertEqual(nft.which_table("mine"), INET + field(1, b"mine\0"))

    def test_new_chain(self) -> None:
        """NFT_MSG_NEWCHAIN: table, name, hook and priority, type."""
        hook = field(1, b"\0\0\0\0") + field(2, b"\xff\xff\xff\x9b")
        body = field(1, b"mine\0") + field(3, b"c\0") + field(0x8004, hook) + field(7, b"nat\0")
        self.assertEqual(
            nft.new_chain("mine", "c", "nat", nft.BEFORE_DSTNAT),
            Message(0x0A03, MAKE, INET + body),
        )

    def test_new_rule(self) -> None:
        """NFT_MSG_NEWRULE: table, chain, expressions; at the end of the chain."""
        body = field(1, b"mine\0") + field(2, b"c\0") + field(0x8004, b"onetwo!!")
        self.assertEqual(
            nft.new_rule("mine", "c", b"one", b"two!!"),
            Message(0x0A06, MAKE | 0x800, INET + body),
        )

    def test_expression_at(self) -> None:
        """The expression that begins at an offset of a rule's message has a name."""
        first, second = nft.meta(nft.NFPROTO), nft.fib_type_of_destination()
        rule = nft.new_rule("mine", "c", first, second)
        begin = rule.body.index(first)
        self.assertEqual(nft.expression_at(rule, begin), "meta")
        self.assertEqual(nft.expression_at(rule, begin + len(first)), "fib")


class ExpressionTests(SynchronousTestCase):
    def number(self, kind: int, value: int) -> bytes:
        return field(kind, value.to_bytes(4, "big"))

    def data(self, kind: int, value: bytes) -> bytes:
        return field(kind | 0x8000, field(1, value))

    def test_meta(self) -> None:
        """NFTA_META: DREG, KEY."""
        expected = listed(b"meta", self.number(1, 1) + self.number(2, 8))
        self.assertEqual(nft.meta(nft.IIFTYPE), expected)

    def test_payload(self) -> None:
        """NFTA_PAYLOAD: DREG, BASE (2: transport header), OFFSET, LEN."""
        numbers = [self.number(*pair) for pair in ((1, 1), (2, 2), (3, 13), (4, 1))]
        self.assertEqual(nft.payload(13, 1), listed(b"payload", b"".join(numbers)))

    def test_fib(self) -> None:
        """NFTA_FIB: DREG, RESULT (3: type of address), FLAGS (2: destination)."""
        numbers = [self.number(*pair) for pair in ((1, 1), (2, 3), (3, 2))]
        self.assertEqual(nft.fib_type_of_destination(), listed(b"fib", b"".join(numbers)))

    def test_mask(self) -> None:
        """NFTA_BITWISE: SREG, DREG, LEN, MASK, XOR."""
        numbers = [self.number(*pair) for pair in ((1, 1), (2, 1), (3, 1))]
        data = self.data(4, b"\x17") + self.data(5, b"\0")
        self.assertEqual(nft.mask(b"\x17"), listed(b"bitwise", b"".join(numbers) + data))

    def test_compare(self) -> None:
        """NFTA_CMP: SREG, OP (0: equal, 1: not), DATA."""
        for how, number in ((nft.EQUAL, 0), (nft.UNEQUAL, 1)):
            body = self.number(1, 1) + self.number(2, number) + self.data(3, b"\x01\xbb")
            self.assertEqual(nft.compare(b"\x01\xbb", how), listed(b"cmp", body))

    def test_load(self) -> None:
        """NFTA_IMMEDIATE: DREG, DATA."""
        body = self.number(1, 2) + self.data(2, b"\x53\xc3")
        self.assertEqual(nft.load(2, b"\x53\xc3"), listed(b"immediate", body))

    def test_tproxy(self) -> None:
        """NFTA_TPROXY: FAMILY, REG_ADDR, REG_PORT."""
        numbers = [self.number(*pair) for pair in ((1, 10), (2, 1), (3, 2))]
        made = nft.tproxy(socket.AF_INET6, address=1, port=2)
        self.assertEqual(made, listed(b"tproxy", b"".join(numbers)))

    def test_dnat(self) -> None:
        """NFTA_NAT: TYPE (1: destination), FAMILY, REG_PROTO_MIN."""
        numbers = [self.number(*pair) for pair in ((1, 1), (2, 2), (5, 1))]
        made = nft.dnat_to_port(socket.AF_INET, port=1)
        self.assertEqual(made, listed(b"nat", b"".join(numbers)))

    def test_byte_by_byte(self) -> None:
        """The bytes of the message, on a little-endian machine."""
        if sys.byteorder == "little":
            self.assertEqual(
                nft.meta(nft.L4PROTO).hex(" ", 4),
                "24000180 09000100 6d657461 00000000 14000280 08000100 00000001 08000200 00000010",
            )
