"""An existing Twisted application that also runs the proxy, as one more service.

Run it as root with C{twistd -ny examples/existing_application.tac}. The proxy then steers until the
application stops. If orders are rare, start the proxy's service before each order and stop it after.
"""

from acme_alpn_proxy.tap import Options, makeService
from twisted.application import strports
from twisted.application.service import Application
from twisted.web.resource import Resource
from twisted.web.server import Request, Site


class Status(Resource):
    """What the application did before, and still does."""

    isLeaf = True

    def render_GET(self, request: Request) -> bytes:
        return b"all is well\n"


application = Application("existing application")
strports.service("tcp:8080:interface=127.0.0.1", Site(Status())).setServiceParent(application)

options = Options()
options.parseOptions(["--alpn", "127.0.0.1:31443", "--fallback", "127.0.0.1:443"])
makeService(options).setServiceParent(application)
