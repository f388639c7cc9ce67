"""C{acme-alpn-proxy explain}: why an order failed, as far as this host could see it.

The CA's own message says what the CA saw; this says what arrived at this host and how it was
answered.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeAlias

from ..addresses import Address, parse_address
from ..host.routes import own_addresses
from ..monitoring.status import SILENT, Answer
from ..proxy.identifiers import (
    BadIdentifier,
    identifier_asked_for,
    parse_identifier,
    server_name_for,
)
from ..proxy.routing import ACME_TLS_1, Route, Routing
from ..proxy.statistics import ANSWERED, NO_NAME, NOT_ANSWERED, UNDER_WAY, VALIDATION_ENDED
from ..responder.server import REFUSED
from ..wording import counted
from .finding import Finding, Level

PERSPECTIVES: Final = 5
"""The number of places (perspectives) from which Let's Encrypt validates, from December 2026 on, at
least."""

_PATIENCE: Final = 5.0
"""Seconds that the ACME client has to answer."""

_LONGEST_LOG: Final = 1 << 20
"""How many bytes at the end of the log are read."""

Lookup: TypeAlias = Callable[[str], Sequence[str]]
"""Returns the numeric addresses of a name; raises L{OSError}."""


class Seen(NamedTuple):
    """A validation that arrived.

    @ivar peer: C{host:port}.
    @ivar name: the server name, or L{NO_NAME}.
    @ivar result: the result, in words.
    """

    peer: str
    name: str
    result: str

    @property
    def host(self) -> str:
        """The peer's address without the port."""
        return self.peer.rpartition(":")[0].strip("[]")


def look_up(name: str) -> Sequence[str]:
    """The addresses that this host's resolver has for a name; raises L{OSError}."""
    found = socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


def explain(
    identifiers: Iterable[str],
    seen: Sequence[Seen],
    target: Callable[[str], str],
    look_up: Lookup = look_up,
) -> Iterator[Finding]:
    """The findings for each identifier; without identifiers, for all whose validations have been
    seen.

    @param seen: the last validations.
    @param target: gives the address to which validations of an identifier go.
    """
    wanted = list(dict.fromkeys(map(parse_identifier, identifiers)))
    asked_for = [identifier_asked_for(each.name) for each in seen]
    names = wanted or list(dict.fromkeys(filter(None, asked_for)))
    if not names and not seen:
        yield Finding(
            "validations",
            Level.FAILED,
            "no validation reached this host",
            "for more about a name: acme-alpn-proxy explain NAME",
        )
    for name in names:
        own = [each for each, asked in zip(seen, asked_for, strict=True) if asked == name]
        yield from _explain(name, own, target(name)) if own else _not_asked(name, seen, look_up)


def _explain(name: str, seen: Sequence[Seen], target: str) -> Iterator[Finding]:
    results = Counter(each.result for each in seen)
    hosts = {each.host for each in seen}
    for result, count in results.items():
        yield _of_result(name, result, count, target)
    if set(results) == {ANSWERED} and len(hosts) < PERSPECTIVES:
        yield Finding(
            name,
            Level.WARNING,
            f"validations came from {counted(len(hosts), 'address', 'addresses')}"
            f" ({', '.join(sorted(hosts))}), but a CA may use {PERSPECTIVES} or more",
            "check whether a firewall between this host and the Internet blocks some countries or"
            " networks",
        )


def _of_result(name: str, result: str, count: int, target: str) -> Finding:
    times = counted(count, "validation")
    if result == ANSWERED:
        return Finding(name, Level.OK, f"answered: {times}")
    if result == REFUSED:
        return Finding(
            name,
            Level.FAILED,
            f"{times}, but no ACME client had registered this name with the proxy, and no program"
            f" listens at {target}",
            "start the ACME client so that it listens there, or let the proxy answer (see:"
            " acme-alpn-proxy help hook)",
        )
    if result.startswith("unreachable"):
        return Finding(
            name,
            Level.FAILED,
            f"{times}, but {target} cannot be reached ({result.partition(': ')[2]})",
            "start the ACME client, or give its address with --alpn",
        )
    if result == NOT_ANSWERED:
        return Finding(
            name,
            Level.FAILED,
            f"{times}, but the ACME client at {target} closed them without an answer",
            "see the log of the ACME client: perhaps it answers only for other names, or has ended",
        )
    if result == UNDER_WAY:
        return Finding(name, Level.WARNING, f"under way: {times}", "run this again in a minute")
    return Finding(
        name,
        Level.FAILED,
        f"{times}: {result}",
        "see the error of the CA in the output of the ACME client (perhaps the connection came from"
        " a scanner, not from a CA)",
    )


def _not_asked(name: str, seen: Sequence[Seen], look_up: Lookup) -> Iterator[Finding]:
    others = sorted({identifier_asked_for(each.name) or each.name for each in seen})
    if others:
        yield Finding(
            name,
            Level.FAILED,
            f"no validation for this name arrived, but for {', '.join(others)} validations arrived",
            "check that the order contains this name, and that its DNS records point to this host",
        )
    else:
        yield Finding(
            name,
            Level.FAILED,
            "no validation for this name arrived",
            "check that the DNS records of the name point to this host, and that port 443 is"
            " reachable from the whole Internet",
        )
    yield from _records(name, look_up)


