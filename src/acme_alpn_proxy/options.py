"""The options: one definition for C{twistd acme-alpn-proxy} and the console script."""

from __future__ import annotations

import getopt
import grp
import importlib.util
import math
import os
import pwd
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from twisted.python import usage
from twisted.python.usage import UsageError
from twisted.python.util import gidFromString, uidFromString

from . import __version__
from .addresses import Address, BadAddress, parse_address

PORT: Final = 21443
"""Where the proxy listens, as the original does. Rules in use out there name it."""

WAYS: Final = ("iptables", "nftables", "sk-lookup")
"""Of steering; in this order they are tried unless C{--redirect} says otherwise."""

AUTO: Final = ("sk-lookup", "nftables", "iptables")

REDIRECTS: Final = (*WAYS, "auto", "none")

PIDFILE_VARIABLE: Final = "ACME_ALPN_PROXY_PIDFILE"
RULESPEC_VARIABLE: Final = "ACME_ALPN_PROXY_RULESPEC"
DISABLE_IPV6_VARIABLE: Final = "ACME_ALPN_PROXY_DISABLEV6"

COMMANDS: Final = ("start", "stop", "run", "status", "check", "explain", "hook")
ALIASES: Final = {"doctor": "check"}

GO_WITH: Final = {
    "nodaemon": ("start",),
    "on-demand": ("start",),
    "wait": ("stop", "run"),
    "shared": ("run",),
    "probe": ("check",),
    "json": ("status", "check", "explain"),
    "watch": ("status",),
}
"""The commands that a flag goes with."""

DEFAULT_PIDFILE: Final = "/var/run/acme-alpn-proxy.pid"
DEFAULT_LOGFILE: Final = "/var/log/acme-alpn-proxy.log"

_LONGEST: Final = 86_400.0


