"""The plugin as certbot uses it, with a stand-in for the daemon."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest
from acme import challenges, messages
from certbot import errors
from certbot.achallenges import KeyAuthorizationAnnotatedChallenge
from certbot.configuration import NamespaceConfig
from cryptography.hazmat.primitives.asymmetric import rsa
from josepy.b64 import b64encode
from josepy.jwk import JWKRSA

from acme_alpn_proxy.certbot import Authenticator, authenticator
from acme_alpn_proxy.certbot.ownproxy import CannotStart

from ..responder.control_daemon import control_daemon

KEY = JWKRSA(key=rsa.generate_private_key(65537, 2048))
TOKEN = b"a token of some 32 bytes, or more"
NAMES = ["site.example", "www.site.example"]


def achall(identifier: str) -> KeyAuthorizationAnnotatedChallenge:
    """A challenge of a CA, annotated as certbot passes it to the plugin."""
    token = b64encode(TOKEN).decode()
    offered = {"type": "tls-alpn-01", "token": token, "url": "https://ca.example/1"}
    return KeyAuthorizationAnnotatedChallenge(
        challb=messages.ChallengeBody.from_json(offered),
        account_key=KEY,
        identifier=messages.Identifier(typ=messages.IDENTIFIER_FQDN, value=identifier),
    )


class OwnProxy:
    """A stand-in for a proxy that the plugin starts: a daemon that says OK to everything."""

    path: Path
    asked: list[list[str]]
    options: list[Sequence[str]]

    def __init__(self, options: Sequence[str]) -> None:
        self.options.append(options)
        self._end = ExitStack()
        self.asked.append(self._end.enter_context(control_daemon(self.path, lambda line: b"OK\n")))

    def end(self) -> None:
        self._end.close()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The control socket that belongs to the PID file in the environment."""
    monkeypatch.setenv("ACME_ALPN_PROXY_PIDFILE", str(tmp_path / "proxy.pid"))
    OwnProxy.path = tmp_path / "proxy.control"
    OwnProxy.asked, OwnProxy.options = [], []
    monkeypatch.setattr(authenticator, "OwnProxy", OwnProxy)
    yield OwnProxy.path
    assert not OwnProxy.path.exists()  # every proxy that was started has ended


def plugin(*words: str) -> Authenticator:
    """The plugin, configured from these words of certbot's command line."""
    parser = argparse.ArgumentParser()
    Authenticator.inject_parser_options(parser, "alpn-proxy")
    return Authenticator(cast(NamespaceConfig, parser.parse_args(words)), "alpn-proxy")


