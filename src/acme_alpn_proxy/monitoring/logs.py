"""The log of the console script: where it goes and what its lines look like."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from twisted.logger import (
    FileLogObserver,
    FilteringLogObserver,
    ILogObserver,
    LogEvent,
    Logger,
    LogLevel,
    LogLevelFilterPredicate,
    eventAsText,
    formatEvent,
    formatEventAsClassicLogText,
)
from twisted.python.logfile import LogFile

from ..errors import StartError

ROTATED_FILES: Final = 9
"""How many full log files of 1 MB each are kept (L{LogFile}): the log must not fill a disk."""

_PRIORITIES: Final = {
    LogLevel.debug: 7,
    LogLevel.info: 6,
    LogLevel.warn: 4,
    LogLevel.error: 3,
    LogLevel.critical: 2,
}
"""Priorities of syslog(3), as journald reads them at the beginning of a line (sd-daemon(3))."""

_NOT_FIELDS: Final = {"format", "for_operator", "isError", "message", "system", "time"}
_PLAIN: Final = (str, int, float, type(None))

_log = Logger()


LONGEST_LINE: Final = 65_536
"""Bytes of a line that are kept; a traceback has a few thousand."""

_CUT: Final = b"... (cut)\n"


class _BoundedLogFile(LogFile):
    """A log file with a limit on its size, also where full files cannot be renamed (only root may
    do that in a folder of root's): then it keeps its newest half. Of a line that is too long, it
    keeps the beginning.

    An instance that drains may write to the same file, so everything is appended to its end.
    """

    def _openFile(self) -> None:
        super()._openFile()
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags | os.O_APPEND)

    def write(self, data: str | bytes) -> None:
        line = data.encode() if isinstance(data, str) else data
        if len(line) > LONGEST_LINE:
            line = line[: LONGEST_LINE - len(_CUT)] + _CUT
        super().write(line)

    def rotate(self) -> None:
        super().rotate()
        self.size = os.fstat(self._file.fileno()).st_size
        limit = (ROTATED_FILES + 1) * self.rotateLength
        if self.size > limit - LONGEST_LINE:
            self._file.seek(-limit // 2, os.SEEK_END)
            newest = self._file.read().partition(b"\n")[2]
            self._file.truncate(0)
            self._file.write(newest)
            self.size = len(newest)


def make_log_file(path: str) -> None:
    """Make sure that the file exists and can be written; raises L{StartError}."""
    try:
        _make(path)
    except OSError as problem:
        raise _refusal(path, problem) from None


def open_log_file(path: str) -> LogFile:
    """Open the file for appending; full files are renamed. Raises L{StartError}."""
    try:
        file: LogFile = _BoundedLogFile.fromFullPath(path, maxRotatedFiles=ROTATED_FILES)
    except OSError as problem:
        raise _refusal(path, problem) from None
    return file


def _make(path: str) -> None:
    # Does not wait for the other end of a FIFO.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    os.close(os.open(path, flags, 0o644))


def _refusal(path: str, problem: OSError) -> StartError:
    if isinstance(problem, PermissionError):
        return StartError(
            f"no permission to write the log file {path}; run this as root, or choose another file"
            " with --logfile",
            os.EX_NOPERM,
        )
    return StartError(
        f"cannot write the log file {path}: {problem.strerror}; choose another file with --logfile",
        os.EX_CANTCREAT,
    )


def reopen(file: LogFile) -> None:
    """Open the file at the same path again: logrotate(8) may have renamed the open one."""
    try:
        _make(file.path)
    except OSError as problem:
        _log.error(
            "Cannot reopen the log file {path}: {problem}; still writing to the old file",
            path=file.path,
            problem=problem.strerror,
        )
    else:
        file.reopen()


def observer(
    stream: Any, form: str, level: str, environment: Mapping[str, str] = os.environ
) -> ILogObserver:
    """A log observer that writes events to C{stream}.

    @param form: C{text} or C{json}. For the journal, text lines begin with a priority, not a time.
    @param level: the lowest level to write; a name of L{LogLevel}.
    """
    line: Callable[[LogEvent], str | None] = formatEventAsClassicLogText
    if form == "json":
        line = as_json
    elif is_journal(stream, environment):
        line = for_journal
    levels = LogLevelFilterPredicate(LogLevel.levelWithName(level))
    return FilteringLogObserver(FileLogObserver(stream, line), [levels])


def is_journal(stream: Any, environment: Mapping[str, str]) -> bool:
    """Whether systemd has connected C{stream} to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    is_stderr: bool = stream is sys.__stderr__
    if not is_stderr or "JOURNAL_STREAM" not in environment:
        return False
    found = os.fstat(stream.fileno())
    return environment["JOURNAL_STREAM"] == f"{found.st_dev}:{found.st_ino}"


def for_journal(event: LogEvent) -> str | None:
    """A line for the journal, which itself adds time and program."""
    text = eventAsText(event, includeTimestamp=False, includeSystem=False)
    priority = _PRIORITIES[event.get("log_level", LogLevel.info)]
    return f"<{priority}>{text}\n" if text else None


def as_json(event: LogEvent) -> str | None:
    """One object on a line: time, level, source, message, traceback if there is one, and fields."""
    fields = {
        name: value if isinstance(value, _PLAIN) else str(value)
        for name, value in event.items()
        if not name.startswith("log_") and name not in _NOT_FIELDS
    }
    head = {
        "time": datetime.fromtimestamp(event["log_time"], UTC).isoformat(timespec="milliseconds"),
        "level": event.get("log_level", LogLevel.info).name,
        "source": event.get("log_namespace", ""),
        "message": formatEvent(event),
    }
    if "log_failure" in event:
        head["traceback"] = event["log_failure"].getTraceback()
    return json.dumps(fields | head) + "\n"
