"""An ACME server and an ACME client: pebble, the test CA, and lego; both from Debian."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from josepy.jwk import JWK

from .netns import Namespace, Node, terminate, url_host
from .pki import Authority

DIRECTORY_PORT = 14000
DNS = "127.0.0.1:8053"
MANAGEMENT_PORT = 8055
LEGO_SECONDS = 90.0
RESPONDER = "127.0.0.1:31443"
EMAIL = "admin@site.example"
CERTIFICATE_SECONDS = 20 * 86_400
"""Clients renew certificates that expire within 30 days."""

SHORTLIVED_SECONDS = 160 * 3600
PROFILES = {
    "default": {"description": "", "validityPeriod": CERTIFICATE_SECONDS},
    "shortlived": {"description": "", "validityPeriod": SHORTLIVED_SECONDS},
}
"""The profiles of a CA that supports them: pebble 2.10 does, 2.6 does not."""

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


def _dns_option() -> str:
    """The option of pebble-challtestsrv for its DNS address: C{-dnsserver} since 2.10."""
    done = subprocess.run(
        ["pebble-challtestsrv", "-help"], capture_output=True, text=True, check=False
    )
    return "-dnsserver" if "-dnsserver" in done.stderr else "-dns01"


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
                    "certificateValidityPeriod": CERTIFICATE_SECONDS,
                    "profiles": PROFILES,
                    "externalAccountBindingRequired": False,
                }
            }
        )
    )
    names = node.namespace.popen(
        "pebble-challtestsrv",
        *(_dns_option(), DNS, "-management", f"127.0.0.1:{MANAGEMENT_PORT}"),
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
    """The certificate that a client has got, and the challenges of its account."""

    certificate: x509.Certificate
    challenges: list[str]
    """The type of the challenge that made each authorization valid, read back from the CA."""

    @property
    def names(self) -> list[str]:
        """The host names in the certificate."""
        extension = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return extension.value.get_values_for_type(x509.DNSName)


def lego(
    host: Namespace, ca: Pebble, directory: Path, *names: str, responder: str = RESPONDER
) -> Issued:
    """Order a certificate for C{names} by TLS-ALPN-01, answered by lego's own responder."""
    host.run(
        *("lego", "--server", ca.directory_url, "--email", EMAIL, "--accept-tos"),
        *("--path", directory, "--tls", "--tls.port", responder),
        *[argument for name in names for argument in ("--domains", name)],
        "run",
        env={"LEGO_CA_CERTIFICATES": str(ca.authority.certificate)},
        timeout=LEGO_SECONDS,
    )
    (account,) = (directory / "accounts").glob(f"*/{EMAIL}/keys/{EMAIL}.key")
    return issued(host, ca, directory / "certificates" / f"{names[0]}.crt", account)


def issued(host: Namespace, ca: Pebble, certificate: Path, account: Path) -> Issued:
    """What a client has got, from its files: the certificate, and the key of the account."""
    chain = x509.load_pem_x509_certificates(certificate.read_bytes())
    return Issued(chain[0], Account(host, ca, account.read_bytes()).valid_challenges())


class Account:
    """An ACME account, for reading what the CA holds (RFC 8555, section 6.3: POST-as-GET)."""

    def __init__(self, host: Namespace, ca: Pebble, key: bytes) -> None:
        """
        @param key: the key of an existing account (RFC 8555, section 7.3.1), as PEM, or as JWK.
        """
        self._host = host
        self._ca = ca
        if key.startswith(b"{"):
            key = JWK.json_loads(key).key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        loaded = serialization.load_pem_private_key(key, password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
        self._key = loaded
        directory, _ = self._request("GET", ca.directory_url)
        self._directory = json.loads(directory)
        self.profiles: dict[str, str] = self._directory["meta"].get("profiles", {})
        wish = json.dumps({"onlyReturnExisting": True})
        answer, headers = self._post(self._directory["newAccount"], {"jwk": self._jwk()}, wish)
        self._url = headers["Location"]
        self._orders = json.loads(answer)["orders"]

    def valid_challenges(self) -> list[str]:
        """The type of the challenge that made each authorization of each order valid."""
        return [
            challenge["type"]
            for order in self.read(self._orders)["orders"]
            for authorization in self.read(order)["authorizations"]
            for challenge in self.read(authorization)["challenges"]
            if challenge["status"] == "valid"
        ]

    def read(self, url: str) -> Any:
        """The resource at C{url}, decoded."""
        content, _ = self._post(url, {"kid": self._url}, "")
        return json.loads(content)

    def _jwk(self) -> dict[str, str]:
        """The public key, as RFC 7518 (section 6) writes it."""
        public = self._key.public_key().public_numbers()
        if isinstance(public, ec.EllipticCurvePublicNumbers):
            x, y = _octets(public.x, 32), _octets(public.y, 32)
            return {"kty": "EC", "crv": "P-256", "x": x, "y": y}
        n, e = _octets(public.n, self._key.key_size // 8), _octets(public.e, 3)
        return {"kty": "RSA", "n": n, "e": e}

    def _sign(self, content: bytes) -> bytes:
        if isinstance(self._key, rsa.RSAPrivateKey):
            return self._key.sign(content, padding.PKCS1v15(), hashes.SHA256())
        r, s = decode_dss_signature(self._key.sign(content, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def _post(self, url: str, who: dict[str, Any], content: str) -> tuple[bytes, Message]:
        """A signed request (RFC 8555, section 6.2)."""
        _, headers = self._request("HEAD", self._directory["newNonce"])
        algorithm = "RS256" if isinstance(self._key, rsa.RSAPrivateKey) else "ES256"
        header = {"alg": algorithm, "nonce": headers["Replay-Nonce"], "url": url, **who}
        protected, payload = _base64(json.dumps(header).encode()), _base64(content.encode())
        signature = _base64(self._sign(f"{protected}.{payload}".encode()))
        body = {"protected": protected, "payload": payload, "signature": signature}
        return self._request("POST", url, json.dumps(body))

    def _request(self, method: str, url: str, body: str = "") -> tuple[bytes, Message]:
        with self._ca.tls.wrap_socket(
            self._host.connect(self._ca.address, DIRECTORY_PORT), server_hostname=self._ca.address
        ) as tls:
            connection = http.client.HTTPConnection(self._ca.address, DIRECTORY_PORT)
            connection.sock = tls
            try:
                connection.request(
                    method,
                    urlsplit(url).path,
                    body,
                    {"Content-Type": "application/jose+json", "User-Agent": "tests"},
                )
                response = connection.getresponse()
                content = response.read()
            finally:
                connection.close()
        assert response.status == 200, f"{method} {url}: {response.status} {content!r}"
        return content, response.headers


def _octets(number: int, length: int) -> str:
    return _base64(number.to_bytes(length, "big"))


def _base64(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()
