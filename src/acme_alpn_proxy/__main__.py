"""C{python -m acme_alpn_proxy}, and the console scripts: the same program.

It imports nothing before C{main}: until C{main} sets a handler for the signal, Ctrl-C prints a
traceback.
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
        # Ctrl-C ends the program at once, until the proxy sets its own handler.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .console.startup import load_lightly

    load_lightly()
    from .console.cli import run_command_line

    raise SystemExit(run_command_line(argv))


def hook() -> NoReturn:
    """Run C{acme-alpn-proxy hook} with all words of the command line: C{acme-alpn-proxy-hook}.

    ACME clients accept only the name of a hook program, without arguments. So the hook is a
    separate program.
    """
    from .console.hook import client_of

    words = sys.argv[1:]
    main(["hook", client_of(words), *words])


if __name__ == "__main__":
    main()
