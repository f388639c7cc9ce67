"""Runs the target named by FUZZ_TARGET under atheris, with options of libFuzzer."""

from __future__ import annotations

import logging
import os
import sys

import atheris

from . import target

if __name__ == "__main__":
    logging.disable()  # atheris logs a line for each module that it instruments
    with atheris.instrument_imports(include=["acme_alpn_proxy"]):
        chosen = target(os.environ["FUZZ_TARGET"])
    # libFuzzer starts this program again, through a shell, to find out which inputs to keep.
    sys.argv[0] = f"{sys.executable} -m {__package__}.one"
    atheris.Setup(sys.argv, chosen.check)
    atheris.Fuzz()
