"""The certbot plugin C{alpn-proxy}: certbot loads it from here, whatever it is about to do."""

import logging

try:
    from .authenticator import Authenticator
except Exception as problem:  # of a certbot unlike those that are known
    # What is raised here would stop certbot, also where another plugin is used.
    logging.getLogger(__name__).warning(
        "acme-alpn-proxy does not fit this certbot: %s; install a newer one", problem
    )

    class Authenticator:  # type: ignore[no-redef]
        """Stands for the plugin that cannot be loaded; certbot leaves out what is none."""


__all__ = ["Authenticator"]
