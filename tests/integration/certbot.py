"""certbot with the plugin, asking the test CA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509

from .acme import Account, Issued, Pebble
from .netns import Namespace

SECONDS = 90.0
ORDER = (
    *("certonly", "--authenticator", "alpn-proxy"),
    *("--agree-tos", "--register-unsafely-without-email"),
)


@dataclass(frozen=True)
class Certbot:
    """The command, wherever it is installed.

    @ivar run: runs a command there; gives its output and its exit status.
    @ivar read: the content of a file there, given by a pattern of sh.
    @ivar config: the folder of its certificates and accounts.
    @ivar options: options that are added to each command.
    """

    namespace: Namespace
    ca: Pebble
    run: Callable[..., tuple[str, int]]
    read: Callable[[str], str]
    config: str = "/etc/letsencrypt"
    options: tuple[str, ...] = ()

    def words(self, *words: str) -> list[str]:
        """A command line."""
        server = ("--server", self.ca.directory_url)
        return ["certbot", *words, *self.options, *server, "--non-interactive"]

    def fails(self, *words: str) -> str:
        """Run certbot, which must fail, and return its output."""
        said, status = self.run(*self.words(*words))
        assert status != 0, said
        return said

    def succeeds(self, *words: str) -> None:
        """Run certbot, which must succeed."""
        said, status = self.run(*self.words(*words))
        assert status == 0, said

    def order(self, *words: str) -> None:
        """Order a certificate through the plugin."""
        self.succeeds(*ORDER, *words)

    def account(self) -> Account:
        """Its account."""
        key = self.read(f"{self.config}/accounts/*/*/*/private_key.json")
        return Account(self.namespace, self.ca, key.encode())

    def brought(self, name: str) -> Issued:
        """The certificate that certbot has stored as C{name}, and all challenges so far."""
        pem = self.read(f"{self.config}/live/{name}/cert.pem")
        certificate = x509.load_pem_x509_certificate(pem.encode())
        return Issued(certificate, self.account().valid_challenges())
