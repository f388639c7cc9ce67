"""An ACME server and an ACME client: pebble, the test CA, and lego; both from Debian."""

from __future__ import annotations

import base64
import http.client
import json
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from .netns import Namespace, Node, terminate, url_host
from .pki import Authority

DIRECTORY_PORT = 14000
DNS = "127.0.0.1:8053"
MANAGEMENT_PORT = 8055
LEGO_SECONDS = 90.0
RESPONDER = "127.0.0.1:31443"
EMAIL = "admin@site.example"

_ENVIRONMENT = {
    "PEBBLE_VA_NOSLEEP": "1",
    "PEBBLE_WFE_NONCEREJECT": "0",
    "PEBBLE_AUTHZREUSE": "0",  # every order is validated anew
}


class Pebble:
    """The running CA: where it is, and whom to trust to reach it."""

    def __init__(self, node: Node, authority: Authority) -> None:
        self.address = node.ipv4
        self.directory_url = f"https://{url_host(node.ipv4)}:{DIRECTORY_PORT}/dir"
        self.authority = authority
        self.tls = ssl.create_default_context(cafile=str(authority.certificate))


@contextmanager
def pebble(node: Node, host: Node, directory: Path) -> Iterator[Pebble]:
    """A CA at C{node} that finds every host name at C{host}, by A and by AAAA."""
    directory.mkdir(parents=True, exist_ok=True)
    authority = Authority(directory)
    pair = authority.issue("pebble", "pebble", node.ipv4, node.ipv6)
    configuration = directory / "pebble.json"
    configuration.write_text(
        json.dumps(
            {
                "pebble": {
                    "listenAddress": f"0.0.0.0:{DIRECTORY_PORT}",
                    "managementListenAddress": "127.0.0.1:15000",
                    "certificate": str(pair.certificate),
                    "privateKey": str(pair.key),
                    "httpPort": 80,
                    "tlsPort": 443,
                    "ocspResponderURL": "",
                    "externalAccountBindingRequired": False,
                }
            }
        )
    )
    names = node.namespace.popen(
        "pebble-challtestsrv",
        *("-dns01", DNS, "-management", f"127.0.0.1:{MANAGEMENT_PORT}"),
        *("-http01", "", "-https01", "", "-tlsalpn01", ""),
        *("-defaultIPv4", host.ipv4, "-defaultIPv6", host.ipv6),
        log=directory / "challtestsrv.log",
    )
    try:
        server = node.namespace.popen(
            *("pebble", "-strict", "-dnsserver", DNS, "-config", configuration),
            log=directory / "pebble.log",
            env=_ENVIRONMENT,
        )
        try:
            node.namespace.wait_until_listening(names, "127.0.0.1", MANAGEMENT_PORT)
            node.namespace.wait_until_listening(server, "127.0.0.1", DIRECTORY_PORT)
            yield Pebble(node, authority)
        finally:
            terminate(server)
    finally:
        terminate(names)


@dataclass(frozen=True)
class Issued:
    """What the client brought home."""

    certificate: x509.Certificate
    challenges: list[str]
    """The type of the challenge that made each authorization valid, read back from the CA."""

    @property
    def names(self) -> list[str]:
        """The host names in the certificate."""
        extension = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return extension.value.get_values_for_type(x509.DNSName)


def lego(host: Namespace, ca: Pebble, directory: Path, *names: str) -> Issued:
    """Order a certificate for C{names} by TLS-ALPN-01, answered by lego's own responder."""
    done = host.run(
        *("lego", "--server", ca.directory_url, "--email", EMAIL, "--accept-tos"),
        *("--path", directory, "--tls", "--tls.port", RESPONDER),
        *[argument for name in names for argument in ("--domains", name)],
        "run",
        env={"LEGO_CA_CERTIFICATES": str(ca.authority.certificate)},
        timeout=LEGO_SECONDS,
    )
    chain = (directory / "certificates" / f"{names[0]}.crt").read_bytes()
    account = Account.of_lego(host, ca, directory)
    return Issued(
        x509.load_pem_x509_certificates(chain)[0],
        [
            challenge["type"]
            for url in re.findall(r"AuthURL: (\S+)", done.stdout + done.stderr)
            for challenge in account.read(url)["challenges"]
            if challenge["status"] == "valid"
        ],
    )


@dataclass(frozen=True)
class Account:
    """An ACME account, for reading what the CA holds (RFC 8555, section 6.3: POST-as-GET)."""

    host: Namespace
    ca: Pebble
    url: str
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def of_lego(cls, host: Namespace, ca: Pebble, directory: Path) -> Account:
        """The account that lego registered."""
        (home,) = (directory / "accounts").glob(f"*/{EMAIL}")
        key = serialization.load_pem_private_key(
            (home / "keys" / f"{EMAIL}.key").read_bytes(), password=None
        )
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        registered = json.loads((home / "account.json").read_text())
        return cls(host, ca, registered["registration"]["uri"], key)

    def read(self, url: str) -> Any:
        """The resource at C{url}, decoded."""
        header = {"alg": "ES256", "kid": self.url, "nonce": self._nonce(), "url": url}
        protected = _base64(json.dumps(header).encode())
        r, s = decode_dss_signature(
            self.key.sign(f"{protected}.".encode(), ec.ECDSA(hashes.SHA256()))
        )
        signature = _base64(r.to_bytes(32, "big") + s.to_bytes(32, "big"))
        body = {"protected": protected, "payload": "", "signature": signature}
        content, _ = self._request("POST", url, json.dumps(body))
        return json.loads(content)

    def _nonce(self) -> str:
        directory, _ = self._request("GET", self.ca.directory_url)
        _, headers = self._request("HEAD", json.loads(directory)["newNonce"])
        return headers["Replay-Nonce"]

    def _request(self, method: str, url: str, body: str = "") -> tuple[bytes, Message]:
        with self.ca.tls.wrap_socket(
            self.host.connect(self.ca.address, DIRECTORY_PORT), server_hostname=self.ca.address
        ) as tls:
            connection = http.client.HTTPConnection(self.ca.address, DIRECTORY_PORT)
            connection.sock = tls
            try:
                connection.request(
                    method, urlsplit(url).path, body, {"Content-Type": "application/jose+json"}
                )
                response = connection.getresponse()
                content = response.read()
            finally:
                connection.close()
        assert response.status == 200, f"{method} {url}: {response.status} {content!r}"
        return content, response.headers


def _base64(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()
