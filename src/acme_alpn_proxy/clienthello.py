"""ClientHello parsing without I/O: bytes in, a verdict out.

The first flight of a TLS connection is a handshake message of type ClientHello (RFC 8446 section
4.1.2), carried by one or more records (section 5.1). L{ClientHelloParser} takes it in pieces of any
size and says, as soon as it can be said, what it is. Each byte is looked at once.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

MAX_MESSAGE: Final = 65_536
"""Bytes of handshake message accepted: what Go's crypto/tls takes, the strictest of the usual web
servers' libraries that real hellos (36 KB seen) still fit into."""

MAX_WIRE: Final = 131_072
"""Bytes accepted on the wire. Records may be one byte long, so headers can outweigh the message;
this leaves room for a largest message in records of six bytes and more."""

MAX_RECORD: Final = 16_384
"""Bytes of a record's fragment (RFC 8446 section 5.1: at most 2^14)."""

_HANDSHAKE: Final = 0x16
_RECORD_HEADER: Final = 5
_CLIENT_HELLO: Final = 0x01
_MESSAGE_HEADER: Final = 4
_SERVER_NAME: Final = 0
_HOST_NAME: Final = 0
_EXTENSION_HEADER: Final = struct.Struct("!HH")
_ALPN: Final = 16


@dataclass(frozen=True, slots=True)
class NeedMore:
    """The bytes so far begin a ClientHello, or nothing has come yet."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """A whole ClientHello.

    @ivar alpn: the protocol names offered, in order (RFC 7301 section 3.1); empty without the
        extension.
    @ivar server_name: the host name asked for (RFC 6066 section 3), or L{None}. It is the peer's
        word and may hold any byte; what is not printable ASCII is backslash-escaped.
    """

    alpn: tuple[bytes, ...] = ()
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class NotClientHello:
    """The bytes are not, and cannot become, a ClientHello that this parser takes.

    @ivar reason: which field says so, for a log line.
    @ivar kind: one of L{KINDS}.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("not_tls", "deadline", "end_of_file", "crowded")

    reason: str
    kind: str = "not_tls"


Verdict: TypeAlias = NeedMore | ClientHello | NotClientHello

NEED_MORE: Final = NeedMore()


class _Malformed(Exception):
    """A length field points outside what holds it, or a value is not allowed."""


class _Reader:
    """Reads vectors off a buffer; the only place where a length from the peer is believed."""

    __slots__ = ("_at", "_data", "_end")

    def __init__(self, data: bytes | bytearray, start: int, end: int) -> None:
        self._data = data
        self._at = start
        self._end = end

    def __bool__(self) -> bool:
        return self._at < self._end

    def skip(self, count: int, field: str) -> None:
        """Pass over the next C{count} bytes; raises L{_Malformed} if there are fewer."""
        self._at += count
        if self._at > self._end:
            raise _Malformed(f"{field} is cut short")

    def number(self, width: int, field: str) -> int:
        """The next C{width} bytes as an unsigned big-endian number."""
        start = self._at
        self._at = end = start + width
        if end > self._end:
            raise _Malformed(f"{field} is cut short")
        return int.from_bytes(self._data[start:end], "big")

    def skip_vector(self, width: int, field: str) -> int:
        """Pass over a vector whose length is the next C{width} bytes (RFC 8446 section 3.4).

        @return: that length.
        """
        length = self.number(width, field)
        self._at += length
        if self._at > self._end:
            raise _Malformed(f"{field} is cut short")
        return length

    def skip_extension(self) -> tuple[int, int]:
        """Pass over an extension (RFC 8446 section 4.2).

        @return: its type and the length of its content.
        """
        start = self._at + _EXTENSION_HEADER.size
        if start > self._end:
            raise _Malformed("extension is cut short")
        kind, length = _EXTENSION_HEADER.unpack_from(self._data, self._at)
        self._at = start + length
        if self._at > self._end:
            raise _Malformed("extension is cut short")
        return kind, length

    def vector(self, width: int, field: str) -> _Reader:
        """A reader for such a vector's content."""
        return self.behind(self.skip_vector(width, field))

    def behind(self, length: int) -> _Reader:
        """A reader for the last C{length} bytes that were passed over."""
        return _Reader(self._data, self._at - length, self._at)

    def rest(self) -> bytes:
        """All that is left."""
        start, self._at = self._at, self._end
        return bytes(self._data[start : self._end])

    def finish(self, field: str) -> None:
        """Raises L{_Malformed} unless all has been read."""
        if self:
            raise _Malformed(f"bytes follow {field}")


