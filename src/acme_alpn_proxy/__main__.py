"""C{python -m acme_alpn_proxy}, and the console scripts: the same program.

It imports nothing before C{main}: until the signal is taken there, Ctrl-C shows a traceback.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command in C{argv} and exit with its status."""
    import signal

    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # Until the proxy takes it: end at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .console.startup import load_lightly

    load_lightly()
    from .console.cli import run_command_line

    raise SystemExit(run_command_line(argv))


def hook() -> NoReturn:
    """Be the hook of an ACME client, all of whose words are given: C{acme-alpn-proxy-hook}.

    It is a program of its own because these clients take the name of a program, without words.
    """
    from .console.hook import client_of

    words = sys.argv[1:]
    main(["hook", client_of(words), *words])


if __name__ == "__main__":
    main()
