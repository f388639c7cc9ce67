"""Asking the daemon over its control socket, without Twisted: for C{hook} and for certbot.

A request is one line, and so is the answer: C{OK}, C{OK TEXT}, or C{ERR WHY}. The requests are
C{auth IDENT DIGEST [SECONDS]}, C{unauth IDENT} and C{report IDENT}. The first two and their answers
are those of ualpn(1), which is part of uacme.
"""

from __future__ import annotations

import socket
import time
from typing import Final

_LONGEST_ANSWER: Final = 65_536
"""Bytes: far more than a report has, and few enough to keep in memory."""


class ControlError(Exception):
    """The daemon did not do what was asked; the text is one line, the cause before the remedy.

    It may have done a part of it, except after L{NotListening} and L{Refused}: then it did nothing.
    """


class NotListening(ControlError):
    """No daemon listens at that path."""


class Refused(ControlError):
    """The daemon has answered C{ERR}; the text is the rest of that line."""


def control_path(pidfile: str) -> str:
    """The default path of the control socket for the daemon with that PID file."""
    return f"{pidfile.removesuffix('.pid')}.control"


def ask(path: str, line: str, seconds: float = 60.0) -> str:
    """Ask the daemon at C{path}, and return the text after C{OK}; empty if the answer is only
    C{OK}.

    @param line: the request, without the line end.
    @param seconds: for the whole exchange; with C{start --on-demand}, the first C{auth} is answered
        when the daemon steers, which may take some seconds.

    Raises L{ControlError}.
    """
    if "\n" in line:
        raise ControlError(f"{line!r} is more than one line; give one name at a time")
    try:
        answer = _exchange(path, line.encode() + b"\n", time.monotonic() + seconds)
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotListening(
            f"no instance listens at {path}; start one: acme-alpn-proxy start"
        ) from None
    except PermissionError:
        raise ControlError(
            f"no permission to use the control socket {path}; run this as root"
        ) from None
    except TimeoutError:
        raise ControlError(
            f"no answer at {path} within {seconds:g} s; see the log of the instance"
        ) from None
    except OSError as problem:
        raise ControlError(
            f"cannot send a request to {path}: {problem}; see: acme-alpn-proxy status"
        ) from None
    word, _, rest = answer.decode(errors="replace").removesuffix("\n").partition(" ")
    if word == "ERR":
        raise Refused(rest)
    if word != "OK" or not answer.endswith(b"\n"):
        raise ControlError(f"the instance at {path} gave no answer; see its log")
    return rest


def _exchange(path: str, request: bytes, deadline: float) -> bytes:
    """Send the request; return the bytes up to a line end, or until the daemon closes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_left(deadline))
        connection.connect(path)
        connection.sendall(request)
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < _LONGEST_ANSWER:
            connection.settimeout(_left(deadline))
            piece = connection.recv(_LONGEST_ANSWER)
            if not piece:
                break
            answer += piece
    return answer


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
