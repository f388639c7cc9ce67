"""ClientHello parsing without I/O: bytes in, a verdict out.

The first flight of a TLS connection is a handshake message of type ClientHello (RFC 8446 section
4.1.2), in one or more records (section 5.1). L{ClientHelloParser} takes it in pieces of any size
and returns a verdict as soon as the bytes allow one; it reads no byte twice.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

MAX_MESSAGE: Final = 65_536
"""Bytes of handshake message accepted: the limit of Go's crypto/tls. Of the usual web servers' TLS
libraries that accept all real hellos (the largest seen has 36 KB), none has a lower one."""

MAX_RECORDS: Final = 2_048
"""Records accepted, so that a hello in many small ones costs little time. Real hellos have a few;
clients that put each byte in a record of its own, to hide the server name, have about 1,800. With
L{MAX_MESSAGE} this also limits the bytes on the wire: each record adds a header of five."""

MAX_SERVER_NAME: Final = 255
"""Bytes of a server name that are kept, since the log and C{status} show it: no name is longer (RFC
1035 section 2.3.4)."""

MAX_RECORD: Final = 16_384
"""Bytes of a record's fragment (RFC 8446 section 5.1: at most 2^14)."""

NOT_TLS: Final = "not_tls"

_HANDSHAKE: Final = 0x16
_RECORD_HEADER: Final = 5
_CLIENT_HELLO: Final = 0x01
_MESSAGE_HEADER: Final = 4
_BOTH_HEADERS: Final = _RECORD_HEADER + _MESSAGE_HEADER
_SERVER_NAME: Final = 0
_HOST_NAME: Final = 0
_both_headers: Final = struct.Struct("!BBxHBBH").unpack_from
"""Header of a record (content type, version, length) and of a message (type, length in 8 + 16
bits)."""

_number: Final = struct.Struct("!H").unpack_from
_extension_header: Final = struct.Struct("!HH").unpack_from
_CUT_SHORT: Final = (IndexError, struct.error)
_ALPN: Final = 16


@dataclass(frozen=True, slots=True)
class NeedMore:
    """The bytes so far are the beginning of a ClientHello, or no bytes have come yet."""


class ClientHello(NamedTuple):
    """A whole ClientHello.

    @ivar alpn: the protocol names offered, in order (RFC 7301 section 3.1); empty without the
        extension.
    @ivar server_name: the host name that the peer asks for (RFC 6066 section 3), or L{None}. The
        peer may send any bytes; those that are not printable ASCII are backslash-escaped, and those
        after L{MAX_SERVER_NAME} bytes are left out.
    """

    alpn: tuple[bytes, ...] = ()
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class OtherClientHello:
    """A whole ClientHello message without the ALPN name that the parser looks for.

    Its bytes contain that name nowhere, so the rest is not parsed.
    """


@dataclass(frozen=True, slots=True)
class NotClientHello:
    """The bytes are not, and cannot become, a ClientHello that this parser takes.

    @ivar reason: what is wrong, with the name of the field, for a log line.
    @ivar kind: a word for the statistics; the parser itself uses only L{NOT_TLS}.
    """

    reason: str
    kind: str = NOT_TLS


Verdict: TypeAlias = NeedMore | ClientHello | OtherClientHello | NotClientHello

NEED_MORE: Final = NeedMore()
OTHER: Final = OtherClientHello()


_SMALL: Final = 32
"""The largest number of fragment bytes in a record that counts as small."""


def _each_small(record: str) -> str:
    """A pattern with one alternative for each size, made from the format C{record}."""
    return "|".join(record.format(size=size) for size in range(1, _SMALL + 1))


