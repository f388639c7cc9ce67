"""C{twistd acme-alpn-proxy}."""

from twisted.application.service import ServiceMaker

acme_alpn_proxy = ServiceMaker(
    "acme-alpn-proxy",
    "acme_alpn_proxy.tap",
    "Get TLS certificates by TLS-ALPN-01 on port 443 while the web server keeps serving",
    "acme-alpn-proxy",
)
