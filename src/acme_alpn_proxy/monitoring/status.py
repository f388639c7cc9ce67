"""Asking instances for their status, through their sockets.

An instance listens on a Unix socket next to its PID file. Only root and the user who started the
instance may connect. The socket's name contains the PID, so that a draining instance and its
successor can both be found. The instance writes one line, a JSON object, to each connection.
docs/operations.md describes it.
"""

from __future__ import annotations

import json
import os
import re
import socket
from typing import Final, Literal, TypeAlias, TypedDict

from ..errors import StartError
from ..host.unixsockets import peer_of, remove_if_dead, short

VERSION: Final = 1
"""The version of the answer. It grows when a field is removed or changes its meaning, not when one
is added."""


class ValidationStatus(TypedDict):
    """A validation; see L{acme_alpn_proxy.proxy.statistics.Validation}."""

    peer: str
    server_name: str | None
    at: float
    result: str


class RouteStatus(TypedDict):
    """A route's numbers; see L{acme_alpn_proxy.proxy.statistics.RouteCount}."""

    target: str
    live: int
    total: int
    failures: int
    bytes_from_visitors: int
    bytes_to_visitors: int


class AcmeStatus(RouteStatus):
    """The numbers of the ACME client's route, and how many validations the proxy has reset."""

    cut_short: int


class FallbackStatus(RouteStatus):
    """The numbers of the fallback's route.

    @ivar reasons: for each reason why connections went to the fallback, their number.
    @ivar from_visitor_address: how many the web server saw with the visitor's own address.
    @ivar from_host_address: how many it saw with an address of this host.
    """

    reasons: dict[str, int]
    from_visitor_address: int
    from_host_address: int


class RoutesStatus(TypedDict):
    """All routes.

    @ivar acme_for: validations of certain names, by the name.
    """

    acme: AcmeStatus
    acme_for: dict[str, RouteStatus]
    fallback: FallbackStatus


class PendingStatus(TypedDict):
    """A pending identifier; see L{acme_alpn_proxy.responder.pending.Authorization}.

    @ivar seconds_left: seconds until it is no longer pending.
    """

    identifier: str
    asked_by: str
    seconds_left: float
    answered: int


State: TypeAlias = Literal["starting", "idle", "running", "draining"]
"""C{idle}: it steers when an identifier is pending or a command needs it."""


class ProxyStatus(TypedDict):
    """What a proxy reports about itself; see L{acme_alpn_proxy.proxy.statistics.Statistics}."""

    state: State
    since: float
    redirect: str
    undecided: int
    routes: RoutesStatus
    last_validation: ValidationStatus | None
    validations: list[ValidationStatus]


class DaemonStatus(ProxyStatus):
    """What a proxy with a process of its own reports about itself.

    @ivar on_demand: whether it steers only while something needs it.
    @ivar pending: the identifiers that it answers for, at most L{PENDING_SHOWN} of them.
    @ivar pending_count: the number of all these identifiers.
    """

    on_demand: bool
    pending: list[PendingStatus]
    pending_count: int


class InstanceStatus(DaemonStatus):
    """The answer of an instance.

    @ivar holders: how many commands of C{run --shared} use it.
    @ivar options: the options of its C{start}; see L{acme_alpn_proxy.options.of_the_proxy}.
    """

    version: int
    program: str
    pid: int
    holders: int
    options: dict[str, str]


class SilentInstance(TypedDict):
    """Used in place of an answer for an instance that runs but does not answer."""

    version: int
    pid: int
    state: Literal["silent"]


Answer: TypeAlias = InstanceStatus | SilentInstance

SILENT: Final = "silent"
"""The state of an instance that runs but does not answer."""

PENDING_SHOWN: Final = 50
"""How many pending identifiers an answer has: it must stay well below L{_LONGEST_ANSWER}."""

_COUNTS: Final = ("live", "total", "failures", "bytes_from_visitors", "bytes_to_visitors")
_PENDING_NUMBERS: Final[tuple[Literal["seconds_left", "answered"], ...]] = (
    "seconds_left",
    "answered",
)
_PENDING_TEXTS: Final[tuple[Literal["identifier", "asked_by"], ...]] = ("identifier", "asked_by")
_NEW_FIELDS: Final = {
    "holders": 0,
    "options": {},
    "on_demand": False,
    "pending": (),
    "pending_count": 0,
    "validations": (),
}
_LONGEST_ANSWER: Final = 1_048_576
"""The longest answer that is read, in bytes. Each name with a target of its own takes at most
500."""

_LIMIT: Final = 2**53
"""The limit for numbers in an answer: JSON is exact below it (RFC 8259 section 6)."""

_PATIENCE: Final = 2.0
"""Seconds to wait for an answer; a normal one takes a millisecond."""


def socket_path(pidfile: str, pid: int) -> str:
    """The path of the socket of the instance C{pid} with that PID file."""
    return f"{pidfile.removesuffix('.pid')}.{pid}.sock"


