"""The few parts of bpf(2) that steering needs, by direct system calls: no compiler, no library.

L{Assembler} writes programs as instructions with names; the functions after it load and attach
them. The numbers are those of C{linux/bpf.h}.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

_SYSTEM_CALLS: Final = {"x86_64": 321, "aarch64": 280}
"""The number of the system call bpf(2), by machine."""

_MAP_CREATE: Final = 0
_MAP_UPDATE_ELEM: Final = 2
_MAP_DELETE_ELEM: Final = 3
_PROG_LOAD: Final = 5
_PROG_QUERY: Final = 16
_LINK_CREATE: Final = 28

_MAP_TYPE_HASH: Final = 1
_MAP_TYPE_SOCKMAP: Final = 15
_PROG_TYPE_SK_LOOKUP: Final = 30
_ATTACH_TYPE_SK_LOOKUP: Final = 36
_ATTRIBUTE_BYTES: Final = 128
_LOG_BYTES: Final = 65_536

_MEMLOCK_BYTES: Final = 1 << 20

_SO_ATTACH_FILTER: Final = 26

Label = str
Instruction = tuple[int, int, int, int | Label, int]


class Assembler:
    """Collects instructions, one for each call, and computes the jumps.

    A register is its number, 0 to 10 (bpf instruction set, RFC 9669 section 2.1): r1 holds the
    context at the start, r1 to r5 hold a call's arguments and are lost in it, r0 is the result, r10
    the end of the stack frame.
    """

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []
        self._labels: dict[Label, int] = {}

    def move(self, to: int, source: int) -> None:
        """to = source"""
        self._add(0xBF, to, source)

    def move_number(self, to: int, number: int) -> None:
        """to = number"""
        self._add(0xB7, to, immediate=number)

    def add_number(self, to: int, number: int) -> None:
        """to += number"""
        self._add(0x07, to, immediate=number)

    def and_number(self, to: int, number: int) -> None:
        """to &= number"""
        self._add(0x57, to, immediate=number)

    def load_word(self, to: int, base: int, offset: int) -> None:
        """to = the 32 bits at base + offset"""
        self._add(0x61, to, base, offset)

    def store_word(self, base: int, offset: int, source: int) -> None:
        """the 32 bits at base + offset = source"""
        self._add(0x63, base, source, offset)

    def store_number(self, base: int, offset: int, number: int) -> None:
        """the 32 bits at base + offset = number"""
        self._add(0x62, base, 0, offset, number)

    def load_map(self, to: int, map_descriptor: int) -> None:
        """to = the map of the descriptor; takes two instructions"""
        self._add(0x18, to, 1, immediate=map_descriptor)
        self._add(0x00)

    def jump_if_number(self, register: int, number: int, to: Label) -> None:
        """if register == number go to the label"""
        self._add(0x15, register, 0, to, number)

    def jump_unless_number(self, register: int, number: int, to: Label) -> None:
        """if register != number go to the label"""
        self._add(0x55, register, 0, to, number)

    def jump_unless_equal(self, one: int, other: int, to: Label) -> None:
        """if one != other go to the label"""
        self._add(0x5D, one, other, to)

    def jump(self, to: Label) -> None:
        """go to the label"""
        self._add(0x05, offset=to)

    def call(self, helper: int) -> None:
        """r0 = the result of a helper of bpf-helpers(7), by its number"""
        self._add(0x85, immediate=helper)

    def exit(self) -> None:
        """end the program; r0 is its verdict"""
        self._add(0x95)

    def label(self, name: Label) -> None:
        """Jumps to this label go to the next instruction."""
        self._labels[name] = len(self._instructions)

    def code(self) -> bytes:
        """The program."""
        return b"".join(
            struct.pack("=BBhi", opcode, to | source << 4, self._distance(at, offset), immediate)
            for at, (opcode, to, source, offset, immediate) in enumerate(self._instructions)
        )

    def _add(
        self,
        opcode: int,
        to: int = 0,
        source: int = 0,
        offset: int | Label = 0,
        immediate: int = 0,
    ) -> None:
        self._instructions.append((opcode, to, source, offset, immediate))

    def _distance(self, at: int, offset: int | Label) -> int:
        """The jump's distance, counted from the instruction after the jump."""
        return offset if isinstance(offset, int) else self._labels[offset] - at - 1