class Unusable(UsageError):
    """An option is understood, but what it asks for is not there.

    @ivar status: what the console script exits with (sysexits(3)).
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def _address(option: str) -> Callable[[str], Address]:
    def coerce(value: str) -> Address:
        try:
            return parse_address(value)
        except BadAddress as problem:
            raise ValueError(f"--{option} {problem}") from None

    return coerce


def _seconds(option: str) -> Callable[[str], float]:
    def coerce(value: str) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= _LONGEST:
            raise ValueError(
                f"--{option} {value!r}: seconds are needed, a number from 0 to {_LONGEST:g}"
            )
        return seconds

    return coerce


def _count(option: str) -> Callable[[str], int]:
    def coerce(value: str) -> int:
        if not (value.isascii() and value.isdigit()):
            raise ValueError(f"--{option} {value!r}: a whole number is needed, 0 or more")
        return int(value)

    return coerce


def _choice(option: str, choices: Sequence[str]) -> Callable[[str], str]:
    def coerce(value: str) -> str:
        if value not in choices:
            raise ValueError(f"--{option} {value!r}: choose one of {', '.join(choices)}")
        return value

    return coerce


def _ways(value: str) -> str:
    """A list of L{WAYS}, or C{none}."""
    if value == "auto":
        return ",".join(AUTO)
    names = value.split(",")
    if value != "none" and not set(names) <= set(WAYS):
        choices = ", ".join(WAYS if len(names) > 1 else REDIRECTS)
        raise ValueError(
            f"--redirect {value!r}: choose {'from' if len(names) > 1 else 'one of'} {choices}"
        )
    return ",".join(dict.fromkeys(names))


def _metrics(value: str) -> str:
    """An endpoint string to listen at; on this host alone if nothing but a port is given."""
    if importlib.util.find_spec("prometheus_client") is None:
        raise Unusable(
            "--metrics needs prometheus_client; pip install 'acme-alpn-proxy[metrics]', or"
            " apt install python3-prometheus-client",
            os.EX_UNAVAILABLE,
        )
    from twisted.internet.endpoints import serverFromString

    port = re.fullmatch("(?:tcp:)?([0-9]+)", value)
    text = f"tcp:{port[1]}:interface=127.0.0.1" if port else value
    try:
        serverFromString(None, text)
    except Exception as problem:  # each kind of endpoint raises its own
        raise ValueError(
            f"--metrics {value!r}: a port or a server endpoint string is needed, such as"
            f" tcp:9443:interface=127.0.0.1: {problem}"
        ) from None
    return text


def responder_is_installed() -> bool:
    """Whether there is what the responder needs."""
    needed = ("OpenSSL", "cryptography", "service_identity")
    return all(importlib.util.find_spec(name) is not None for name in needed)


def _folder(value: str) -> Path:
    folder = Path(value)
    if not folder.is_dir():
        raise Unusable(f"--alpn-certs {value!r}: there is no such folder; make it", os.EX_NOINPUT)
    return folder


def _user(value: str) -> int:
    try:
        return pwd.getpwuid(uidFromString(value)).pw_uid
    except KeyError:  # a number too: twistd looks for its groups
        raise Unusable(
            f"--uid {value!r}: there is no such user; name one of: getent passwd", os.EX_NOUSER
        ) from None


def _group(value: str) -> int:
    try:
        return grp.getgrgid(gidFromString(value)).gr_gid
    except (KeyError, OverflowError):
        raise Unusable(
            f"--gid {value!r}: there is no such group; name one of: getent group", os.EX_NOUSER
        ) from None


class ProxyOptions(usage.Options):
    """What both ways of starting the proxy understand.

    After parsing, C{alpn} and C{fallback} are L{Address}es, C{rulespec} is a list of words or
    C{None}, C{ipv6} a C{bool}, C{redirect} names with commas between them.
    """

    synopsis = "Usage: twistd [options] acme-alpn-proxy [options]"
    longdesc = (
        "Steers new connections to :443 here, sends those of an ACME validation "
        "(TLS-ALPN-01, RFC 8737) to the ACME client and all others to the web server."
    )

    optFlags = [  # noqa: RUF012
        ["force", None, "steer although the firewall seems to be in the way"],
    ]
    optParameters = [  # noqa: RUF012
        [
            "alpn",
            None,
            parse_address("127.0.0.1:31443"),
            "Where the ACME client answers validations: host:port, [v6]:port or a Twisted endpoint"
            " string",
            _address("alpn"),
        ],
        [
            "fallback",
            None,
            parse_address("127.0.0.1:443"),
            "Where the web server answers everything else",
            _address("fallback"),
        ],
        [
            "redirect",
            None,
            ",".join(WAYS),
            "How to be given new connections to :443: a list of iptables, nftables (Linux 5.12) and"
            " sk-lookup (BPF, Linux 5.9), of which the first that works here is taken; auto"
            f" ({','.join(AUTO)}); or none (you steer them to port {PORT})",
            _ways,
        ],
        [
            "hello-timeout",
            None,
            5.0,
            "Seconds for a visitor to send a whole ClientHello; without one it goes to the"
            " fallback",
            _seconds("hello-timeout"),
        ],
        [
            "connect-timeout",
            None,
            10.0,
            "Seconds for a target to accept a connection; then the visitor is reset",
            _seconds("connect-timeout"),
        ],
        [
            "idle-timeout",
            None,
            0.0,
            "Seconds without a byte until an established connection is reset; 0: never",
            _seconds("idle-timeout"),
        ],
        [
            "max-connections",
            None,
            0,
            "How many visitors at a time, the others wait; 0: as many as the limit on open files"
            " allows",
            _count("max-connections"),
        ],
        [
            "linger",
            None,
            15.0,
            "Seconds to go on accepting at stop, at most, while handshakes are under way",
            _seconds("linger"),
        ],
        [
            "drain-timeout",
            None,
            180.0,
            "Seconds to wait at stop for live connections; then they are reset",
            _seconds("drain-timeout"),
        ],
        [
            "control",
            None,
            None,
            "Unix socket at which root's ACME clients tell what to answer validations with;"
            " acme-alpn-proxy: beside the PID file (default /var/run/acme-alpn-proxy.control)",
        ],
        [
            "alpn-certs",
            None,
            None,
            "Folder with challenge certificates to answer with, NAME.crt.pem and NAME.key.pem, as"
            " dehydrated makes them",
            _folder,
        ],
        [
            "metrics",
            None,
            None,
            "Where to serve numbers to Prometheus: a port of 127.0.0.1 or a Twisted server endpoint"
            " string",
            _metrics,
        ],
    ]

    environment: Mapping[str, str] = os.environ

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Like the base class's, for Go's single dashes too: C{-alpn ADDR}, C{-alpn=ADDR}."""
        super().parseOptions([self._with_two_dashes(word) for word in options or ()])

    def _with_two_dashes(self, word: str) -> str:
        name = re.match(r"-([a-z][a-z0-9-]+)", word)
        return word if name is None or set(name[1]) <= set(self.shortOpt) else f"-{word}"

    def opt_h(self) -> None:
        """As --help"""
        self.opt_help()

    def postOptions(self) -> None:
        """What depends on more than one option, or on the environment."""
        for name in ("alpn", "fallback"):
            if self[name].is_local_port(PORT):
                raise UsageError(
                    f"--{name} {self[name].text} is the proxy's own listener, so connections would"
                    " go round for ever: name the port of the program that is to answer"
                )
        for name in ("control", "alpn-certs"):
            if self[name] is not None:
                self.check_responder(f"--{name}")
        self["ipv6"] = self.environment.get(DISABLE_IPV6_VARIABLE) != "y"
        rulespec = self.environment.get(RULESPEC_VARIABLE, "")
        try:
            self["rulespec"] = shlex.split(rulespec) or None
        except ValueError as problem:
            raise Unusable(
                f"{RULESPEC_VARIABLE}: {problem} in {rulespec!r}; quote as in a shell",
                os.EX_CONFIG,
            ) from None

    def check_responder(self, option: str) -> None:
        """Raises L{Unusable} if what C{option} needs is not installed."""
        if not responder_is_installed():
            raise Unusable(
                f"{option} needs pyOpenSSL and service_identity; pip install"
                " 'acme-alpn-proxy[responder]', or apt install python3-openssl"
                " python3-service-identity",
                os.EX_UNAVAILABLE,
            )


