"""The options: one definition for C{twistd acme-alpn-proxy} and the console script."""

from __future__ import annotations

import getopt
import grp
import importlib.util
import ipaddress
import math
import os
import pwd
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from twisted.python import usage
from twisted.python.reflect import accumulateClassList
from twisted.python.usage import UsageError
from twisted.python.util import gidFromString, uidFromString

from . import __version__
from .addresses import ORIGINAL, Address, BadAddress, parse_address

PORT: Final = 21443
"""The port of the proxy, as in the original program. Existing rules of operators name it."""

WAYS: Final = ("iptables", "nftables", "sk-lookup")
"""Ways of steering; tried in this order unless C{--redirect} has another list."""

AUTO: Final = ("sk-lookup", "nftables", "iptables")

REDIRECTS: Final = (*WAYS, "auto", "none")

VISITOR_ADDRESS: Final = ("auto", "off", "require")
"""Whether the web server sees the visitors' own addresses."""

PIDFILE_VARIABLE: Final = "ACME_ALPN_PROXY_PIDFILE"
RULESPEC_VARIABLE: Final = "ACME_ALPN_PROXY_RULESPEC"
DISABLE_IPV6_VARIABLE: Final = "ACME_ALPN_PROXY_DISABLEV6"

COMMANDS: Final = {
    "start": "steer in the background; return when this has begun",
    "stop": "stop steering; open connections continue",
    "run": "steer while COMMAND runs; exit with the status of COMMAND",
    "status": "show the running instances and their connections",
    "check": "check whether the proxy would work on this host",
    "explain": "show which validations of the last order reached this host",
    "hook": "act as the hook of an ACME client (uacme or dehydrated)",
    "help": "explain a command, for example: acme-alpn-proxy help start",
    "completion": "print the completions for a shell: bash, zsh or fish",
    "manual": "show the man page",
}
"""Each command, and what it does."""

ALIASES: Final = {"doctor": "check"}

SHELLS: Final = ("bash", "zsh", "fish")

GO_WITH: Final = {
    "nodaemon": ("start",),
    "on-demand": ("start",),
    "wait": ("stop", "run"),
    "shared": ("run",),
    "probe": ("check",),
    "json": ("status", "check", "explain"),
    "watch": ("status",),
}
"""For each flag, the commands that accept it."""

DEFAULT_PIDFILE: Final = "/var/run/acme-alpn-proxy.pid"
DEFAULT_LOGFILE: Final = "/var/log/acme-alpn-proxy.log"

UNSET: Final = "unset"

HEADERS: Final = ("none", "v1", "v2")
"""Versions of the PROXY protocol."""

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_LONGEST: Final = 86_400.0


@dataclass(frozen=True)
class Topic:
    """A heading in the help, with options under it.

    @ivar commands: the commands whose help has these options. For a flag in L{GO_WITH}, the
        commands listed there are used instead.
    """

    title: str
    commands: tuple[str, ...]


_STARTS: Final = ("start", "run", "check")

TARGETS: Final = Topic("Where connections go", _STARTS)
STEERING: Final = Topic("How to steer", _STARTS)
RESPONDER: Final = Topic("Answering validations itself", (*_STARTS, "hook"))
LIMITS: Final = Topic("Timeouts and limits", _STARTS)
ENDING: Final = Topic("How it ends", (*_STARTS, "stop"))
PROCESS: Final = Topic("The process, its log and its metrics", ("start", "run"))
COMMAND_FLAGS: Final = Topic("Options of single commands", ())
OTHERS: Final = Topic("Other options", tuple(COMMANDS))
"""For an option without a topic."""

TOPICS: Final = (TARGETS, STEERING, RESPONDER, LIMITS, ENDING, PROCESS, COMMAND_FLAGS, OTHERS)
"""In the order of the help."""


class About(str):
    """What an option does. For Twisted it is a C{str}; the help also reads its attributes.

    @ivar topic: the heading under which the help shows the option.
    @ivar value: the placeholder of the option's value there.
    """

    topic: Topic
    value: str

    def __new__(cls, text: str, topic: Topic, value: str = "VALUE") -> About:
        about = super().__new__(cls, text)
        about.topic = topic
        about.value = value
        return about