class Refused(OSError):
    """The kernel refuses a program.

    @ivar reason: the last lines of the verifier's log; empty if it has not written any.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, os.strerror(number))
        self.reason = reason


def _bpf(command: int, attributes: bytes) -> int:
    """Call bpf(2); returns a descriptor or 0; raises L{OSError}, ENOSYS on an unknown machine."""
    return _call(command, ctypes.create_string_buffer(attributes, _ATTRIBUTE_BYTES))


def _call(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    number = ctypes.c_long(_SYSTEM_CALLS.get(platform.machine(), -1))
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(number, command, attributes, len(attributes))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def allow_locked_memory() -> None:
    """Raise the limit on locked memory: before Linux 5.11, maps and programs count as such."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and soft < _MEMLOCK_BYTES:
        wanted = _MEMLOCK_BYTES
        enough = hard == resource.RLIM_INFINITY or hard >= wanted
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (wanted, hard if enough else wanted))
        except (OSError, ValueError):
            pass  # if the limit matters, the next call to the kernel fails


def make_socket_map(slots: int) -> int:
    """A map of listening sockets (BPF_MAP_TYPE_SOCKMAP), from a 32-bit slot number."""
    return _bpf(_MAP_CREATE, struct.pack("=IIII", _MAP_TYPE_SOCKMAP, 4, 8, slots))


def make_set(key_bytes: int, size: int) -> int:
    """A set of keys (BPF_MAP_TYPE_HASH, with values that are not used)."""
    return _bpf(_MAP_CREATE, struct.pack("=IIII", _MAP_TYPE_HASH, key_bytes, 4, size))


def add_key(set_descriptor: int, key: bytes) -> None:
    """Put a key into a set."""
    _update(set_descriptor, key, bytes(4))


def remove_key(set_descriptor: int, key: bytes) -> None:
    """Remove a key from a set; raises C{OSError}, C{ENOENT} if it is not in the set."""
    buffer = ctypes.create_string_buffer(key, len(key))
    attributes = struct.pack("=IIQQQ", set_descriptor, 0, ctypes.addressof(buffer), 0, 0)
    _bpf(_MAP_DELETE_ELEM, attributes)


def put_socket(map_descriptor: int, slot: int, socket_descriptor: int) -> None:
    """Put a listening socket into a slot; the kernel removes it when it is closed."""
    _update(map_descriptor, struct.pack("=I", slot), struct.pack("=Q", socket_descriptor))


def _update(map_descriptor: int, key: bytes, value: bytes) -> None:
    buffers = [ctypes.create_string_buffer(each, len(each)) for each in (key, value)]
    pointers = [ctypes.addressof(buffer) for buffer in buffers]
    _bpf(_MAP_UPDATE_ELEM, struct.pack("=IIQQQ", map_descriptor, 0, *pointers, 0))


def load_sk_lookup(code: bytes, name: str) -> int:
    """Load a program of type BPF_PROG_TYPE_SK_LOOKUP (Linux 5.9); raises L{Refused}."""
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(_LOG_BYTES)
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        _PROG_TYPE_SK_LOOKUP,
        len(code) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(licence),
        1,  # level of detail of the verifier's log
        len(log),
        ctypes.addressof(log),
        0,  # kernel version: not used for this type
        0,  # flags
        name.encode(),
        0,  # network device: none
        _ATTACH_TYPE_SK_LOOKUP,
    )
    try:
        return _bpf(_PROG_LOAD, attributes)
    except OSError as problem:
        lines = log.value.decode("utf-8", "backslashreplace").split("\n")
        told = [line for line in lines if line and not line.startswith("processed ")]
        raise Refused(problem.errno or 0, "; ".join(told[-2:])) from None


@contextmanager
def _this_network_namespace() -> Iterator[int]:
    descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def attach_sk_lookup(program: int) -> int:
    """Attach to this network namespace.

    @return: the link's descriptor: the program is attached until this is closed. The end of the
        process closes it, however the process ends.
    """
    with _this_network_namespace() as namespace:
        attributes = struct.pack("=IIII", program, namespace, _ATTACH_TYPE_SK_LOOKUP, 0)
        return _bpf(_LINK_CREATE, attributes)


def count_sk_lookup() -> int:
    """The number of programs attached to this network namespace."""
    with _this_network_namespace() as namespace:
        question = struct.pack("=II", namespace, _ATTACH_TYPE_SK_LOOKUP)
        attributes = ctypes.create_string_buffer(question, _ATTRIBUTE_BYTES)
        _call(_PROG_QUERY, attributes)
    count: int = struct.unpack_from("=I", attributes, 24)[0]
    return count


def attach_filter(receiver: socket.socket, program: Sequence[tuple[int, int, int, int]]) -> None:
    """Let a socket receive only what a program of classic BPF accepts (socket(7)).

    @param program: code, jump if true, jump if false and operand of each instruction
        (C{linux/filter.h}); the program returns how many bytes of the packet to keep.
    """
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    what = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    receiver.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, what)
