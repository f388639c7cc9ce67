"""Get TLS certificates by TLS-ALPN-01 on port 443 while the web server keeps serving."""

__version__ = "1.1.0"
