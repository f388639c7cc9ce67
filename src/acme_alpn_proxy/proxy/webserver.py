"""Check, before any visitor is steered, that the web server answers where they will be sent."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Final

from twisted.logger import Logger

from ..addresses import HTTPS, Address
from ..errors import StartError, refused_by_system
from ..host.routes import own_addresses
from ..host.tcpsockets import listeners

OWN_ANSWER: Final = 1.0
"""Seconds for each of this host's own addresses to answer; normally less than a millisecond, but
the firewall may drop the SYN."""

START_WEB_SERVER: Final = "start the web server, or give its address with --fallback"

_log = Logger()


def require_web_server(fallback: Address, seconds: float) -> None:
    """Connect to the fallback, and warn of what it cannot do. Blocks; raises L{StartError}.

    @param seconds: how long each address may take to answer.
    """
    if fallback.is_original:
        _require_a_site()
        return
    try:
        _connect(fallback, seconds)
    except OSError as problem:
        there = [each for each in listeners(HTTPS) if not _is_any(each)]
        remedy = START_WEB_SERVER
        if there:
            remedy = f"start the web server there, or use --fallback {there[0]}"
            others = ", ".join(there[1:])
            remedy += (
                f" (servers listen there and at {others})" if others else ", where one listens"
            )
        why = problem.strerror or str(problem)
        raise StartError(
            f"no web server answers at {fallback.text}, the address of --fallback: {why}; {remedy}",
            os.EX_CONFIG,
        ) from None
    _warn_of_several_sites(fallback)


def _require_a_site() -> None:
    served, others = sites()
    if not served:
        raise StartError(
            f"no web server answers on port 443 at any address of this host; {START_WEB_SERVER}",
            os.EX_CONFIG,
        )
    if others:
        _log.info(
            "No web server answers on port 443 of {hosts}: while the proxy steers, it resets the"
            " connections to port 443 there",
            hosts=", ".join(others),
        )


def sites() -> tuple[list[str], list[str]]:
    """The addresses of this host that answer on port 443, and those that do not. Addresses that
    only this host or its links can reach are left out. Blocks; raises L{StartError}.
    """
    try:
        own = own_addresses()
    except OSError as problem:
        raise refused_by_system(problem) from None
    served, others = [], []
    for address in sorted(own, key=lambda each: (each.version, each)):
        if not address.is_loopback and not address.is_link_local:
            host = str(address)
            try:  # from the same address, as the proxy does
                socket.create_connection((host, HTTPS), OWN_ANSWER, (host, 0)).close()
            except OSError:
                others.append(host)
            else:
                served.append(host)
    return served, others


def _connect(target: Address, seconds: float) -> None:
    """Raises C{OSError}. Endpoints other than C{tcp:} and C{unix:} are left to Twisted."""
    if target.host:
        socket.create_connection((target.host, target.port), seconds).close()
    elif target.text.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(seconds)
            stream.connect(target.text.removeprefix("unix:").split(":")[0].replace("path=", "", 1))


def _is_any(end: str) -> bool:
    return end.startswith(("0.0.0.0:", "[::]:"))


def _warn_of_several_sites(fallback: Address) -> None:
    """Warn if several addresses have web servers of their own: only one can be the fallback."""
    hosts = [ipaddress.ip_address(each.rpartition(":")[0].strip("[]")) for each in listeners(HTTPS)]
    if any(host.is_unspecified for host in hosts):
        return
    for version in (4, 6):
        found = [str(each) for each in hosts if each.version == version and not each.is_loopback]
        if len(found) > 1:
            _log.warn(
                "Web servers listen on port 443 of several addresses ({hosts}): while the proxy"
                " steers, the visitors of all of them reach {fallback}; to keep the sites separate,"
                " use --fallback original",
                hosts=", ".join(found),
                fallback=fallback.text,
            )