class Unusable(UsageError):
    """An option is correct, but what it needs is missing.

    @ivar status: the exit status of the console script (sysexits(3)).
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


def _fallback(value: str) -> Address:
    return ORIGINAL if value == ORIGINAL.text else _address("fallback")(value)


def _name(text: str) -> str:
    """A name as the server name of validations: in lower case, without the last dot; for an IP
    address, its reverse name (RFC 8738 section 6). Raises C{ValueError}."""
    try:
        bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        return ipaddress.ip_address(bare).reverse_pointer
    except ValueError:
        name = text.removesuffix(".").lower()
    labels = name.removeprefix("*.").split(".")
    if not all(re.fullmatch("[a-z0-9_-]{1,63}", label, re.ASCII) for label in labels):
        raise ValueError(text)
    return name


def _networks(value: str) -> list[Network]:
    networks: list[Network] = []
    for word in value.split(","):
        try:
            networks.append(ipaddress.ip_network(word))
        except ValueError as problem:
            raise ValueError(
                f"--proxy-protocol-from {word!r}: an address or a network is needed, such as"
                f" 192.0.2.1 or 2001:db8::/64: {problem}"
            ) from None
    return networks


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
    """Parse a list of L{WAYS}, or C{none}."""
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
    """An endpoint string to listen at; a port alone means this host only."""
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
    except Exception as problem:  # each kind of endpoint raises its own exceptions
        raise ValueError(
            f"--metrics {value!r}: a port or a server endpoint string is needed, such as"
            f" tcp:9443:interface=127.0.0.1: {problem}"
        ) from None
    return text


def responder_is_installed() -> bool:
    """Check that the responder's packages are installed."""
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
    except KeyError:  # nor a number without a user: the user's groups are needed
        raise Unusable(
            f"--uid {value!r}: there is no such user; list the users with: getent passwd",
            os.EX_NOUSER,
        ) from None


def _group(value: str) -> int:
    try:
        return grp.getgrgid(gidFromString(value)).gr_gid
    except (KeyError, OverflowError):
        raise Unusable(
            f"--gid {value!r}: there is no such group; list the groups with: getent group",
            os.EX_NOUSER,
        ) from None