def sockets(pidfile: str) -> dict[int, str]:
    """The sockets of all instances with that PID file, dead ones included, by PID."""
    folder, stem = os.path.split(pidfile.removesuffix(".pid"))
    pattern = re.compile(re.escape(stem) + r"\.([0-9]+)\.sock")
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    matches = sorted((int(match[1]), match[0]) for match in map(pattern.fullmatch, names) if match)
    return {pid: os.path.join(folder, name) for pid, name in matches}


def remove_stale(pidfile: str) -> None:
    """Remove the sockets of killed instances, if this process may do that."""
    for path in sockets(pidfile).values():
        remove_if_dead(path)


def ask(path: str) -> InstanceStatus | None:
    """The answer of the instance at that socket; L{None} if the instance is ending, or if the
    answer cannot be understood. Raises L{OSError}.

    C{ConnectionRefusedError} means that its process has ended.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream, short(path) as name:
        stream.settimeout(_PATIENCE)
        stream.connect(name)
        if peer_of(stream).uid not in (0, os.geteuid()):
            raise PermissionError(f"{path} is another user's")  # in a folder that all may write to
        return _checked(stream.makefile("rb").readline(_LONGEST_ANSWER))


def request(pidfile: str, pid: int, word: str, patience: float = _PATIENCE) -> socket.socket | None:
    """Send a request to the instance C{pid}: C{hold}, C{leave} or C{keep}; see
    L{acme_alpn_proxy.monitoring.statussocket}.

    @param patience: seconds to wait for each line of the answer.

    @return: the connection, which holds the instance until it is closed; L{None} if there is no
        instance.

    Raises L{StartError} if the instance cannot do what is asked.
    """
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    answer = b""
    try:
        with short(socket_path(pidfile, pid)) as name:
            stream.settimeout(patience)
            stream.connect(name)
            stream.sendall(f"{word}\n".encode())
            reader = stream.makefile("rb")
            reader.readline(_LONGEST_ANSWER)  # every connection first gets the status line
            answer = reader.readline(_LONGEST_ANSWER)
    except OSError:
        pass
    if answer == b"OK\n":
        return stream
    stream.close()
    refusal = re.fullmatch(rb"ERR ([0-9]{1,3}) (.*)\n", answer)
    if refusal is not None and (why := refusal[2].decode(errors="replace")).isprintable():
        raise StartError(*(why, int(refusal[1])))  # the documented error of the instance, passed on
    return None


def _checked(line: bytes) -> InstanceStatus | None:
    """The answer, if it has all fields: another release, or another program, may run there."""
    try:
        answer: InstanceStatus = json.loads(line)
        acme, fallback = answer["routes"]["acme"], answer["routes"]["fallback"]
        named = answer["routes"].setdefault("acme_for", {})
        routes = (acme, fallback, *named.values())
        counts = [value for route in routes for value in map(route.get, _COUNTS)]
        last = answer["last_validation"]
        for field, nothing in _NEW_FIELDS.items():  # older releases do not have them
            answer.setdefault(field, nothing)  # type: ignore[misc]
        numbers = [answer["pid"], answer["since"], answer["undecided"], answer["holders"], *counts]
        numbers += [each[field] for each in answer["pending"] for field in _PENDING_NUMBERS]
        texts = [answer["state"], answer["redirect"], *(route["target"] for route in routes)]
        texts += [text for option in answer["options"].items() for text in option]
        texts += [each["peer"] for each in answer["validations"]]
        texts += [each[field] for each in answer["pending"] for field in _PENDING_TEXTS]
        texts += [*fallback["reasons"], *named]
        numbers += fallback["reasons"].values()
        numbers += [fallback.setdefault("from_visitor_address", 0)]  # older releases have none
        numbers += [fallback.setdefault("from_host_address", 0)]
        if last is not None:
            numbers.append(last["at"])
            texts += [last["peer"], last["result"], last["server_name"] or ""]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None
    whole = all(isinstance(each, int | float) and 0 <= each < _LIMIT for each in numbers)
    whole &= all(isinstance(text, str) and text.isprintable() for text in texts)
    return answer if whole else None


def instances(pidfile: str, owner: int | None) -> list[Answer]:
    """The answers of all live instances; raises L{StartError} if one may not be asked.

    @param owner: the PID of the instance that holds the PID file. It is in the list even if it does
        not answer.
    """
    found: dict[int, Answer] = {}
    for pid, path in sockets(pidfile).items():
        try:
            answer = ask(path)
        except PermissionError:
            raise StartError(
                f"no permission to read the status of PID {pid}; run this as root", os.EX_NOPERM
            ) from None
        except (OSError, ValueError):
            continue  # it has ended or is ending
        if answer:
            found[pid] = answer
    if owner is not None and owner not in found:
        found[owner] = {"version": VERSION, "pid": owner, "state": SILENT}
    return list(found.values())