def _records(name: str, look_up: Lookup) -> Iterator[Finding]:
    try:
        addresses = look_up(name)
    except OSError as problem:
        why = problem.strerror or str(problem)
        if problem.errno == socket.EAI_AGAIN:
            yield Finding(
                name,
                Level.WARNING,
                f"its addresses are not known here: {why}",
                "check whether the resolver of this host works (/etc/resolv.conf)",
            )
        else:
            yield Finding(
                name,
                Level.FAILED,
                f"it has no address: {why}",
                "create an A or AAAA record with the address of this host",
            )
        return
    own = {str(address) for address in own_addresses()}
    for address in addresses:
        if address in own:
            yield Finding(name, Level.OK, f"{address} is an address of this host")
        elif ":" in address:
            yield Finding(
                name,
                Level.FAILED,
                f"its AAAA record {address} is no address of this host, and a CA tries IPv6 first",
                "correct the record, or remove it",
            )
        else:
            yield Finding(
                name,
                Level.WARNING,
                f"its A record {address} is no address of this host",
                "check that a router forwards port 443 of that address to this host",
            )


def answer_of(target: Address, identifier: str) -> Iterator[Finding]:
    """What a CA would see now if it validated C{identifier} at an ACME client at C{target}."""
    from cryptography import x509

    from ..responder.certificates import faults

    where = target.socket_address()
    if where is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([ACME_TLS_1.decode()])
    try:
        with socket.socket(where[0], socket.SOCK_STREAM) as plain:
            plain.settimeout(_PATIENCE)
            plain.connect(where[1])
            with context.wrap_socket(plain, server_hostname=server_name_for(identifier)) as tls:
                agreed, der = tls.selected_alpn_protocol(), tls.getpeercert(binary_form=True)
    except ConnectionRefusedError:
        return  # it has ended, as clients do after an order
    except (OSError, ValueError) as problem:
        yield Finding(
            identifier,
            Level.WARNING,
            f"the TLS handshake with {target} fails: {problem}",
            "see the log of the ACME client",
        )
        return
    assert der is not None
    told = [] if agreed else ["it does not agree on acme-tls/1"]
    told += faults(x509.load_der_x509_certificate(der), identifier, None)
    for fault in told:
        yield Finding(
            identifier,
            Level.FAILED,
            f"a CA would refuse the answer of {target}: {fault}",
            "give the ACME client's address with --alpn, or let the proxy answer (see:"
            " acme-alpn-proxy help hook)",
        )


def from_log(lines: Iterable[str]) -> list[Seen]:
    """The validations in a log, as text or JSON, since the last start of the proxy."""
    pattern = re.compile(
        re.escape(VALIDATION_ENDED).replace(r"\{", "(?P<").replace(r"\}", ">.*?)") + "$"
    )
    found: list[Seen] = []
    for line in lines:
        text = line
        if line.startswith("{"):
            try:
                text = str(json.loads(line)["message"])
            except (KeyError, TypeError, ValueError):
                continue
        if "Started: " in text:
            found.clear()
        match = pattern.search(text)
        if match is not None:
            found.append(Seen(match["peer"], match["server_name"], match["result"]))
    return found


def last_lines(path: str) -> Sequence[str]:
    """The end of the log; raises L{OSError}."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _LONGEST_LOG))
        return file.read().decode(errors="replace").splitlines()


def explain_last_order(options: Mapping[str, Any], answers: Sequence[Answer]) -> list[Finding]:
    """The findings about the last order, from running instances or, if none runs, from the log.

    @param options: parsed L{acme_alpn_proxy.options.ConsoleOptions}; C{argv} has the identifiers.
    @param answers: the answers of the running instances.
    """
    alpn, named = str(options["alpn"]), {**options["alpn-for"]}
    seen: list[Seen] = []
    running = [answer for answer in answers if answer["state"] != SILENT]
    for answer in running:
        seen += [
            Seen(each["peer"], each["server_name"] or NO_NAME, each["result"])
            for each in answer["validations"]
        ]
        routes = answer["routes"]
        alpn = routes["acme"]["target"]
        named = {name: route["target"] for name, route in routes["acme_for"].items()}
    findings: list[Finding] = []
    if not running:
        try:
            seen = from_log(last_lines(options["logfile"]))
        except OSError as problem:
            findings.append(
                Finding(
                    "log",
                    Level.WARNING,
                    f"nothing runs, and {options['logfile']} cannot be read: {problem.strerror}",
                    "run this as root, or name the log of the last order with --logfile",
                )
            )
    routing = Routing(
        Route("acme", alpn),
        Route("fallback", ""),
        {name: Route("acme", str(where)) for name, where in named.items()},
    )

    def target(identifier: str) -> str:
        return routing.route_for(server_name_for(identifier)).target

    findings += explain(options["argv"], seen, target)
    for text in dict.fromkeys(each.name for each in findings):
        with suppress(BadIdentifier):
            identifier = parse_identifier(text)
            findings += answer_of(parse_address(target(identifier)), identifier)
    return findings
