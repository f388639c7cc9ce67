"""Several messages in one packet, and the kernel's answers."""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from acme_alpn_proxy.host import netlink
from acme_alpn_proxy.host.netlink import ACKNOWLEDGE, REQUEST, Message, Netlink, Refused, attribute

BEGIN = Message(0x10, REQUEST, b"\0\0\0\x0a")
ONE = Message(0x0A00, REQUEST | ACKNOWLEDGE, b"one")
TWO = Message(0x0A01, REQUEST | ACKNOWLEDGE, b"two!")


def answer(number: int, code: int, *more: bytes) -> bytes:
    """NLMSG_ERROR for the message with this number."""
    header = struct.pack("=IHHII", 16, 0, 0, number, 0)
    body = struct.pack("=i", -code) + header + b"".join(more)
    return struct.pack("=IHHII", 16 + len(body), 2, 0x300, number, 0) + body


class SendTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.answers: list[bytes] = []
        self.packets: list[bytes] = []
        self.closed = 0
        case = self

        class Kernel:
            def __init__(self, *arguments: int) -> None:
                pass

            def settimeout(self, seconds: float) -> None:
                pass

            def setsockopt(self, *option: int) -> None:
                raise OSError(errno.ENOPROTOOPT, "an old kernel")

            def send(self, packet: bytes) -> None:
                case.packets.append(packet)

            def recv(self, size: int) -> bytes:
                if not case.answers:
                    raise TimeoutError
                return case.answers.pop(0)

            def close(self) -> None:
                case.closed += 1

        self.patch(socket, "socket", Kernel)
        self.kernel = Netlink(netlink.NETFILTER)

    def refused(self, *messages: Message) -> Any:
        with self.assertRaises(Refused) as caught:
            self.kernel.send(messages)
        return caught.exception

    def test_one_packet(self) -> None:
        """All messages go in one packet, each padded and with a number of its own."""
        self.answers = [answer(2, 0) + answer(3, 0)]
        self.kernel.send([BEGIN, ONE, TWO])
        (packet,) = self.packets
        expected = struct.pack("=IHHII", 20, 0x10, 1, 1, 0) + b"\0\0\0\x0a"
        expected += struct.pack("=IHHII", 19, 0x0A00, 5, 2, 0) + b"one\0"
        expected += struct.pack("=IHHII", 20, 0x0A01, 5, 3, 0) + b"two!"
        self.assertEqual(packet, expected)

    def test_again(self) -> None:
        """Sequence numbers grow, so a late answer to an earlier message is ignored."""
        self.answers = [answer(1, 0)]
        self.kernel.send([ONE])
        self.answers = [answer(1, errno.EPERM), answer(2, 0)]
        self.kernel.send([TWO])
        self.assertEqual(self.answers, [])

    def test_refused(self) -> None:
        """The message that is refused is named, and where in it the wrong attribute begins."""
        offset = attribute(2, struct.pack("=I", 16 + 8))
        self.answers = [answer(2, 0), answer(3, errno.ENOENT, offset)]
        problem = self.refused(BEGIN, ONE, TWO)
        self.assertEqual((problem.errno, problem.message, problem.offset), (errno.ENOENT, TWO, 8))

    def test_refused_as_a_whole(self) -> None:
        """A message that asks for no answer may be refused, too; then none is waited for."""
        self.answers = [answer(1, errno.EPERM)]
        problem = self.refused(BEGIN, ONE)
        self.assertEqual((problem.errno, problem.message), (errno.EPERM, BEGIN))
        self.assertIsNone(problem.offset)

    def test_no_answer(self) -> None:
        """An answer that does not come is an error."""
        self.answers = [answer(2, 0)]
        with self.assertRaises(OSError):
            self.kernel.send([BEGIN, ONE, TWO])

    def test_close(self) -> None:
        """It is closed explicitly, or at the end of a block."""
        self.kernel.close()
        with self.kernel:
            pass
        self.assertEqual(self.closed, 2)


class KernelTests(SynchronousTestCase):
    """The answers of this kernel; needs root."""

    def test_unknown(self) -> None:
        """An unknown message is refused, and the socket can still be used."""
        with Netlink(netlink.ROUTE) as kernel:
            for _ in range(2):
                with self.assertRaises(Refused) as caught:
                    kernel.send([Message(0xFFFF, REQUEST | ACKNOWLEDGE, bytes(16))])
                self.assertEqual(caught.exception.errno, errno.EOPNOTSUPP)
            self.assertTrue(list(kernel.dump(18, struct.pack("=B15x", socket.AF_UNSPEC))))

    def test_packets(self) -> None:
        """A dump in packets has each answer of the dump, and ends with it; a refusal raises."""
        question = struct.pack("=B15x", socket.AF_UNSPEC)
        with Netlink(netlink.ROUTE) as kernel:
            answers = list(kernel.dump(18, question))
            packets = b"".join(kernel.dump_packets(18, question))
            self.assertTrue(answers)
            self.assertTrue(all(answer in packets for answer in answers))
            with self.assertRaises(OSError) as caught:
                list(kernel.dump_packets(0xFFFF, question))
            self.assertEqual(caught.exception.errno, errno.EOPNOTSUPP)
