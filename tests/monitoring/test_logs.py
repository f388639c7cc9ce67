"""The log's lines, by format and level, and the log file moved aside."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import Logger, LogLevel, LogPublisher, capturedLogs
from twisted.python.failure import Failure

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.monitoring.logs import (
    is_journal,
    make_log_file,
    observer,
    open_log_file,
    reopen,
)
from acme_alpn_proxy.proxy.routing import Route


def lines(form: str, level: str = "info", stream: Any = None) -> list[str]:
    """The output for an event of each level, and for one without a level."""
    output = stream if stream is not None else io.StringIO()
    environment = {}
    if stream is not None:
        found = os.fstat(stream.fileno())
        environment["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
    publisher = LogPublisher(observer(output, form, level, environment))
    log = Logger("proxy", observer=publisher)
    for name in ("debug", "info", "warn", "error"):
        log.emit(LogLevel.levelWithName(name), "Routed {peer} by {route}", peer="p", route=ROUTE)
    log.failure("Oh {what}", Failure(ZeroDivisionError("oh")), what="no")
    for text in ("", "old"):
        event = {"log_format": text, "log_namespace": "old", "log_level": LogLevel.info}
        publisher(event | {"log_time": 0.0, "time": 0.0})
    output.seek(0)
    written: list[str] = output.read().splitlines()
    return written


ROUTE = Route("acme", "127.0.0.1:31443")


def test_text() -> None:
    """Text has time, source, level and message, and a failure its traceback."""
    written = lines("text")
    assert written[0].endswith(f" [proxy#info] Routed p by {ROUTE}")
    assert written[0][:4].isdigit()
    assert "ZeroDivisionError: oh" in "".join(written)


@pytest.mark.parametrize(
    ("level", "first"), [("debug", "debug"), ("info", "info"), ("warn", "warn"), ("error", "error")]
)
def test_level(level: str, first: str) -> None:
    """Events below the level are not written."""
    assert f"#{first}]" in lines("text", level)[0]


def test_json() -> None:
    """JSON is one object on each line, with the message and its fields."""
    told = [json.loads(line) for line in lines("json")]
    route = {"message": f"Routed p by {ROUTE}", "peer": "p", "route": str(ROUTE)}
    assert {name: told[0][name] for name in route} == route
    assert (told[0]["level"], told[0]["source"]) == ("info", "proxy")
    assert (told[3]["level"], told[3]["message"]) == ("critical", "Oh no")
    assert "ZeroDivisionError: oh" in told[3]["traceback"]
    assert told[5]["time"] == "1970-01-01T00:00:00.000+00:00"


def test_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the journal a line has its priority in front and no time; an empty one is left out."""
    with (tmp_path / "journal").open("w+") as stream:
        monkeypatch.setattr("sys.__stderr__", stream)
        written = lines("text", stream=stream)
        assert written[:3] == [f"<{number}>Routed p by {ROUTE}" for number in (6, 4, 3)]
        assert written[3] == "<2>Oh no"
        assert written[-1] == "<6>old"
        assert not is_journal(stream, {})
        assert not is_journal(stream, {"JOURNAL_STREAM": "1:2"})
    assert not is_journal(io.StringIO(), {"JOURNAL_STREAM": "1:2"})


def test_reopen(tmp_path: Path) -> None:
    """If the log was renamed, it continues in a new file; if none can be made, in the old one."""
    path = tmp_path / "folder" / "log"
    path.parent.mkdir()
    file = open_log_file(str(path))
    file.write("one\n")
    path.rename(tmp_path / "log.1")
    reopen(file)
    file.write("two\n")
    assert (path.read_text(), (tmp_path / "log.1").read_text()) == ("two\n", "one\n")
    path.parent.rename(tmp_path / "gone")
    with capturedLogs() as events:
        reopen(file)
    file.write("three\n")
    file.close()
    assert (tmp_path / "gone" / "log").read_text() == "two\nthree\n"
    assert [event["log_level"] for event in events] == [LogLevel.error]


@pytest.fixture
def unmovable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a log in a folder where this user may not rename it."""
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != str(tmp_path))
    return tmp_path / "log"


def test_bound_where_it_cannot_be_moved(unmovable: Path) -> None:
    """If the user may not rename it, a full log keeps its newest half: it never has more than 10
    MB, and always has the last 4.9 MB of lines."""
    file = open_log_file(str(unmovable))
    sizes = set()
    for number in range(30_000):
        file.write(f"{number:05} {'x' * 993}\n")
        if number % 500 == 499:
            sizes.add(unmovable.stat().st_size)
            with unmovable.open("rb") as log:
                log.seek(-min(number + 1, 4_900) * 1_000, os.SEEK_END)
                first, *_, last = (int(line[:5]) for line in log)
            assert (first, last) == (max(0, number - 4_899), number)
    file.close()
    assert 9_000_000 < max(sizes) <= 10_000_000
    assert os.listdir(unmovable.parent) == ["log"]


def test_long_line(unmovable: Path) -> None:
    """Only the beginning of a very long line is kept, so the log stays within its limit."""
    file = open_log_file(str(unmovable))
    for _ in range(200):
        file.write("first\n")
        file.write("\xe9" * 600_000 + "\n")
        assert unmovable.stat().st_size <= 10_000_000
    file.write("last\n")
    file.close()
    *_, first, cut, last = unmovable.read_bytes().splitlines()
    assert (first, len(cut), last) == (b"first", 65_535, b"last")
    assert cut.endswith(b"... (cut)")


def test_two_instances(unmovable: Path) -> None:
    """One that drains writes to the same log: no line is lost, and the bound holds for both."""
    one, other = (open_log_file(str(unmovable)) for _ in range(2))
    one.write("one\n")
    other.write("other\n")
    one.write("one\n")
    assert unmovable.read_text() == "one\nother\none\n"
    for _ in range(6_000):
        for file in (one, other):
            file.write("x" * 1_999 + "\n")
    assert unmovable.stat().st_size <= 10_000_000
    other.write("last\n")
    for file in (one, other):
        file.close()
    assert set(unmovable.read_text().splitlines()) == {"x" * 1_999, "last"}


def test_not_a_file(tmp_path: Path) -> None:
    """A FIFO does not block: it is refused, and so are a folder and a missing folder."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(
        StartError, match=r"^cannot write the log file .*; choose another"
    ) as refused:
        make_log_file(str(fifo))
    assert refused.value.status == os.EX_CANTCREAT
    with pytest.raises(StartError, match="Is a directory"):
        make_log_file(str(tmp_path))
    with pytest.raises(StartError, match="No such file"):
        open_log_file(str(tmp_path / "missing" / "log"))


def test_not_permitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the user may not write it, the remedy is to be root."""

    def refuse(*words: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        StartError, match=r"^no permission to write the log file .*; run this as root"
    ) as no:
        make_log_file(str(tmp_path / "log"))
    assert no.value.status == os.EX_NOPERM
