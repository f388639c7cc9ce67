"""Connections that come through a load balancer, which says who the visitor is (PROXY protocol).

Only the networks that the operator names may do that: a stranger could claim any address.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any, Final, TypeAlias

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IProtocolFactory, IStreamServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger
from twisted.protocols.haproxy import proxyEndpoint
from zope.interface import implementer

from ..host.tcpsockets import shown
from ..transports.sockets import Arrival
from .clienthello import NeedMore
from .header import BadHeader, size_of
from .protocols import ProxyServer, end_of

Network: TypeAlias = IPv4Network | IPv6Network

_IP: Final = (IPv4Address, IPv6Address)

_NONSENSE: Final = "its fields make no sense"


class Balancers:
    """The networks whose connections begin with a header."""

    _log = Logger()

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks
        self._reported = False

    def new_server(self) -> ProxyServer:
        """Make the protocol for a connection from any address."""
        return BalancedServer(self)

    def __contains__(self, host: str) -> bool:
        address = ip_address(host.partition("%")[0])
        return any(address in network for network in self._networks)

    def report(self, balancer: tuple[str, int], why: str) -> None:
        """A connection was refused. Only the first one is logged."""
        if not self._reported:
            self._reported = True
            self._log.warn(
                "The proxy has reset a connection from {balancer}, because it did not begin with a"
                " header of the PROXY protocol: {why} (logged only once); configure the load"
                " balancer to send it (HAProxy: send-proxy-v2), or remove its address from"
                " --proxy-protocol-from",
                balancer=shown(balancer),
                why=why,
            )


class BalancedServer(ProxyServer):
    """A visitor's connection. If it comes through a load balancer, its header is read first.

    The deadline for the hello includes the header. If anything is wrong with the header, the
    connection is reset: the visitor's address must not be guessed (section 2 of the protocol).
    """

    _arrival: Arrival | None = None
    _visitor: Any = None
    _awaited: bytes | None = None

    def __init__(self, balancers: Balancers) -> None:
        self._balancers = balancers

    @property
    def visitor(self) -> Any:
        return self._visitor or super().visitor

    def arrival(self) -> Arrival:
        return self._arrival or super().arrival()

    def connectionMade(self) -> None:
        if end_of(self.transport.getPeer())[0] in self._balancers:
            self._awaited = b""
        super().connectionMade()

    def dataReceived(self, data: bytes) -> None:
        if self._awaited is None:
            super().dataReceived(data)
            return
        self._awaited += data
        try:
            size = size_of(self._awaited)
            if isinstance(size, NeedMore):
                return
            header, rest = self._awaited[:size], self._awaited[size:]
            self._announce(header)
        except BadHeader as problem:
            self._refuse(str(problem))
            return
        self._awaited = None
        if rest:
            super().dataReceived(rest)

    def readConnectionLost(self) -> None:
        if self._awaited is None:
            super().readConnectionLost()
        elif self._awaited:
            self._refuse("it ended before the header did")
        else:  # load balancers do this to check whether a program listens
            self.transport.loseConnection()

    def give_up(self, reason: str, kind: str) -> None:
        if self._awaited is None:
            super().give_up(reason, kind)
        else:
            self._refuse("it did not come in time")

    def _announce(self, header: bytes) -> None:
        visitor, dialled = addresses_in(header)
        here = self._here()
        if visitor is None or dialled is None:  # a connection of the load balancer itself
            self._arrival = Arrival(end_of(self.transport.getPeer()), here, here, header)
        else:
            self._visitor = visitor
            self.host = end_of(visitor)[0]
            self._arrival = Arrival(end_of(visitor), end_of(dialled), here, header)

    def _refuse(self, why: str) -> None:
        self._balancers.report(end_of(self.transport.getPeer()), why)
        self.transport.abortConnection()


# Twisted's parser has only one public interface: an endpoint whose factory reads the header and
# then returns its addresses from getPeer() and getHost(). The parser refuses a header whose first
# 16 bytes come in two pieces, and does not report the end of a header without bytes after it. So
# it gets whole headers. It also refuses UNKNOWN without further words, which HAProxy sends.


@implementer(IStreamServerEndpoint)
class _Nowhere:
    """An endpoint that does not listen: it only stores the factory."""

    factory: Any

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[Any]:
        self.factory = protocolFactory
        return succeed(None)


class _Header:
    """The transport of a connection that consists only of a header."""

    def getPeer(self) -> None:
        """Called if the header has no addresses."""

    def getHost(self) -> None:
        """Called if the header has no addresses."""

    def loseConnection(self) -> None:
        raise BadHeader(_NONSENSE)


def _unmapped(host: str) -> Any:
    """An address; an IPv4 address that is mapped to IPv6 (RFC 4291 section 2.5.5.2) becomes
    IPv4."""
    address = ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address


def addresses_in(header: bytes) -> tuple[Any, Any]:
    """The visitor's address and the address that it connected to, in Twisted's form.

    @return: C{None} for both if the header has no addresses: the connection is the load balancer's
        own, or not over IP.
    @param header: a whole header, without further bytes. Raises L{BadHeader}.
    """
    if header.split()[1:2] == [b"UNKNOWN"]:
        return None, None
    nowhere = _Nowhere()
    proxyEndpoint(nowhere).listen(Factory.forProtocol(Protocol))
    reader = nowhere.factory.buildProtocol(None)
    reader.makeConnection(_Header())
    try:
        reader.dataReceived(header)
        told = reader.getPeer(), reader.getHost()
        if not all(isinstance(each, _IP) for each in told):
            return None, None
        source, destination = (_unmapped(each.host) for each in told)
    except BadHeader:
        raise
    except ValueError as problem:  # not an address, not a number, or not ASCII
        raise BadHeader(_NONSENSE) from problem
    ports = [each.port for each in told]
    if source.version != destination.version or not all(0 <= port < 65_536 for port in ports):
        raise BadHeader(_NONSENSE)
    kind = IPv6Address if source.version == 6 else IPv4Address
    return kind("TCP", str(source), ports[0]), kind("TCP", str(destination), ports[1])
