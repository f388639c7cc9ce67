"""What C{explain} says about an order that failed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from acme_alpn_proxy.diagnosis.explanation import (
    Seen,
    explain,
    explain_last_order,
    from_log,
    last_lines,
)
from acme_alpn_proxy.diagnosis.finding import Level
from acme_alpn_proxy.options import ConsoleOptions
from acme_alpn_proxy.proxy.statistics import NOT_ANSWERED, VALIDATION_ENDED
from acme_alpn_proxy.responder.server import REFUSED

TARGET = "127.0.0.1:31443"
NAME = "site.example"


def nobody(name: str) -> Sequence[str]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def told(*seen: Seen, names: Sequence[str] = (NAME,), look_up: object = nobody) -> list[str]:
    """The lines, except the findings of level C{OK}."""
    found = explain(names, seen, lambda name: TARGET, look_up)  # type: ignore[arg-type]
    return [str(each) for each in found if each.level is not Level.OK]


def test_nobody_came() -> None:
    """If no CA came, it says so, and shows the records of the name."""
    assert told() == [
        f"failed  {NAME}: no validation for this name arrived; check that the DNS records of the"
        " name point to this host, and that port 443 is reachable from the whole Internet",
        f"failed  {NAME}: it has no address: Name or service not known; create an A or AAAA record"
        " with the address of this host",
    ]
    lines = told(look_up=lambda name: ["127.0.0.1", "192.0.2.1", "2001:db8::1"])
    assert "its A record 192.0.2.1 is no address of this host" in lines[1]
    assert "its AAAA record 2001:db8::1 is no address of this host, and a CA tries" in lines[2]
    assert len(lines) == 3
    assert told(names=())[0].startswith("failed  validations: no validation reached this host")


def test_another_name() -> None:
    """If a CA came for another name, it says so, with that name."""
    lines = told(Seen("192.0.2.7:1", "other.example", "answered"))
    assert f"failed  {NAME}: no validation for this name arrived, but for other.example" in lines[0]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (REFUSED, "registered this name with the proxy, and no program listens at 127.0.0.1:31443"),
        ("unreachable: refused", "127.0.0.1:31443 cannot be reached (refused); start the ACME"),
        (NOT_ANSWERED, "closed them without an answer; see the log of the ACME client"),
        ("under way", "under way: 2 validations; run this again"),
        (
            "the handshake failed: tlsv1 alert",
            "the handshake failed: tlsv1 alert; see the error of the CA",
        ),
    ],
)
def test_result(result: str, words: str) -> None:
    """Each way for a validation to end has its line, for every name."""
    seen = [Seen("192.0.2.7:1", NAME.upper(), result), Seen("192.0.2.8:1", NAME, result)]
    for names in ((NAME,), ()):
        (line,) = told(*seen, names=names)
        assert "2 validations" in line
        assert words in line


def test_some_perspectives() -> None:
    """If all validations were answered but came from few addresses, the output lists these, since
    validations from other addresses may have been kept away."""
    seen = [Seen(f"192.0.2.{last}:1", NAME, "answered") for last in range(3)]
    (line,) = told(*seen, Seen("[2001:db8::1]:9", NAME, "answered"))
    assert (
        "validations came from 4 addresses (192.0.2.0, 192.0.2.1, 192.0.2.2, 2001:db8::1)" in line
    )
    assert (
        told(*seen, *seen, *(Seen(f"198.51.100.{last}:1", NAME, "answered") for last in (1, 2)))
        == []
    )


def test_address() -> None:
    """An address is asked for by its reverse name."""
    seen = Seen("192.0.2.7:1", "80.2.0.192.in-addr.arpa", REFUSED)
    (line,) = told(seen, names=["192.0.2.80"])
    assert line.startswith("failed  192.0.2.80: 1 validation, but")


def test_log(tmp_path: Path) -> None:
    """The log has the same, as text or JSON, of the last time that the proxy ran."""
    ended = VALIDATION_ENDED.format(server_name=NAME, peer="[2001:db8::1]:9", result="answered")
    log = tmp_path / "log"
    log.write_text(
        f"2026 [x#info] {ended}\n2026 [x#info] Started: new connections\n{{\n"
        f"2026 [x#info] {ended}\n" + json.dumps({"message": ended, "level": "info"}) + "\nelse\n"
    )
    assert from_log(last_lines(str(log))) == [Seen("[2001:db8::1]:9", NAME, "answered")] * 2


def test_named_target(tmp_path: Path) -> None:
    """The finding for a name shows the address of that name's ACME client."""
    log = tmp_path / "log"
    log.write_text(
        "".join(
            VALIDATION_ENDED.format(server_name=name, peer="192.0.2.1:9", result="not answered\n")
            for name in ("a.shop.example", NAME)
        )
    )
    options = ConsoleOptions()
    options.environment = {}
    route = "*.shop.example=127.0.0.1:31444"
    options.parseOptions(["explain", "--alpn-for", route, "--logfile", str(log)])
    causes = [each.cause for each in explain_last_order(options, []) if "closed" in each.cause]
    assert [cause.partition("client at ")[2].split()[0] for cause in causes] == [
        "127.0.0.1:31444",
        TARGET,
    ]


def test_resolver(tmp_path: Path) -> None:
    """A resolver that does not answer is no missing record."""

    def fails(name: str) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    lines = told(look_up=fails)
    assert "its addresses are not known here: Temporary failure" in lines[1]


def test_no_log(tmp_path: Path) -> None:
    """If the log cannot be read, the output says so, and not that there were no validations."""
    options = ConsoleOptions()
    options.environment = {}
    options.parseOptions(["--logfile", str(tmp_path / "none"), "explain"])
    found = explain_last_order(options, [])
    assert "cannot be read: No such file or directory" in str(found[0])
    os.mkfifo(tmp_path / "fifo")
    options["logfile"] = str(tmp_path / "fifo")
    assert "cannot be read" in str(explain_last_order(options, [])[0])
