"""The man page acme-alpn-proxy(8), made from the help. Its macros are those of man(7)."""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final

from .. import __version__
from ..options import COMMANDS, DEFAULT_LOGFILE, DEFAULT_PIDFILE
from .help import (
    DETAILS,
    ENVIRONMENT,
    EXAMPLES,
    EXIT_STATUSES,
    NAME,
    SUMMARY,
    Option,
    options,
    synopsis,
)

_SIGNALS: Final = {
    "SIGTERM, SIGINT": (
        "Stop: end the steering, then wait for the open connections. A second signal resets them."
        " The command run passes signals on to COMMAND."
    ),
    "SIGUSR1": "Open the log file again, after logrotate(8) has moved it.",
    "SIGHUP, SIGUSR2, SIGPIPE": "Nothing.",
}

_FILES: Final = {
    DEFAULT_PIDFILE: "The PID of the instance that runs; it holds a lock on the file.",
    DEFAULT_PIDFILE.replace(".pid", ".PID.sock"): (
        "The Unix socket of the instance with that PID; the command status connects to it."
    ),
    DEFAULT_LOGFILE: "The log. Nine full files of 1 MB are kept in the same folder.",
}

_SEE_ALSO: Final = "iptables(8), nft(8), systemctl(1), logrotate(8), RFC 8737 (TLS-ALPN-01)"


def manual() -> str:
    """The source of the page. Its date is that of SOURCE_DATE_EPOCH, or today."""
    date = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    title = f'.TH {NAME.upper()} 8 "{time.strftime("%Y-%m-%d", date)}" "{NAME} {__version__}"'
    lines = [title, ".SH NAME", _roff(f"{NAME} - TLS-ALPN-01 beside a web server, on port 443")]
    lines += [".SH SYNOPSIS", *_verbatim("\n".join(f"{NAME} {synopsis(it)}" for it in COMMANDS))]
    lines += [".SH DESCRIPTION", _roff(SUMMARY)]
    lines += [".SH COMMANDS", *_list((name, _about(name)) for name in COMMANDS)]
    lines += [".SH OPTIONS", *_options()]
    lines += [".SH ENVIRONMENT", *_list(ENVIRONMENT.items())]
    lines += [".SH EXIT STATUS", *_list(EXIT_STATUSES.items())]
    lines += [".SH SIGNALS", *_list(_SIGNALS.items())]
    lines += [".SH FILES", *_list(_FILES.items())]
    lines += [".SH EXAMPLES", *_examples()]
    lines += [".SH SEE ALSO", _roff(_SEE_ALSO)]
    return "\n".join(lines) + "\n"


def _about(command: str) -> str:
    return DETAILS.get(command) or f"{COMMANDS[command].capitalize()}."


def _options() -> Iterator[str]:
    for topic, found in groupby(options(), lambda option: option.topic):
        yield f".SS {_roff(topic.title)}"
        yield from _list(map(_entry, found))


def _entry(option: Option) -> tuple[str, str]:
    return option.names("="), option.sentence(alone=True)


def _examples() -> Iterator[str]:
    for at, (about, lines) in enumerate(EXAMPLES.values()):
        yield from [".PP"] * bool(at)
        yield from (_roff(f"{about}:"), ".PP", ".RS 4", *_verbatim(lines), ".RE")


def _list(entries: Iterable[tuple[str, str]]) -> list[str]:
    lines = []
    for term, about in entries:
        lines += [".TP", f".B {_roff(term)}", _roff(about)]
    return lines


def _verbatim(text: str) -> list[str]:
    return [".nf", *map(_escaped, text.splitlines()), ".fi"]


def _roff(text: str) -> str:
    return _escaped(textwrap.fill(text, 72, break_on_hyphens=False, break_long_words=False))


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti")
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)
