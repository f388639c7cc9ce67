"""The text of C{help} and C{--help}, made from the options themselves.

The man page and the completions for shells are made from the same data.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from twisted.python.usage import UsageError

from ..options import (
    COMMAND_FLAGS,
    COMMANDS,
    DEFAULT_PIDFILE,
    DISABLE_IPV6_VARIABLE,
    GO_WITH,
    OTHERS,
    PIDFILE_VARIABLE,
    RULESPEC_VARIABLE,
    TOPICS,
    ConsoleOptions,
    Topic,
    all_options,
)

NAME: Final = "acme-alpn-proxy"

SUMMARY: Final = (
    "While an ACME order is in progress, this program receives the new connections to port 443 of"
    " this host. It sends the validations of the CA (TLS-ALPN-01, RFC 8737) to the ACME client, and"
    " all other connections to the web server. To steer means: to send new connections on port 443"
    " to this program, the proxy."
)

SYNOPSES: Final = {
    "run": "run [options] -- COMMAND...",
    "explain": "explain [options] [NAME...]",
    "hook": "[options] hook uacme|dehydrated WORDS...",
    "help": "help [COMMAND]",
    "completion": "completion bash|zsh|fish",
    "manual": "manual",
}
"""The command line of each command that takes other words than options, or no options."""

DETAILS: Final = {
    "start": (
        "Goes to the background and steers. Exits 0 when new connections are steered, or if an"
        " instance with the same options steers already. If an instance runs with other options, it"
        " says what differs and exits 75."
    ),
    "stop": (
        "Stops steering. Exits 0 when new connections reach the web server directly again, or if no"
        " instance runs. Open connections continue until they end, at most for the --drain-timeout"
        " that was given to start. With --wait, stop returns when the last of them has ended. It"
        " also waits for the connections of instances that were stopped earlier."
    ),
    "run": (
        "Starts to steer, runs COMMAND, and stops steering when COMMAND ends for any reason. The"
        " variable ACME_ALPN_PROXY_TARGET tells COMMAND at which address it must answer the CA. On"
        " a terminal, run prints two more lines at the end: how many visitors and validations came."
    ),
    "status": (
        "Shows each running instance, and each stopped instance that still has open connections."
        " Exits 3 if there is none. It needs root."
    ),
    "explain": (
        "Use it after an order that failed. For each NAME it shows which validations reached this"
        " host, how they ended, and what to do. Without NAME it shows the last validations."
    ),
    "hook": (
        "An ACME client calls this as its hook (--hook of uacme, HOOK of dehydrated). It passes the"
        " arguments of the client to the proxy, and the proxy answers the validation itself. It"
        " starts the proxy if no instance runs."
    ),
    "manual": "Shows the man page. Into a pipe or a file it prints the source of the page.",
    "check": (
        "Checks whether the proxy would work on this host; give it the same options as start. It"
        " prints one line for each check: ok, warning or failed, the cause and the remedy. It"
        " changes nothing, but --probe steers for a moment. Exits 1 if something failed. The"
        " command doctor is the same."
    ),
}

EXAMPLES: Final = {
    "run": (
        "Get a certificate while the web server keeps running",
        "acme-alpn-proxy run -- \\\n"
        "  lego --tls --tls.port 127.0.0.1:31443 --domains site.example \\\n"
        "  --email you@site.example --accept-tos run",
    ),
    "check": (
        "Connect to port 443 as a CA does, before the order",
        "acme-alpn-proxy check --probe",
    ),
    "start": (
        "Before and after an order, for an ACME client that listens on port 5001",
        "acme-alpn-proxy --alpn 127.0.0.1:5001 start\nacme-alpn-proxy stop",
    ),
    "stop": ("Stop, and return when the last connection has ended", "acme-alpn-proxy stop --wait"),
    "status": ("Watch connections come and go", "acme-alpn-proxy status --watch"),
    "completion": (
        "bash: add this line to ~/.bashrc",
        'eval "$(acme-alpn-proxy completion bash)"\n'
        "# zsh: add this line to ~/.zshrc, after compinit\n"
        'eval "$(acme-alpn-proxy completion zsh)"\n'
        "# fish: run this once\n"
        "acme-alpn-proxy completion fish \\\n"
        "  >~/.config/fish/completions/acme-alpn-proxy.fish",
    ),
    "manual": (
        "Install the man page, so that man(1) finds it",
        "acme-alpn-proxy manual >/usr/local/share/man/man8/acme-alpn-proxy.8",
    ),
}
"""For each command: a purpose, and the lines that achieve it."""

_SHOWN: Final = ("run", "check")
"""The commands whose examples are in the general help."""

ENVIRONMENT: Final = {
    PIDFILE_VARIABLE: f"The PID file, by default {DEFAULT_PIDFILE}",
    RULESPEC_VARIABLE: "Your own rule: the words that follow 'iptables -t nat -I PREROUTING'",
    f"{DISABLE_IPV6_VARIABLE}=y": "Steer IPv4 only",
    "NO_COLOR": "Any value: no colours on the terminal",
}

EXIT_STATUSES: Final = {
    "0": "done",
    "1": "another failure (all changes are undone); of check and explain: something failed",
    "2": "wrong usage",
    "3": "of status: no instance runs",
    "67": "there is no such user or group",
    "69": "a program, a package or a feature of the kernel is missing, or a port is in use",
    "70": "a defect of this program",
    "71": "the kernel refused an operation",
    "73": "the PID file or the log file cannot be written",
    "75": (
        "another instance runs, or a program holds the lock of iptables: try again later; run did"
        " not start COMMAND"
    ),
    "77": "no permission",
    "78": (
        "with the firewall, the routes or the settings of this host, visitors would be lost; or a"
        " setting is wrong"
    ),
    "126": "of run: COMMAND cannot be executed",
    "127": "of run: COMMAND is not found",
    "128 + N": "of run: signal N has ended COMMAND; otherwise run exits with the status of COMMAND",
}

KINDS: Final = {"FILE": "file", "USER": "user", "GROUP": "group"}
"""Kinds of values that a shell can complete, by the placeholder of the value."""

_WIDTH: Final = 79
"""Columns to fill: one fewer than a terminal usually has."""

_WIDEST_TERM: Final = 26


@dataclass(frozen=True)
class Option:
    """An option as the help shows it.

    @ivar value: the placeholder of its value; empty for a flag.
    @ivar topic: the heading under which it is shown.
    @ivar choices: all values that it accepts; empty if it accepts any value, or has none.
    """

    long: str
    short: str | None
    about: str
    topic: Topic
    value: str = ""
    default: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of its value: C{none}, C{choice}, one of L{KINDS}, or C{any}."""
        if not self.value:
            return "none"
        return "choice" if self.choices else KINDS.get(self.value, "any")

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that use it."""
        return GO_WITH.get(self.long, self.topic.commands)

    def names(self, equals: str) -> str:
        """Its names and its value, with C{equals} between them."""
        names = f"--{self.long}{equals}{self.value}" if self.value else f"--{self.long}"
        return f"-{self.short}, {names}" if self.short else names

    def sentence(self, *, alone: bool = False) -> str:
        """A description and the default.

        @param alone: add the commands that use it, since the reader does not see them.
        """
        text = self.about
        if alone and self.long in GO_WITH:
            text += f" (with {', '.join(self.commands)})"
        return text if self.default is None else f"{text} [{self.default}]"


def options() -> list[Option]:
    """All options of the console script, in the order of the help."""
    found = [
        Option(long, short, about, getattr(about, "topic", OTHERS))
        for long, short, about in all_options("optFlags")
    ]
    for long, short, default, about, *coerce in all_options("optParameters"):
        shown = f"{default:g}" if isinstance(default, float) else default
        found.append(
            Option(
                long,
                short,
                about,
                getattr(about, "topic", OTHERS),
                getattr(about, "value", "VALUE"),
                None if shown is None else str(shown),
                _choices(*coerce),
            )
        )
    for long, short in (("help", "h"), ("version", "V")):
        method = getattr(ConsoleOptions, f"opt_{long}")
        about = (inspect.getdoc(method) or "").splitlines()[0].rstrip(".")
        found.append(Option(long, short, about, OTHERS))
    return sorted(found, key=lambda option: TOPICS.index(option.topic))


def _choices(coerce: Callable[[str], object] | None = None) -> tuple[str, ...]:
    """The values of an option, from its error message for a wrong value."""
    try:
        if coerce is not None:
            coerce("")
    except (UsageError, ValueError) as problem:
        told = re.search(r"choose one of (.*)", str(problem))
        return tuple(told[1].split(", ")) if told else ()
    return ()


def synopsis(command: str) -> str:
    """The command line of a command, without the name of the program."""
    return SYNOPSES.get(command, f"{command} [options]")


def help_text(command: str = "") -> str:
    """The general help, or the help of one command."""
    return "\n".join(_of_one(command) if command else _of_all()) + "\n"


def _of_all() -> Iterator[str]:
    yield f"Usage: {NAME} COMMAND [options]"
    yield from ("", *_filled(SUMMARY), "", "Commands:")
    yield from _table(COMMANDS.items())
    yield from ("", "Examples:")
    for command in _SHOWN:
        yield from _example(command)
    yield from _by_topic(options(), alone=True)
    yield from ("", "Environment:")
    yield from _table(ENVIRONMENT.items())
    yield from ("", *_filled(_THE_REST))


_THE_REST: Final = (
    "Options may stand before and after the command, with one dash or two. The exit status is 0 if"
    f" all went well; '{NAME} manual' explains the others."
)


def _of_one(command: str) -> Iterator[str]:
    yield f"Usage: {NAME} {synopsis(command)}"
    yield from ("", *_filled(f"{command}: {COMMANDS[command]}."))
    if command in DETAILS:
        yield from ("", *_filled(DETAILS[command]))
    if command in EXAMPLES:
        yield from ("", "Example:", *_example(command))
    if command not in SYNOPSES or "[options]" in SYNOPSES[command]:
        yield from _by_topic(
            option
            for option in options()
            if command in option.commands and option.long not in ("help", "version")
        )


def _example(command: str) -> Iterator[str]:
    about, lines = EXAMPLES[command]
    yield f"  # {about}"
    yield from textwrap.indent(lines, "  ").splitlines()


def _by_topic(shown: Iterable[Option], *, alone: bool = False) -> Iterator[str]:
    for topic, found in groupby(shown, lambda option: option.topic):
        entries = [(each.names(" "), each.sentence(alone=alone)) for each in found]
        title = topic.title if alone or topic is not COMMAND_FLAGS else "Options"
        yield from ("", f"{title}:", *_table(entries))


def _table(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Terms, with their meaning next to them, or below if the term is long."""
    entries = list(entries)
    width = max(len(term) for term, _ in entries if len(term) <= _WIDEST_TERM) + 2
    for term, about in entries:
        beside = _filled(about, _WIDTH - 2 - width)
        if len(term) + 2 > width:
            yield f"  {term}"
        else:
            yield f"  {term:<{width}}{beside.pop(0)}"
        yield from (f"  {'':<{width}}{line}" for line in beside)


def _filled(text: str, width: int = _WIDTH) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
