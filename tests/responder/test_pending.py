"""The pending identifiers, and for how long they are pending."""

from __future__ import annotations

import base64
import hashlib

import pytest
from twisted.internet.task import Clock

from acme_alpn_proxy.monitoring.status import PENDING_SHOWN
from acme_alpn_proxy.responder.pending import (
    BadRequest,
    Pending,
    parse_digest,
    parse_lifetime,
)

DIGEST = hashlib.sha256(b"key authorization").digest()


def test_lifetimes() -> None:
    """Each is pending for its own time, which starts again when it is asked for again; when the
    last one has gone, that is reported once."""
    clock = Clock()
    emptied: list[float] = []
    pending = Pending(clock)
    pending.on_empty = lambda: emptied.append(clock.seconds())
    pending.add("a.example", DIGEST, "a client", 10)
    pending.add("b.example", DIGEST, "a client", 20)
    clock.advance(9)
    again = pending.add("a.example", DIGEST, "another client", 10)
    clock.advance(9)
    assert pending.get("a.example") is again
    clock.advance(1)
    assert pending.get("a.example") is None
    assert len(pending) == 1
    clock.advance(1)
    assert emptied == [20]
    assert clock.getDelayedCalls() == []


def test_ended() -> None:
    """An identifier that was ended is not pending, and it is no error to end it again."""
    clock = Clock()
    pending = Pending(clock)
    pending.add("a.example", DIGEST, "a client")
    pending.remove("a.example")
    pending.remove("a.example")
    assert pending.get("a.example") is pending.get(None) is None
    assert clock.getDelayedCalls() == []


def test_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a limit; an identifier that is already pending may be asked for again."""
    monkeypatch.setattr("acme_alpn_proxy.responder.pending.MOST_PENDING", 100)
    pending = Pending(Clock())
    for number in range(100):
        pending.add(f"{number}.example", DIGEST, "a client")
    with pytest.raises(BadRequest, match="100"):
        pending.add("one.more.example", DIGEST, "a client")
    pending.add("0.example", DIGEST, "a client")
    status = pending.status()
    assert status["pending_count"] == 100
    assert len(status["pending"]) == PENDING_SHOWN


@pytest.mark.parametrize(
    "text",
    [
        base64.urlsafe_b64encode(DIGEST).decode(),
        base64.urlsafe_b64encode(DIGEST).decode().rstrip("="),
        DIGEST.hex(),
        DIGEST.hex().upper(),
        DIGEST.hex(":"),
    ],
)
def test_digest(text: str) -> None:
    """A digest may be written as each client writes it."""
    assert parse_digest(text) == DIGEST


@pytest.mark.parametrize(
    "text",
    ["", "x", DIGEST.hex()[:-2], f"{DIGEST.hex()}00", "=" * 43, "+" * 42, "é" * 43, "A" * 44],
)
def test_no_digest(text: str) -> None:
    """A digest that is not 32 bytes is refused."""
    with pytest.raises(BadRequest, match="SHA-256"):
        parse_digest(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "86401", "soon", ""])
def test_no_lifetime(text: str) -> None:
    """A lifetime is at most a day."""
    with pytest.raises(BadRequest, match="lifetime"):
        parse_lifetime(text)
