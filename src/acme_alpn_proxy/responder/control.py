"""The control socket: here ACME clients say which identifiers are pending.

A request is a line of words. So is the answer: C{OK}, with a space and a text if there is one, or
C{ERR WHY}.

  - C{auth IDENT DIGEST [SECONDS]}: answer validations of C{IDENT}, for C{SECONDS} seconds;
  - C{unauth IDENT}: stop answering them;
  - C{report IDENT}: one JSON object (L{Report}) with what has been seen for C{IDENT};
  - C{leave}: end the program as soon as nothing is pending and no command needs it.

The first two are those of ualpn(1), which is part of uacme. The client's side is
L{acme_alpn_proxy.responder.client}.
"""

from __future__ import annotations

import errno
import json
import socket
import sys
from collections.abc import Callable, Generator, Iterable
from typing import Any, Final, TypedDict, cast

from twisted.application.service import Service
from twisted.internet.defer import (
    Deferred,
    DeferredLock,
    inlineCallbacks,
    maybeDeferred,
    succeed,
)
from twisted.internet.interfaces import IAddress, IHalfCloseableProtocol
from twisted.internet.protocol import Factory, connectionDone
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.protocols.basic import LineOnlyReceiver
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from zope.interface import implementer

from ..errors import StartError
from ..host.unixlistener import UnixListener
from ..host.unixsockets import program_at_other_end
from ..interfaces import ISteerable, Reactor
from ..monitoring.status import ValidationStatus
from ..proxy.identifiers import BadIdentifier, parse_identifier
from .pending import LIFETIME, BadRequest, Pending, parse_digest, parse_lifetime

PATIENCE: Final = 60.0
"""Seconds for a client to send a line."""

LONGEST_LINE: Final = 1024
"""Bytes of a line; a name has 253 and a digest 64."""

_LIMITS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

MOST_CLIENTS: Final = 64
"""Connections at a time; any further connection is closed at once."""


class Asked(TypedDict):
    """A connection of a CA, or of a client that pretends to be one.

    @ivar name: the server name that it asked for; C{None} if it sent none.
    @ivar answer: the result, in words.
    """

    peer: str
    name: str | None
    answer: str


class Report(TypedDict):
    """What has been seen for an identifier.

    @ivar answered: how many handshakes for it have been completed.
    @ivar asked: the last few validations, also those for other identifiers.
    """

    identifier: str
    answered: int
    asked: list[Asked]


def load() -> None:
    """Load the modules that answer validations, and use them once: they load more when they are
    used.

    With C{--uid}, call this before the privileges are dropped: the user may not be able to read the
    files.
    """
    from .tls import load_all

    load_all()


def load_in_thread() -> Deferred[object]:
    """Load them in a thread, so that visitors do not wait: the first time, loading takes a tenth of
    a second."""
    return succeed(None) if f"{__package__}.tls" in sys.modules else deferToThread(load)


class Control:
    """Carries out the clients' requests."""

    _log = Logger()

    def __init__(
        self,
        pending: Pending,
        proxy: ISteerable,
        validations: Callable[[], Iterable[ValidationStatus]],
        leave: Callable[[], None],
        load: Callable[[], Deferred[object]] = load_in_thread,
    ) -> None:
        """
        @param proxy: must steer while something is pending.
        @param validations: returns the last ones.
        @param leave: called when nothing is pending any more, if a client has asked for that.
        @param load: loads the responder's modules; its Deferred fires when that is done.
        """
        self._load = load
        self._pending = pending
        self._proxy = proxy
        self._validations = validations
        self._leave_program = leave
        self._leaving = False
        pending.on_empty = self._emptied

    def request(self, line: str, asked_by: str) -> Deferred[str]:
        """Carry out the request on a line.

        @param asked_by: the program at the other end, for people.

        @return: a Deferred of the text after C{OK}. It fails with L{BadRequest},
            L{BadIdentifier} or L{StartError}.
        """
        return cast("Deferred[str]", maybeDeferred(self._do, line, asked_by))

    def _do(self, line: str, asked_by: str) -> Any:
        word, *words = line.split() or [""]
        requests: dict[str, tuple[range, Callable[..., Any]]] = {
            "auth": (range(2, 4), self._auth),
            "unauth": (range(1, 2), self._unauth),
            "report": (range(1, 2), self._report),
            "leave": (range(1), self._leave),
        }
        numbers, function = requests.get(word, (range(0), None))
        if function is None or len(words) not in numbers:
            raise BadRequest(
                "a line is: auth IDENT DIGEST [SECONDS], unauth IDENT, report IDENT, or leave"
            )
        return function(asked_by, *words)

    @inlineCallbacks
    def _auth(
        self, asked_by: str, identifier: str, digest: str, seconds: str = f"{LIFETIME:g}"
    ) -> Generator[Deferred[Any], Any, str]:
        identifier, lifetime = parse_identifier(identifier), parse_lifetime(seconds)
        checked = parse_digest(digest)
        yield self._load()
        self._pending.add(identifier, checked, asked_by, lifetime)
        self._log.info(
            "The proxy answers validations of {identifier}, for at most {seconds:g} s, as requested"
            " by {asked_by}",
            identifier=identifier,
            seconds=lifetime,
            asked_by=asked_by,
        )
        try:
            yield self._proxy.need(self)
        except StartError:
            self._pending.remove(identifier)
            raise
        return ""

    def _unauth(self, asked_by: str, identifier: str) -> str:
        checked = parse_identifier(identifier)
        authorization = self._pending.get(checked)
        if authorization is not None:
            self._log.info(
                "The proxy no longer answers validations of {identifier}; validations answered:"
                " {count}",
                identifier=checked,
                count=authorization.answered,
            )
            self._pending.remove(checked)
        return ""

    def _report(self, asked_by: str, identifier: str) -> str:
        checked = parse_identifier(identifier)
        authorization = self._pending.get(checked)
        report: Report = {
            "identifier": checked,
            "answered": 0 if authorization is None else authorization.answered,
            "asked": [
                {"peer": each["peer"], "name": each["server_name"], "answer": each["result"]}
                for each in self._validations()
            ],
        }
        return json.dumps(report)

    def _leave(self, asked_by: str) -> str:
        self._leaving = True
        if not self._pending:
            self._emptied()
        return ""

    def _emptied(self) -> None:
        self._proxy.needed_no_more(self)
        if self._leaving:
            self._leaving = False
            self._leave_program()