# A stranger's hello may have thousands of records. A regular expression matches many small ones at
# once: that takes a tenth of a microsecond per record, a loop several times that. A header is the
# type, the version 3.x, and the length, whose first byte is 0 here. The expression stops after the
# largest number of records that is accepted.
_small_records: Final = re.compile(
    rb"(?s:\x16\x03.\0(?:%b)){1,%d}+"
    % (_each_small(r"\x{size:02x}.{{{size}}}").encode(), MAX_RECORDS)
).match
_their_fragments: Final = re.compile(
    rb"(?s)\x16\x03.\0.(%b)" % _each_small(r"(?<=\x{size:02x}).{{{size}}}").encode()
).findall


class _Malformed(Exception):
    """A length field points outside its structure, or a value is not allowed."""


# No length field is trusted. Reading past the end raises, and the caller turns that into a verdict;
# each parser also checks that it stopped exactly at the end.


def _list_end(content: bytes, field: str) -> int:
    """The position where a list ends, which must be the end of its extension."""
    end = len(content)
    if _number(content, 0)[0] != end - 2:
        raise _Malformed(f"{field} does not fill its extension")
    return end


def _parse_alpn(content: bytes) -> tuple[bytes, ...]:
    """ProtocolNameList of RFC 7301 section 3.1: one or more names, none of them empty."""
    at, end = 2, _list_end(content, "ALPN list")
    names = []
    while at < end:
        start = at + 1
        at = start + content[at]
        names.append(content[start:at])
    if at != end:
        raise _Malformed("ALPN name is cut short")
    if not names or b"" in names:
        raise _Malformed("ALPN list or name is empty")
    return tuple(names)


def _parse_server_name(content: bytes) -> str | None:
    """ServerNameList of RFC 6066 section 3: its host name; no other type is defined."""
    at, end = 2, _list_end(content, "server name list")
    host = None
    while at < end:
        start = at + 3
        kind, at = content[at], start + _number(content, at + 1)[0]
        if kind == _HOST_NAME and host is None:
            name = content[start : min(at, start + MAX_SERVER_NAME)]
            host = ascii(name.decode("latin-1"))[1:-1]
    if at != end:
        raise _Malformed("server name is cut short")
    return host


def _parse_body(hello: bytes) -> ClientHello:
    """The ClientHello structure of RFC 8446 section 4.1.2.

    Raises L{_Malformed}, or one of C{_CUT_SHORT}.
    """
    end = len(hello)
    at = 2 + 32  # legacy version and random
    if hello[at] > 32:
        raise _Malformed("session id is over 32 bytes")
    at += 1 + hello[at]
    (cipher_suites,) = _number(hello, at)
    if cipher_suites % 2:
        raise _Malformed("cipher suites have an odd length")
    at += 2 + cipher_suites
    at += 1 + hello[at]  # compression methods
    if at == end:  # a hello without extensions may end here (RFC 5246 section 7.4.1.2)
        return ClientHello()
    if _number(hello, at)[0] != end - at - 2:
        raise _Malformed("extensions do not fill the hello")
    at += 2
    alpn: tuple[bytes, ...] = ()
    server_name = None
    kinds = []
    while at < end:
        kind, length = _extension_header(hello, at)
        at += 4 + length
        kinds.append(kind)
        if kind == _ALPN:
            alpn = _parse_alpn(hello[at - length : at])
        elif kind == _SERVER_NAME:
            server_name = _parse_server_name(hello[at - length : at])
    if at != end:
        raise _Malformed("extension is cut short")
    if len(set(kinds)) != len(kinds):
        raise _Malformed("an extension comes twice")
    return ClientHello(alpn, server_name)


def _body_in_one_record(wire: bytes) -> bytes | None:
    """The body of a hello that has arrived whole and in one record, as nearly all hellos do."""
    if len(wire) < _BOTH_HEADERS:
        return None
    content, version, record, message, high, low = _both_headers(wire)
    length = high << 16 | low
    end = _BOTH_HEADERS + length
    if (
        content == _HANDSHAKE
        and version == 3
        and message == _CLIENT_HELLO
        and _MESSAGE_HEADER + length <= record <= MAX_RECORD
        and end <= len(wire)
    ):
        return wire[_BOTH_HEADERS:end]
    return None