class ConsoleOptions(ProxyOptions):
    """What the console script understands besides: a command and what goes with it."""

    synopsis = (
        "Usage: acme-alpn-proxy [options] start|stop|status|check\n"
        "       acme-alpn-proxy [options] run -- COMMAND...\n"
        "       acme-alpn-proxy [options] explain [NAME...]\n"
        "       acme-alpn-proxy [options] hook uacme|dehydrated WORDS..."
    )
    longdesc = (
        f"{ProxyOptions.longdesc}\n\n"
        "start  go to the background and steer; exit 0 once that is so, or if it runs already\n"
        "stop   steer no more; exit 0 once that is so; connections under way go on\n"
        "run    steer, run COMMAND, steer no more; exit as COMMAND did\n"
        "status show what runs, and what it has done so far\n"
        "check  look whether it would work here: one line each, ok, warning or failed\n"
        "doctor the same\n"
        "explain after an order that failed: say what was seen here, for each NAME\n"
        "hook   for the hook of an ACME client, with the words that this one gives to it\n\n"
        "Environment:\n"
        f"{PIDFILE_VARIABLE}    PID file (default {DEFAULT_PIDFILE})\n"
        f"{RULESPEC_VARIABLE}   instead of the usual rule, behind 'iptables -t nat -I PREROUTING'\n"
        f"{DISABLE_IPV6_VARIABLE}=y leave IPv6 alone\n\n"
        "Exit status:\n"
        "0    done\n"
        "2    wrong usage\n"
        "3    status: nothing runs\n"
        "67   there is no such user or group\n"
        "69   what is needed is missing, or taken\n"
        "70   a defect of this program\n"
        "71   the system refuses\n"
        "73   PID file or log file cannot be written\n"
        "75   somebody else is at it: try again later; run: COMMAND was not run\n"
        "77   not permitted\n"
        "78   as this host is set up, visitors would be lost\n"
        "1    any other failure; nothing is left applied, whatever it was\n"
        "126  run: COMMAND is no program; 127: it is not found; 128 + N: signal N ended it;\n"
        "     otherwise run exits as COMMAND did"
    )

    optFlags = [  # noqa: RUF012
        ["nodaemon", "n", "start: stay in the foreground and log to stderr"],
        ["on-demand", None, "start: steer only while an identifier is pending or run needs it"],
        ["wait", None, "stop, run: wait until the last connection has ended"],
        ["probe", None, "check: steer for a moment, and dial port 443 from outside"],
        ["json", None, "status, check, explain: print one JSON document"],
        ["watch", None, "status: show it again every second"],
        ["shared", None, "run: if an instance runs already, run COMMAND with that one"],
    ]
    optParameters = [  # noqa: RUF012
        ["logfile", None, DEFAULT_LOGFILE, "start, run: where to log in the background"],
        [
            "log-format",
            None,
            "text",
            "start, run: text, or json: one object a line",
            _choice("log-format", ("text", "json")),
        ],
        [
            "log-level",
            None,
            "info",
            "start, run: the least that is logged: debug (each visitor), info, warn, error",
            _choice("log-level", ("debug", "info", "warn", "error")),
        ],
        ["uid", None, None, "start, run: user to run as once it steers", _user],
        ["gid", None, None, "start, run: group to run as (default: that of --uid)", _group],
    ]

    def getUsage(self, width: int | None = None) -> str:
        """The base class folds the long description's lines; keep them."""
        folded, self.longdesc = self.longdesc, ""
        try:
            text: str = super().getUsage(width)
        finally:
            self.longdesc = folded
        return f"{text.rstrip()}\n\n{folded}\n"

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Options may stand before and after the command; what is behind C{--} is not ours."""
        given = list(options or ())
        end = given.index("--") if "--" in given else len(given)
        self["argv"] = given[end + 1 :]
        if "hook" in given[:end]:  # what follows is the client's, and may begin with a dash
            end = given.index("hook") + 1
            self["argv"] = given[end:]
        words = [self._with_two_dashes(word) for word in given[:end]]
        try:
            parsed, rest = getopt.gnu_getopt(words, self.shortOpt, self.longOpt)
        except getopt.error as problem:
            raise UsageError(str(problem)) from None
        ordered = [
            f"{name}={value}" if f"{name[2:]}=" in self.longOpt else name for name, value in parsed
        ]
        super().parseOptions([*ordered, "--", *rest])

    def opt_version(self) -> None:
        """Print the version and exit"""
        print(f"acme-alpn-proxy {__version__}")
        raise SystemExit(0)

    def parseArgs(self, *words: str) -> None:
        """Exactly one command, and for C{run} another program's."""
        argv = self["argv"]
        if words[:1] == ("run",) and (len(words) > 1 or not argv):
            raise UsageError(
                "run needs a command behind --, as in: acme-alpn-proxy run -- lego run"
            )
        if words[:1] == ("explain",):
            words, self["argv"] = words[:1], list(words[1:])
            argv = []
        command = ALIASES.get(words[0], words[0]) if len(words) == 1 else None
        if command not in COMMANDS or (argv and command not in ("run", "hook")):
            got = f", not {shlex.join([*words, *argv])!r}" if words or argv else ""
            *but_last, last = COMMANDS
            raise UsageError(f"one command is needed, {', '.join(but_last)} or {last}{got}")
        self["command"] = command

    def postOptions(self) -> None:
        """Which option goes with which command, and the paths."""
        super().postOptions()
        for flag, commands in GO_WITH.items():
            if self[flag] and self["command"] not in commands:
                raise UsageError(f"--{flag} goes with {' or '.join(commands)}")
        if self["probe"] and self["redirect"] == "none":
            raise UsageError("--probe steers: choose one by --redirect, not none")
        self["pidfile"] = self.environment.get(PIDFILE_VARIABLE) or DEFAULT_PIDFILE
        if self["on-demand"]:
            self.check_responder("--on-demand")
            if self["uid"] and self["redirect"] == "iptables":
                raise UsageError(
                    "--on-demand with --uid cannot steer by iptables, which only root can run: name"
                    " another way with --redirect, or leave --uid away"
                )
        for name in ("pidfile", "logfile"):  # the daemon leaves this folder
            self[name] = os.path.abspath(self[name])
