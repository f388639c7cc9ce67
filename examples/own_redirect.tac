"""Your own way to steer: here a command, which may tell a router or a load balancer to send new
connections to the proxy's port.

Start it with C{STEER=/usr/local/bin/steer twistd -ny examples/own_redirect.tac}. It runs the command
with the word C{on} when the proxy is ready, and with C{off} at the end. If the command fails, it must
exit with a status other than 0.
"""

import os
import socket
from collections.abc import Sequence

from acme_alpn_proxy.errors import StartError
from acme_alpn_proxy.interfaces import ICommands, IRedirect, Result
from acme_alpn_proxy.tap import Options, make_proxy
from twisted.application.service import Application
from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer


@implementer(IRedirect)
class CommandRedirect:
    """Steers with a command that takes one word."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __str__(self) -> str:
        return f"command {self._command}"  # what "status" and the log call it

    def prepare(self, commands: ICommands) -> Deferred[Sequence[str]]:
        if not os.access(self._command, os.X_OK):
            raise StartError(f"{self._command} is not executable; set STEER to a program")
        return succeed(("::",))  # listen on every address, IPv4 and IPv6

    def apply(self, commands: ICommands, listeners: Sequence[socket.socket]) -> Deferred[None]:
        return commands.run([self._command, "on"]).addCallback(self._judge)

    def look_after(self, commands: ICommands) -> Deferred[None]:
        return succeed(None)

    def remove(self, commands: ICommands) -> Deferred[None]:
        return commands.run([self._command, "off"]).addCallback(self._judge)

    def release(self, commands: ICommands) -> Deferred[None]:
        return succeed(None)

    def _judge(self, result: Result) -> None:
        if result.code != 0:
            raise StartError(f"{result.failure}; see why that command fails")


options = Options()
options.parseOptions(["--alpn", "127.0.0.1:31443", "--fallback", "127.0.0.1:443"])
proxy = make_proxy(options, reactor, redirect=CommandRedirect(os.environ["STEER"]))

application = Application("steered by a command")
proxy.setServiceParent(application)