@implementer(IHalfCloseableProtocol)
class ControlProtocol(LineOnlyReceiver, TimeoutMixin):
    """The connection of one client. Its lines are answered one after the other."""

    _log = Logger()
    delimiter = b"\n"
    MAX_LENGTH = LONGEST_LINE
    factory: ControlFactory
    transport: Any

    def __init__(self, asked_by: str) -> None:
        self._asked_by = asked_by
        self._turns = DeferredLock()

    def connectionMade(self) -> None:
        self.factory.clients += 1
        self.setTimeout(PATIENCE)

    def lineReceived(self, line: bytes) -> None:
        self.setTimeout(None)
        self._turns.run(self._answer, line.removesuffix(b"\r"))

    def lineLengthExceeded(self, line: bytes) -> None:
        self._turns.run(self._end, f"ERR a line has {LONGEST_LINE} bytes at most\n".encode())

    def readConnectionLost(self) -> None:
        self._turns.run(self._end)

    def writeConnectionLost(self) -> None:
        """Nothing to do: the answers have been sent."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.clients -= 1
        self.setTimeout(None)

    @inlineCallbacks
    def _answer(self, line: bytes) -> Generator[Deferred[Any], Any, None]:
        try:
            text = yield self.factory.control.request(line.decode("ascii"), self._asked_by)
        except UnicodeDecodeError:
            answer = "ERR a line is ASCII; write an internationalized name as its A-label (xn--)"
        except (BadRequest, BadIdentifier, StartError) as problem:
            answer = f"ERR {problem}"
        except Exception:
            self._log.failure("Internal error: a client of the control socket got no answer")
            answer = "ERR internal error; see the log"
        else:
            answer = f"OK {text}".rstrip()
        self.transport.write(f"{answer}\n".encode("ascii", "backslashreplace"))
        self.setTimeout(PATIENCE)

    def _end(self, last: bytes = b"") -> None:
        self.transport.write(last)
        self.transport.loseConnection()


class ControlFactory(Factory):
    """Makes a L{ControlProtocol} for each client.

    @ivar clients: how many are connected.
    """

    noisy = False

    def __init__(self, control: Control) -> None:
        self.control = control
        self.clients = 0


class _One(Factory):
    """Makes the protocol of one client."""

    noisy = False

    def __init__(self, factory: ControlFactory, asked_by: str) -> None:
        self._factory = factory
        self._asked_by = asked_by

    def buildProtocol(self, addr: IAddress | None) -> Any:
        protocol = ControlProtocol(self._asked_by)
        protocol.factory = self._factory
        return protocol


class ControlService(Service):
    """Listens from its start, when the process still has its privileges, until the program stops
    steering for good."""

    def __init__(self, reactor: Reactor, path: str, control: Control) -> None:
        self._reactor = reactor
        self._path = path
        self._factory = ControlFactory(control)
        self._listener = UnixListener(reactor, path, self._accepted)

    def privilegedStartService(self) -> None:
        """Start listening; raises L{StartError}, or L{OSError} at a limit of the system."""
        try:
            self._listener.open()
        except OSError as problem:
            if problem.errno in _LIMITS:
                raise
            raise StartError(
                f"cannot listen on {self._path}: {problem.strerror or problem}; give another path"
                " with --control"
            ) from None

    def stopService(self) -> None:
        """Stop listening."""
        super().stopService()
        self._listener.close()

    def _accepted(self, stream: socket.socket) -> None:
        with stream:
            if self._factory.clients < MOST_CLIENTS:
                one = _One(self._factory, program_at_other_end(stream))
                self._reactor.adoptStreamConnection(stream.fileno(), socket.AF_UNIX, one)