def _parse_alpn(extension: _Reader) -> tuple[bytes, ...]:
    """ProtocolNameList of RFC 7301 section 3.1: one name or more, none of them empty."""
    names = extension.vector(2, "ALPN list")
    extension.finish("ALPN list")
    offered = []
    while names:
        offered.append(names.vector(1, "ALPN name").rest())
    if not all(offered) or not offered:
        raise _Malformed("ALPN list or name is empty")
    return tuple(offered)


def _parse_server_name(extension: _Reader) -> str | None:
    """ServerNameList of RFC 6066 section 3: its host name, the only type there is."""
    names = extension.vector(2, "server name list")
    extension.finish("server name list")
    host = None
    while names:
        kind = names.number(1, "server name type")
        name = names.vector(2, "server name").rest()
        if kind == _HOST_NAME and host is None:
            host = ascii(name.decode("latin-1"))[1:-1]
    return host


def _parse_body(hello: _Reader) -> ClientHello:
    """The ClientHello structure of RFC 8446 section 4.1.2; raises L{_Malformed}."""
    hello.skip(2 + 32, "legacy version and random")
    if hello.skip_vector(1, "session id") > 32:
        raise _Malformed("session id is over 32 bytes")
    if hello.skip_vector(2, "cipher suites") % 2:
        raise _Malformed("cipher suites have an odd length")
    hello.skip_vector(1, "compression methods")
    alpn: tuple[bytes, ...] = ()
    server_name = None
    if hello:  # without extensions the message ends here (RFC 5246 section 7.4.1.2)
        extensions = hello.vector(2, "extensions")
        hello.finish("extensions")
        seen = set()
        while extensions:
            kind, length = extensions.skip_extension()
            if kind in seen:
                raise _Malformed(f"extension {kind} comes twice")
            seen.add(kind)
            if kind == _ALPN:
                alpn = _parse_alpn(extensions.behind(length))
            elif kind == _SERVER_NAME:
                server_name = _parse_server_name(extensions.behind(length))
    return ClientHello(alpn, server_name)


class ClientHelloParser:
    """Takes the first bytes of a connection, in pieces, until a verdict.

    The verdict depends on the bytes alone, not on how they were cut. Once it is there it stays.

    @ivar received: all the bytes fed, to be replayed to the target; the parser changes none of
        them. Bytes after the hello are kept and not looked at.
    """

    __slots__ = ("_at", "_in_record", "_message", "received", "verdict")

    def __init__(self) -> None:
        self.received = bytearray()
        self.verdict: Verdict = NEED_MORE
        self._at = 0
        self._in_record = 0
        self._message = bytearray()

    def feed(self, data: bytes) -> Verdict:
        """Add C{data} and say what is known now. Raises nothing, whatever the bytes."""
        self.received += data
        if self.verdict is NEED_MORE:
            self.verdict = self._advance()
        return self.verdict

    def _advance(self) -> Verdict:
        wire, end = self.received, min(len(self.received), MAX_WIRE)
        while self._at < end:
            if not self._in_record:
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
            taken = wire[self._at : min(self._at + self._in_record, end)]
            self._message += taken
            self._at += len(taken)
            self._in_record -= len(taken)
            verdict = self._judge_message()
            if verdict is not NEED_MORE:
                return verdict
        if end == MAX_WIRE:
            return NotClientHello(f"no whole message in {MAX_WIRE} bytes")
        return NEED_MORE

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
        try:
            return _parse_body(_Reader(message, _MESSAGE_HEADER, end))
        except _Malformed as problem:
            return NotClientHello(str(problem))
        finally:
            self._message = bytearray()
