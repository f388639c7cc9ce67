"""Whether the web server is where the visitors will be sent; looked at before any is steered."""

from __future__ import annotations

import ipaddress
import os
import socket

from twisted.logger import Logger

from ..addresses import HTTPS, Address
from ..errors import StartError
from ..host.tcpsockets import listeners

_log = Logger()


def require_web_server(fallback: Address, seconds: float) -> None:
    """Connect to the fallback, and say what visitors should know. Blocks; raises L{StartError}.

    @param seconds: for each address of a host name to answer.
    """
    try:
        _connect(fallback, seconds)
    except OSError as problem:
        there = [each for each in listeners(HTTPS) if not _is_any(each)]
        remedy = "start the web server, or name its address with --fallback"
        if there:
            remedy = (
                f"port 443 is served at {', '.join(there)}: name one with --fallback {there[0]}"
            )
        why = problem.strerror or str(problem)
        raise StartError(
            f"nobody answers at {fallback.text}, where visitors would be sent: {why}; {remedy}",
            os.EX_CONFIG,
        ) from None
    _warn_of_several_sites(fallback)


def _connect(target: Address, seconds: float) -> None:
    """Raises C{OSError}. Endpoints other than C{tcp:} and C{unix:} are Twisted's to connect."""
    if target.host:
        socket.create_connection((target.host, target.port), seconds).close()
    elif target.text.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(seconds)
            stream.connect(target.text.removeprefix("unix:").split(":")[0].replace("path=", "", 1))


def _is_any(end: str) -> bool:
    return end.startswith(("0.0.0.0:", "[::]:"))


def _warn_of_several_sites(fallback: Address) -> None:
    """Sites with servers of their own, on addresses of their own, cannot all be the fallback."""
    hosts = [ipaddress.ip_address(each.rpartition(":")[0].strip("[]")) for each in listeners(HTTPS)]
    if any(host.is_unspecified for host in hosts):
        return
    for version in (4, 6):
        found = [str(each) for each in hosts if each.version == version and not each.is_loopback]
        if len(found) > 1:
            _log.warn(
                "Port 443 is served at several addresses ({hosts}): while new connections are"
                " steered, the visitors of all of them get what answers at {fallback}",
                hosts=", ".join(found),
                fallback=fallback.text,
            )
