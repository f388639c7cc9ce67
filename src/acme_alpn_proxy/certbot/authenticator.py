"""The authenticator: makes the daemon answer the CA, and starts a daemon if none runs.

certbot imports it at each start, for every command: so Twisted is imported later, if at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

from acme import challenges
from certbot import achallenges, errors, interfaces
from certbot.plugins import common

from ..responder.client import ControlError, NotListening, ask, control_path
from .ownproxy import CannotStart, OwnProxy

TLS_ALPN_01: Final = "tls-alpn-01"

_UNSEEN: Final = (
    "{}: no validation arrived. Check that its A and AAAA records point to this host, and that no"
    " firewall blocks port 443."
)

_log = logging.getLogger(__name__)


class TLSALPN01Response(challenges.KeyAuthorizationChallengeResponse):
    """The response that makes the CA begin (RFC 8737, section 3): an empty object."""

    typ = TLS_ALPN_01


class TLSALPN01(challenges.KeyAuthorizationChallenge):
    """A TLS-ALPN-01 challenge. certbot has no class for it since version 5."""

    typ = TLS_ALPN_01
    response_cls = TLSALPN01Response

    def validation(self, account_key: Any, **kwargs: Any) -> str:
        """The value to prove: the key authorization (RFC 8555, section 8.1)."""
        return self.key_authorization(account_key)


# If certbot or another plugin has registered a class for TLS-ALPN-01, that class is used:
# registering this one would replace it.
if TLS_ALPN_01 not in challenges.Challenge.TYPES:
    challenges.Challenge.register(TLSALPN01)


class Authenticator(common.Plugin, interfaces.Authenticator):
    """Answers TLS-ALPN-01 through acme-alpn-proxy."""

    description = "Answer on port 443 (TLS-ALPN-01) while the web server keeps serving"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending: list[str] = []
        self._own: OwnProxy | None = None

    @classmethod
    def add_parser_arguments(cls, add: Callable[..., None]) -> None:
        """Two options, which certbot saves for the renewal."""
        add(
            "control",
            metavar="PATH",
            help="Control socket of acme-alpn-proxy (default: in the folder of its PID file)",
        )
        add(
            "options",
            metavar="OPTIONS",
            help="Options for the acme-alpn-proxy that is started if none runs, in one word, as"
            " in --alpn-proxy-options='--fallback 192.0.2.1:443'",
        )

    def more_info(self) -> str:
        """What the plugin does, for certbot's own texts."""
        return (
            "While the CA validates, acme-alpn-proxy receives the new connections to port 443. It"
            " answers the CA, and passes all other connections to the web server, byte for byte."
        )

    def prepare(self) -> None:
        """Nothing to do: L{perform} finds out whether a proxy runs, or can be started."""

    def get_chall_pref(self, identifier: str) -> Iterable[type[challenges.Challenge]]:
        """The only type, for a name and for an IP address (RFC 8738).

        Each call looks the class up: a plugin that was loaded later may have replaced it, and
        certbot compares the classes.
        """
        return [challenges.Challenge.TYPES[TLS_ALPN_01]]

    def perform(
        self, achalls: list[achallenges.AnnotatedChallenge]
    ) -> list[challenges.ChallengeResponse]:
        """Make the daemon answer all these challenges. Raises C{PluginError}; certbot then calls
        C{cleanup}."""
        try:
            return [self._answer(achall) for achall in achalls]
        except (ControlError, CannotStart) as problem:
            raise errors.PluginError(f"acme-alpn-proxy: {problem}") from None

    def cleanup(self, achalls: list[achallenges.AnnotatedChallenge]) -> None:
        """Make the daemon stop answering them, and end the proxy that was started for them.

        If that fails, it is not an error: the daemon forgets them within an hour.
        """
        for identifier in map(_identifier, achalls):
            if identifier in self._pending:
                self._pending.remove(identifier)
                try:
                    ask(self._control(), f"unauth {identifier}")
                except NotListening:
                    pass
                except ControlError as problem:
                    _log.warning("acme-alpn-proxy: %s", problem)
        if self._own is not None and not self._pending:
            own, self._own = self._own, None
            own.end()

    def auth_hint(self, failed_achalls: list[achallenges.AnnotatedChallenge]) -> str:
        """What this host has seen of the failed validations, to print after the CA's text."""
        lines = ["Validations that reached acme-alpn-proxy on this host:"]
        dialled: Counter[str] = Counter()
        for identifier in map(_identifier, failed_achalls):
            try:
                seen = json.loads(ask(self._control(), f"report {identifier}"))
            except ControlError as problem:
                return f"acme-alpn-proxy does not say which validations arrived: {problem}"
            answered = seen["answered"]
            lines.append(
                f"{identifier}: validations answered: {answered}"
                if answered
                else _UNSEEN.format(identifier)
            )
            # Each report has all the last validations: a CA may have asked for another name.
            dialled |= Counter(
                f"{one['peer'].rpartition(':')[0]} connected for {one['name'] or 'no name'}:"
                f" {one['answer']}"
                for one in seen["asked"]
            )
        lines += [
            f"{line} ({count} times)" if count > 1 else line for line, count in dialled.items()
        ]
        names = " ".join(map(_identifier, failed_achalls))
        return "\n  ".join([*lines, f"To see what to do: acme-alpn-proxy explain {names}"])

    def _answer(self, achall: achallenges.AnnotatedChallenge) -> challenges.ChallengeResponse:
        response: challenges.KeyAuthorizationChallengeResponse
        response = achall.response(achall.account_key)
        digest = hashlib.sha256(response.key_authorization.encode()).hexdigest()
        identifier = _identifier(achall)
        self._pending.append(identifier)
        self._ask_or_start(f"auth {identifier} {digest}")
        return response

    def _ask_or_start(self, line: str) -> None:
        path = self._control()
        try:
            ask(path, line)
        except NotListening:
            if self._own is not None:
                raise
            self._own = OwnProxy(self._options())
            try:
                ask(path, line)
            except NotListening:  # an instance runs, but not with this control socket
                raise ControlError(
                    f"the running instance has no control socket at {path}; stop it, or give the"
                    " path of its socket with --alpn-proxy-control"
                ) from None

    def _options(self) -> list[str]:
        try:
            given = shlex.split(self.conf("options") or "")
            return [*given, "--control", self._control()]
        except ValueError as problem:
            raise errors.PluginError(
                f"--alpn-proxy-options: {problem}; quote as in a shell"
            ) from None

    def _control(self) -> str:
        """The path of the control socket of the daemon, running or not."""
        from ..options import DEFAULT_PIDFILE, PIDFILE_VARIABLE

        named: str | None = self.conf("control")
        return named or control_path(os.environ.get(PIDFILE_VARIABLE) or DEFAULT_PIDFILE)


def _identifier(achall: achallenges.AnnotatedChallenge) -> str:
    """The name or IP address, in the CA's spelling."""
    if hasattr(achall, "identifier"):  # certbot 5.3
        return str(achall.identifier.value)
    return str(achall.domain)