class ProxyOptions(usage.Options):
    """The options that both ways of starting the proxy accept.

    After parsing, C{alpn} and C{fallback} are L{Address}es, C{alpn-for} a dictionary of them by
    name (see L{acme_alpn_proxy.proxy.routing.Routing}), C{proxy-protocol-from} a list of networks
    or C{None}, C{rulespec} a list of words or C{None}, C{ipv6} a C{bool}, C{redirect} names with
    commas between them.
    """

    synopsis = "Usage: twistd [options] acme-alpn-proxy [options]"
    longdesc = (
        "Receives the new connections to port 443 of this host. Sends those of an ACME validation "
        "(TLS-ALPN-01, RFC 8737) to the ACME client, and all others to the web server."
    )

    optFlags = [  # noqa: RUF012
        [
            "force",
            None,
            About(
                "Steer even if the checks of the firewall and the routes say that visitors"
                " would be lost",
                STEERING,
            ),
        ],
    ]
    optParameters = [  # noqa: RUF012
        [
            "alpn",
            None,
            parse_address("127.0.0.1:31443"),
            About(
                "Where the ACME client answers validations: host:port, [v6]:port or a Twisted"
                " endpoint string",
                TARGETS,
                "ADDRESS",
            ),
            _address("alpn"),
        ],
        [
            "fallback",
            None,
            parse_address("127.0.0.1:443"),
            About(
                "Address of the web server, for all other connections; or the word original: the"
                " address to which the visitor connected",
                TARGETS,
                "ADDRESS",
            ),
            _fallback,
        ],
        [
            "alpn-for",
            None,
            None,
            About(
                "Where the ACME client answers validations of a name. The name may be *.NAME, for"
                " all names below it, or an IP address. May be given several times",
                TARGETS,
                "NAME=ADDRESS",
            ),
        ],
        [
            "alpn-proxy-protocol",
            None,
            "none",
            About(
                "Send the ACME client the visitor's address in a header of the PROXY protocol:"
                " none, v1 or v2. The ACME client must expect this header",
                TARGETS,
                "VERSION",
            ),
            _choice("alpn-proxy-protocol", HEADERS),
        ],
        [
            "fallback-proxy-protocol",
            None,
            "none",
            About(
                "Send the web server the visitor's address in a header of the PROXY protocol:"
                " none, v1 or v2. The web server must be configured to read this header",
                TARGETS,
                "VERSION",
            ),
            _choice("fallback-proxy-protocol", HEADERS),
        ],
        [
            "proxy-protocol-from",
            None,
            None,
            About(
                "Addresses and networks, with commas between them, of load balancers that send a"
                " header of the PROXY protocol. The proxy reads the visitor's address from this"
                " header. It resets a connection from a load balancer that does not begin with the"
                " header",
                TARGETS,
                "NETWORKS",
            ),
            _networks,
        ],
        [
            "redirect",
            None,
            ",".join(WAYS),
            About(
                "How to steer: iptables, nftables (Linux 5.12 or newer) or sk-lookup (BPF, Linux"
                " 5.9 or newer). Of several, with commas between them, the proxy uses the first"
                f" that works. auto: {','.join(AUTO)}. none: the proxy changes nothing, and you"
                f" send the connections to port {PORT} yourself",
                STEERING,
                "WAYS",
            ),
            _ways,
        ],
        [
            "visitor-address",
            None,
            "auto",
            About(
                "Which addresses the web server sees: auto (the visitors' own, if that works on"
                " this host), off (an address of this host), or require (the visitors' own; if"
                " that does not work, the proxy does not start)",
                TARGETS,
                "MODE",
            ),
            _choice("visitor-address", VISITOR_ADDRESS),
        ],
        [
            "hello-timeout",
            None,
            5.0,
            About(
                "Time for a visitor to send a complete ClientHello; after that, the connection goes"
                " to the web server",
                LIMITS,
                "SECONDS",
            ),
            _seconds("hello-timeout"),
        ],
        [
            "connect-timeout",
            None,
            10.0,
            About(
                "Time for the web server or the ACME client to accept a connection; after that, the"
                " proxy resets the visitor's connection",
                LIMITS,
                "SECONDS",
            ),
            _seconds("connect-timeout"),
        ],
        [
            "idle-timeout",
            None,
            0.0,
            About(
                "Time without a byte until an established connection is reset; 0: never",
                LIMITS,
                "SECONDS",
            ),
            _seconds("idle-timeout"),
        ],
        [
            "max-connections",
            None,
            0,
            About(
                "How many visitors the proxy serves at a time; others wait. 0: as many as the limit"
                " on open files allows",
                LIMITS,
                "NUMBER",
            ),
            _count("max-connections"),
        ],
        [
            "linger",
            None,
            15.0,
            About(
                "After a stop, accept connections for at most this time, so that TCP handshakes in"
                " progress can end",
                ENDING,
                "SECONDS",
            ),
            _seconds("linger"),
        ],
        [
            "drain-timeout",
            None,
            180.0,
            About(
                "After a stop, wait for at most this time for open connections to end; then reset"
                " them. Give it to start; with stop --wait, it says how long stop waits",
                ENDING,
                "SECONDS",
            ),
            _seconds("drain-timeout"),
        ],
        [
            "control",
            None,
            None,
            About(
                "Unix socket at which ACME clients of root register the validations that the proxy"
                " answers; by default in the folder of the PID file,"
                " /var/run/acme-alpn-proxy.control",
                RESPONDER,
                "PATH",
            ),
        ],
        [
            "alpn-certs",
            None,
            None,
            About(
                "Folder with challenge certificates to answer with, NAME.crt.pem and NAME.key.pem,"
                " as dehydrated makes them",
                RESPONDER,
                "FOLDER",
            ),
            _folder,
        ],
        [
            "metrics",
            None,
            None,
            About(
                "Where to serve numbers to Prometheus: a port of 127.0.0.1 or a Twisted server"
                " endpoint string",
                PROCESS,
                "ENDPOINT",
            ),
            _metrics,
        ],
    ]

    environment: Mapping[str, str] = os.environ

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Like the base class's, but with Go's single dashes too: C{-alpn ADDR}, C{-alpn=ADDR}."""
        super().parseOptions([self._with_two_dashes(word) for word in options or ()])

    def _with_two_dashes(self, word: str) -> str:
        name = re.match(r"-([a-z][a-z0-9-]+)", word)
        return word if name is None or set(name[1]) <= set(self.shortOpt) else f"-{word}"

    def opt_h(self) -> None:
        """As --help"""
        self.opt_help()

    def opt_alpn_for(self, route: str) -> None:
        """Like the parameter of this name, of which Twisted would keep only the last value."""
        text, equals, where = route.partition("=")
        try:
            name = _name(text)
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(
                f"--alpn-for {route!r}: a name and an address are needed, such as"
                " site.example=127.0.0.1:31444; an internationalized name is needed in its ASCII"
                " form, which begins with xn--"
            )
        self["alpn-for"] = named = self["alpn-for"] or {}
        if name in named:
            raise UsageError(f"--alpn-for {route!r}: there is an address for this name already")
        try:
            named[name] = _address("alpn-for")(where)
        except ValueError as problem:
            raise UsageError(str(problem)) from None

    def postOptions(self) -> None:
        """Checks that need more than one option, or the environment."""
        self["alpn-for"] = self["alpn-for"] or {}
        targets = [("alpn", self["alpn"]), ("fallback", self["fallback"])]
        targets += [("alpn-for", target) for target in self["alpn-for"].values()]
        for option, target in targets:
            if target.is_local_port(PORT):
                client = "web server" if option == "fallback" else "ACME client"
                raise UsageError(
                    f"--{option} {target.text} is the proxy's own port, so the proxy would connect"
                    f" to itself; give the address of the {client}"
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
    """The further options of the console script: a command, and its own options."""

    optFlags = [  # noqa: RUF012
        ["nodaemon", "n", About("Stay in the foreground and log to stderr", PROCESS)],
        [
            "on-demand",
            None,
            About(
                "Steer only while an ACME client waits for a validation, or while a command of"
                " 'acme-alpn-proxy run' needs it",
                STEERING,
            ),
        ],
        ["wait", None, About("Wait until the last connection has ended", ENDING)],
        [
            "probe",
            None,
            About(
                "Steer for a moment, and connect to port 443 from a network namespace of this host",
                COMMAND_FLAGS,
            ),
        ],
        ["json", None, About("Print one JSON document", COMMAND_FLAGS)],
        ["watch", None, About("Show it again every second", COMMAND_FLAGS)],
        [
            "shared",
            None,
            About(
                "If an instance runs already, use it; without this option, exit with 75 in this"
                " case",
                COMMAND_FLAGS,
            ),
        ],
    ]
    optParameters = [  # noqa: RUF012
        [
            "logfile",
            None,
            DEFAULT_LOGFILE,
            About("Where to log in the background", PROCESS, "FILE"),
        ],
        [
            "log-format",
            None,
            "text",
            About("text, or json: one object a line", PROCESS, "FORMAT"),
            _choice("log-format", ("text", "json")),
        ],
        [
            "log-level",
            None,
            "info",
            About(
                "Lowest level to log: debug (one line for each visitor), info, warn or error",
                PROCESS,
                "LEVEL",
            ),
            _choice("log-level", ("debug", "info", "warn", "error")),
        ],
        [
            "uid",
            None,
            None,
            About("The user to run as, when it has begun to steer", PROCESS, "USER"),
            _user,
        ],
        [
            "gid",
            None,
            None,
            About("The group to run as; by default that of --uid", PROCESS, "GROUP"),
            _group,
        ],
    ]

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Options may come before and after the command; words after C{--} are not parsed."""
        given = list(options or ())
        end = given.index("--") if "--" in given else len(given)
        self["argv"] = given[end + 1 :]
        if "hook" in given[:end]:  # words of the client follow, which may begin with a dash
            end = given.index("hook") + 1
            if given[end : end + 1] in (["--help"], ["-help"], ["-h"]):  # before the client's words
                end += 1
            self["argv"] = given[end:]
        words = [self._with_two_dashes(word) for word in given[:end]]
        try:
            parsed, rest = getopt.gnu_getopt(words, self.shortOpt, self.longOpt)
        except getopt.error as problem:
            raise UsageError(str(problem)) from None
        if not {"--help", "-h"}.isdisjoint(name for name, _ in parsed):
            self["argv"], parsed, rest = [], [], ["help", *rest[:1]]
        ordered = [
            f"{name}={value}" if f"{name[2:]}=" in self.longOpt else name for name, value in parsed
        ]
        super().parseOptions([*ordered, "--", *rest])

    def opt_version(self) -> None:
        """Print the version and exit"""
        print(f"acme-alpn-proxy {__version__}", flush=True)
        raise SystemExit(0)

    opt_V = opt_version

    def parseArgs(self, *words: str) -> None:
        """Parse one command, its topic if it takes one, and for C{run} the other program's command
        line."""
        argv = self["argv"]
        self["about"] = ""
        if words[:1] in (("help",), ("completion",)) and not argv:
            words, self["about"] = words[:1], self._about(*words)
        if words[:1] == ("run",) and (len(words) > 1 or not argv):
            raise UsageError(
                "run needs a command after --, for example: acme-alpn-proxy run -- lego run"
            )
        if words[:1] == ("explain",):
            words, self["argv"] = words[:1], list(words[1:])
            argv = []
        command = ALIASES.get(words[0], words[0]) if len(words) == 1 else None
        if command not in COMMANDS or (argv and command not in ("run", "hook")):
            got = f", not {shlex.join([*words, *argv])!r}" if words or argv else ""
            raise UsageError(f"one command is needed, {_one_of(COMMANDS)}{got}")
        self["command"] = command

    def _about(self, command: str, *words: str) -> str:
        """The topic of C{help} or C{completion}; empty for the general help."""
        if command == "completion":
            if len(words) != 1 or words[0] not in SHELLS:
                raise UsageError(f"completion needs the name of a shell, {_one_of(SHELLS)}")
            return words[0]
        about = ALIASES.get(words[0], words[0]) if words else ""
        if len(words) > 1 or (words and about not in COMMANDS):
            raise UsageError(f"help explains one command: {_one_of(COMMANDS)}")
        return about

    def postOptions(self) -> None:
        """Check that the options fit the command, and make paths absolute."""
        super().postOptions()
        for flag, commands in GO_WITH.items():
            if self[flag] and self["command"] not in commands:
                raise UsageError(f"--{flag} works only with {_one_of(commands)}")
        if self["probe"] and self["redirect"] == "none":
            raise UsageError(
                "--probe cannot be used with --redirect none, because it steers: choose another one"
            )
        self["pidfile"] = self.environment.get(PIDFILE_VARIABLE) or DEFAULT_PIDFILE
        if self["on-demand"]:
            self.check_responder("--on-demand")
            if self["uid"] and self["redirect"] == "iptables":
                raise UsageError(
                    "--on-demand with --uid cannot use iptables, because only root can run it;"
                    " choose nftables or sk-lookup with --redirect, or leave out --uid"
                )
        for name in ("pidfile", "logfile"):  # the daemon leaves this folder
            self[name] = os.path.abspath(self[name])