def digest() -> str:
    """The SHA-256 of the key authorization (RFC 8555, section 8.1; RFC 7638, section 3)."""
    key = KEY.public_key().to_json()
    required = json.dumps({name: key[name] for name in ("e", "kty", "n")}, separators=(",", ":"))
    parts = (TOKEN, hashlib.sha256(required.encode()).digest())
    encoded = (base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    return hashlib.sha256(b".".join(encoded)).hexdigest()


def test_perform_and_cleanup(path: Path) -> None:
    """The plugin asks the running daemon to answer for each name, with the digest of its challenge,
    and ends each request at the cleanup. The response that certbot gets for each name is an empty
    object."""
    one = plugin()
    both = [achall(name) for name in NAMES]
    with control_daemon(path, lambda line: b"OK\n") as asked:
        responses = one.perform(both)
        assert asked == [f"auth {name} {digest()}" for name in NAMES]
        one.cleanup(both)
        assert asked[2:] == [f"unauth {name}" for name in NAMES]
        one.cleanup(both)  # certbot may do so twice
        assert len(asked) == 4
    assert [response.to_json() for response in responses] == [{}, {}]
    assert OwnProxy.options == []


def test_addresses_and_types(path: Path) -> None:
    """An IP address is like a name; TLS-ALPN-01 is offered for both, and nothing else."""
    one = plugin()
    with control_daemon(path, lambda line: b"OK\n") as asked:
        one.perform([achall("2001:db8::1")])
        one.cleanup([achall("2001:db8::1")])
    assert asked == [f"auth 2001:db8::1 {digest()}", "unauth 2001:db8::1"]
    for identifier in ("site.example", "2001:db8::1"):
        assert [each.typ for each in one.get_chall_pref(identifier)] == ["tls-alpn-01"]


def test_anothers_class(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """If another plugin has registered its own challenge class later, certbot uses that class, so
    our plugin asks for that class."""

    class Another(authenticator.TLSALPN01):
        pass

    monkeypatch.setitem(challenges.Challenge.TYPES, "tls-alpn-01", Another)
    assert list(plugin().get_chall_pref("site.example")) == [Another]
    assert isinstance(achall("site.example").chall, Another)


SCRIPT = """
import sys
from acme import challenges
@challenges.Challenge.register
class Another(challenges.KeyAuthorizationChallenge):
    typ = "tls-alpn-01"
import acme_alpn_proxy.certbot
print(challenges.Challenge.TYPES["tls-alpn-01"].__name__, "twisted" in sys.modules)
"""


def test_import() -> None:
    """certbot imports the plugin at every start. So the plugin replaces no existing class (certbot
    4 has one), and loads nothing of Twisted."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout == "Another False\n"


UNKNOWN = """
import sys
sys.modules["acme"] = None  # importing it fails
import acme_alpn_proxy.certbot
print(acme_alpn_proxy.certbot.Authenticator.__mro__)
"""


def test_unknown_certbot() -> None:
    """If the plugin does not fit this certbot, certbot continues without it, and one line on
    standard error says so."""
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN], capture_output=True, text=True, check=True
    )
    assert "certbot.interfaces" not in done.stdout
    assert done.stderr.startswith("the plugin alpn-proxy does not work with this certbot: ")
    assert done.stderr.endswith("; install a newer acme-alpn-proxy\n")
    assert done.stderr.count("\n") == 1


def test_own_proxy(path: Path) -> None:
    """If no proxy runs, the plugin starts one for all names, and ends it after the last one."""
    one = plugin("--alpn-proxy-options=--fallback '192.0.2.1:443'")
    both = [achall(name) for name in NAMES]
    one.perform(both)
    (asked,) = OwnProxy.asked
    assert OwnProxy.options == [["--fallback", "192.0.2.1:443", "--control", str(path)]]
    assert len(asked) == 2
    one.cleanup(both[:1])
    assert path.exists()
    one.cleanup(both)
    assert not path.exists()
    assert asked[2:] == [f"unauth {name}" for name in NAMES]
    one.cleanup(both)


def test_another_control_socket(tmp_path: Path, path: Path) -> None:
    """The plugin, and the proxy that it starts, use the control socket that the operator names."""
    OwnProxy.path = tmp_path / "another"
    one = plugin("--alpn-proxy-control", str(OwnProxy.path))
    one.perform([achall("site.example")])
    assert OwnProxy.options == [["--control", str(OwnProxy.path)]]
    one.cleanup([achall("site.example")])
    assert not OwnProxy.path.exists()
    OwnProxy.path = path


def test_running_without_control_socket(path: Path, tmp_path: Path) -> None:
    """If the running instance has another control socket, the error asks for its path."""
    OwnProxy.path = tmp_path / "another"
    one = plugin()
    with pytest.raises(errors.PluginError, match=f"no control socket at {path}; stop it"):
        one.perform([achall("site.example")])
    one.cleanup([achall("site.example")])
    assert not OwnProxy.path.exists()
    OwnProxy.path = path


def test_refused(path: Path) -> None:
    """If the daemon refuses a name, certbot gets the reason; the cleanup ends all requests."""
    one = plugin()
    both = [achall(name) for name in NAMES]

    def answer(line: str) -> bytes:
        return b"ERR too many; wait\n" if line.startswith(f"auth {NAMES[1]}") else b"OK\n"

    with control_daemon(path, answer) as asked:
        with pytest.raises(errors.PluginError, match=r"^acme-alpn-proxy: too many; wait$"):
            one.perform(both)
        one.cleanup(both)
    assert asked[2:] == [f"unauth {name}" for name in NAMES]


def test_cannot_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no proxy can be started, certbot gets the reason; there is nothing to clean up."""

    def refuse(options: Sequence[str]) -> None:
        raise CannotStart("nobody answers at 127.0.0.1:443; start the web server")

    monkeypatch.setattr(authenticator, "OwnProxy", refuse)
    one = plugin()
    with pytest.raises(errors.PluginError, match=r"^acme-alpn-proxy: nobody answers at .*443; st"):
        one.perform([achall("site.example")])
    one.cleanup([achall("site.example")])


def test_wrong_options(path: Path) -> None:
    """Options that a shell could not split are reported as a C{PluginError}."""
    with pytest.raises(
        errors.PluginError, match=r"^--alpn-proxy-options: No closing quotation; qu"
    ):
        plugin("--alpn-proxy-options='").perform([achall("site.example")])


def test_cleanup_fails(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If the daemon refuses to end a request, its reason is logged. If the daemon has ended,
    nothing is logged."""
    one = plugin()
    with control_daemon(path, lambda line: b"OK\n" if line[0] == "a" else b"ERR why; do\n"):
        one.perform([achall("site.example")])
        one.cleanup([achall("site.example")])
    assert caplog.messages == ["acme-alpn-proxy: why; do"]
    with control_daemon(path, lambda line: b"OK\n"):
        one.perform([achall("site.example")])
    one.cleanup([achall("site.example")])
    assert len(caplog.messages) == 1


def test_hint(path: Path) -> None:
    """After the CA's words, the operator reads the source, the name and the result of each
    validation, and which names nobody has asked for."""
    asked = [
        {"peer": "192.0.2.7:50123", "name": "site.example", "answer": "answered"},
        {"peer": "[2001:db8::8]:443", "name": None, "answer": "not answered"},
        {"peer": "192.0.2.7:50124", "name": "site.example", "answer": "answered"},
    ]
    reports = {
        "report site.example": {"identifier": "site.example", "answered": 2, "asked": asked},
        "report www.site.example": {
            "identifier": "www.site.example",
            "answered": 0,
            "asked": asked,
        },
    }
    with control_daemon(path, lambda line: f"OK {json.dumps(reports[line])}\n".encode()):
        hint = plugin().auth_hint([achall(name) for name in NAMES])
    assert hint.splitlines()[1:] == [
        "  site.example: validations answered: 2",
        "  www.site.example: no validation arrived. Check that its A and AAAA records point to"
        " this host, and that no firewall blocks port 443.",
        "  192.0.2.7 connected for site.example: answered (2 times)",
        "  [2001:db8::8] connected for no name: not answered",
        "  To see what to do: acme-alpn-proxy explain site.example www.site.example",
    ]


def test_no_hint(path: Path) -> None:
    """If the daemon cannot be asked, the hint says so."""
    hint = plugin().auth_hint([achall("site.example")])
    assert hint.endswith(
        f"which validations arrived: no instance listens at {path}; start one: acme-alpn-proxy"
        " start"
    )
