"""C{python -m acme_alpn_proxy}, and the console script: the same program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from .console.startup import load_lightly


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command in C{argv} and exit with its status."""
    load_lightly()
    from .console.cli import run_command_line

    raise SystemExit(run_command_line(argv))


if __name__ == "__main__":
    main()