class ClientHelloParser:
    """Takes the first bytes of a connection, in pieces, until there is a verdict.

    The verdict depends only on the bytes, not on how they were split, and it never changes later. A
    hello is parsed in full only if its bytes contain the name that is looked for: visitors come in
    thousands, and a full parse takes ten times as long as a search.

    @ivar received: all bytes fed so far, unchanged, to be sent to the target. Bytes after the hello
        are kept but not read.
    """

    __slots__ = ("_at", "_in_record", "_message", "_name", "_records", "received", "verdict")

    def __init__(self, name: bytes = b"") -> None:
        """
        @param name: the ALPN name to look for; if empty, every hello is parsed in full.
        """
        self._name = name
        self.received: bytes | bytearray = b""
        self.verdict: Verdict = NEED_MORE
        self._at = 0
        self._in_record = 0
        self._records = 0
        self._message: bytes | bytearray = b""

    def feed(self, data: bytes) -> Verdict:
        """Add C{data} and return the verdict so far. Never raises, whatever the bytes."""
        if not self.received:
            self.received = data
            hello = _body_in_one_record(data)
            if hello is not None:
                self.verdict = self._judge_body(hello)
                return self.verdict
            self.received, self._message = bytearray(data), bytearray()
        else:
            self.received += data
        if self.verdict is NEED_MORE:
            self.verdict = self._advance()
        return self.verdict

    def _advance(self) -> Verdict:
        problem = self._read_records()
        # The records before the faulty one may hold a whole message; then the message decides.
        verdict = self._judge_message()
        return verdict if problem is None or verdict is not NEED_MORE else problem

    def _read_records(self) -> NotClientHello | None:
        """Add the contents of the records to the message; returns what is wrong."""
        wire, end = self.received, len(self.received)
        while self._at < end:
            if not self._in_record:
                room = MAX_RECORDS - self._records
                run = _small_records(wire, self._at)
                fragments = _their_fragments(wire, self._at, run.end()) if run else []
                self._message += b"".join(fragments[:room])
                if not room or len(fragments) > room:
                    return NotClientHello(f"no whole message in {MAX_RECORDS} records")
                if run:
                    self._at = run.end()
                    self._records += len(fragments)
                    continue
                if wire[self._at] != _HANDSHAKE:
                    return NotClientHello("not a handshake record")
                if self._at + 1 < end and wire[self._at + 1] != 3:
                    return NotClientHello("record version is not 3.x")
                start = self._at + _RECORD_HEADER
                if start > end:
                    break
                length = int.from_bytes(wire[start - 2 : start], "big")
                if not 0 < length <= MAX_RECORD:
                    return NotClientHello(f"record length is {length}")
                self._at, self._in_record = start, length
                self._records += 1
            taken = wire[self._at : min(self._at + self._in_record, end)]
            self._message += taken
            self._at += len(taken)
            self._in_record -= len(taken)
        return None

    def _judge_message(self) -> Verdict:
        message = self._message
        if message and message[0] != _CLIENT_HELLO:
            return NotClientHello(f"handshake message type is {message[0]}")
        if len(message) < _MESSAGE_HEADER:
            return NEED_MORE
        length = int.from_bytes(message[1:_MESSAGE_HEADER], "big")
        if length > MAX_MESSAGE:
            return NotClientHello(f"message length is {length}")
        end = _MESSAGE_HEADER + length
        if len(message) < end:
            return NEED_MORE
        self._message = b""
        return self._judge_body(bytes(message[_MESSAGE_HEADER:end]))

    def _judge_body(self, hello: bytes) -> Verdict:
        if self._name not in hello:
            return OTHER
        try:
            return _parse_body(hello)
        except _Malformed as problem:
            return NotClientHello(str(problem))
        except _CUT_SHORT:
            return NotClientHello("a length points behind the end")
