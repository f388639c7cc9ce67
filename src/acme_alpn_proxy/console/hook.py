"""The command C{hook}: translates the words that an ACME client gives its hook into requests.

See uacme(1) for C{uacme --hook}, and docs/examples/hook.sh of dehydrated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

Ask: TypeAlias = Callable[[str], str]
"""Sends a line to the control socket and returns the answer."""

UACME_METHODS: Final = ("begin", "done", "failed")


class WrongWords(ValueError):
    """The client would not give its hook these words; the message says which are right."""


DONE: Final = 0
DECLINED: Final = 1
"""The exit status that makes uacme try another type of challenge."""


def uacme(words: Sequence[str], ask: Ask) -> int:
    """C{begin|done|failed TYPE IDENT TOKEN AUTH}. For C{tls-alpn-01}, C{AUTH} is the digest."""
    if len(words) != 5 or words[0] not in UACME_METHODS:
        raise WrongWords(
            "begin, done or failed is needed, with the arguments TYPE IDENT TOKEN AUTH"
        )
    method, kind, identifier, _, digest = words
    if kind != "tls-alpn-01":
        return DECLINED
    ask(f"auth {identifier} {digest}" if method == "begin" else f"unauth {identifier}")
    return DONE


def dehydrated(words: Sequence[str], ask: Ask) -> int:
    """C{deploy_challenge} and C{clean_challenge}, with C{IDENT TOKEN DIGEST} one or more times
    (HOOK_CHAIN); all other operations are ignored."""
    operation, *values = words or [""]
    if operation in ("deploy_challenge", "clean_challenge"):
        if not values or len(values) % 3:
            raise WrongWords(f"{operation} needs the arguments IDENT TOKEN DIGEST")
        for identifier, digest in zip(values[::3], values[2::3], strict=True):
            ask(
                f"auth {identifier} {digest}"
                if operation == "deploy_challenge"
                else f"unauth {identifier}"
            )
    return DONE


def client_of(words: Sequence[str]) -> str:
    """The client that gives its hook such words."""
    return "uacme" if words[:1] and words[0] in UACME_METHODS else "dehydrated"


HOOKS: Final[Mapping[str, Callable[[Sequence[str], Ask], int]]] = {
    "uacme": uacme,
    "dehydrated": dehydrated,
}
