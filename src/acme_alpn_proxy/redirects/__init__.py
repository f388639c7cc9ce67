"""Ways to get new connections to :443; each is an L{acme_alpn_proxy.interfaces.IRedirect}."""
