#!/usr/bin/python3
"""Answer TLS-ALPN-01 validations (RFC 8737) with the certificates in a folder.

    tls-alpn-responder FOLDER [PORT]

It is for ACME clients that make these certificates and do not serve them, as dehydrated does:
NAME.crt.pem and NAME.key.pem. It returns as soon as it listens, on 127.0.0.1 and port 31443 unless
another one is given, and goes on in the background until the folder has no certificate any more.
Where it runs for that folder already it returns at once. It needs nothing but Python.
"""

import fcntl
import os
import socketserver
import ssl
import sys
from pathlib import Path

HANDSHAKE_SECONDS = 10


def tls_context() -> ssl.SSLContext:
    """Without a certificate, yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["acme-tls/1"])
    return context


class Handshake(socketserver.BaseRequestHandler):
    """One validation: the CA looks at the certificate, and that is all."""

    def handle(self) -> None:
        self.request.settimeout(HANDSHAKE_SECONDS)
        try:
            self.server.tls.wrap_socket(self.request, server_side=True).close()
        except OSError:
            pass  # whoever that was


class Responder(socketserver.ThreadingTCPServer):
    """Listens as soon as it is made."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.tls = tls_context()
        self.tls.sni_callback = self.choose
        super().__init__(("127.0.0.1", port), Handshake)

    def choose(self, connection: ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> int | None:
        """Take the certificate for a name. It is looked for among those that there are: what a peer
        says becomes no path."""
        for certificate in self.folder.glob("*.crt.pem"):
            if certificate.name == f"{name}.crt.pem".lower():
                context = tls_context()
                key = certificate.name.replace(".crt.pem", ".key.pem")
                context.load_cert_chain(certificate, self.folder / key)
                connection.context = context
                return None
        return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    def service_actions(self) -> None:
        """Called twice a second: end when the client has removed its certificates."""
        if not any(self.folder.glob("*.crt.pem")):
            os._exit(0)


def main(folder: str, port: str = "31443") -> None:
    """Listen, then go on in the background."""
    lock = os.open(folder, os.O_RDONLY)  # goes with the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    responder = Responder(Path(folder), int(port))
    if os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):  # whoever runs the hook waits for their end of file
        os.dup2(null, standard)
    responder.serve_forever()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (OSError, TypeError, ValueError) as problem:
        sys.exit(f"tls-alpn-responder: {problem}; usage: tls-alpn-responder FOLDER [PORT]")
