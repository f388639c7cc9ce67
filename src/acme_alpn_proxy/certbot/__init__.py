"""The certbot plugin C{alpn-proxy}: certbot loads it from here, for every command."""

import logging

try:
    from .authenticator import Authenticator
except Exception as problem:  # a certbot unlike all known ones
    # An exception from here would stop certbot, even if another plugin is used.
    logging.getLogger(__name__).warning(
        "the plugin alpn-proxy does not work with this certbot: %s; install a newer"
        " acme-alpn-proxy",
        problem,
    )

    class Authenticator:  # type: ignore[no-redef]
        """Replaces the plugin that cannot be loaded; certbot ignores it."""


__all__ = ["Authenticator"]
