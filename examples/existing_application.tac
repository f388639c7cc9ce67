"""A Twisted application that was there before, with the proxy as one more service beside its own.

Run it as root by C{twistd -ny examples/existing_application.tac}. Both run until it is stopped: take
this way where orders come often, or start and stop the proxy's service around each.
"""

from acme_alpn_proxy.tap import Options, makeService
from twisted.application import strports
from twisted.application.service import Application
from twisted.web.resource import Resource
from twisted.web.server import Request, Site


class Status(Resource):
    """What the application did all along."""

    isLeaf = True

    def render_GET(self, request: Request) -> bytes:
        return b"all is well\n"


application = Application("existing application")
strports.service("tcp:8080:interface=127.0.0.1", Site(Status())).setServiceParent(application)

options = Options()
options.parseOptions(["--alpn", "127.0.0.1:31443", "--fallback", "127.0.0.1:443"])
makeService(options).setServiceParent(application)