def _one_of(names: Iterable[str]) -> str:
    *but_last, last = names
    return f"{', '.join(but_last)} or {last}" if but_last else last


def of_the_proxy(options: Mapping[str, Any]) -> dict[str, str]:
    """The options of C{start} about the proxy itself, as text, by name.

    They serve to compare two starts. Options of the command itself, such as C{--wait}, are left
    out.

    @param options: parsed L{ConsoleOptions}.
    """
    told = {f"--{name}": _as_text(options[name]) for name, *_ in all_options("optParameters")}
    for name, *_ in all_options("optFlags"):
        if name != "nodaemon" and "start" in GO_WITH.get(name, ("start",)):
            told[f"--{name}"] = "on" if options[name] else "off"
    told[RULESPEC_VARIABLE] = _as_text(shlex.join(options["rulespec"] or ()) or None)
    told[DISABLE_IPV6_VARIABLE] = UNSET if options["ipv6"] else "y"
    return told


def _as_text(value: object) -> str:
    if isinstance(value, dict):
        value = [f"{name}={each}" for name, each in value.items()]
    if isinstance(value, list):
        value = ",".join(map(str, value)) or None
    if value is None:
        return UNSET
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def all_options(kind: str) -> list[Any]:
    """All flags or parameters of the console script, in the form that Twisted expects.

    @param kind: C{optFlags} or C{optParameters}.
    """
    found: list[Any] = []
    accumulateClassList(ConsoleOptions, kind, found)
    return found
