"""Runs the target named by FUZZ_TARGET under atheris, with options of libFuzzer."""

from __future__ import annotations

import logging
import os
import sys

import atheris

from . import target

if __name__ == "__main__":
    logging.disable()  # its own word for each module that it looks into
    with atheris.instrument_imports(include=["acme_alpn_proxy"]):
        chosen = target(os.environ["FUZZ_TARGET"])
    # So libFuzzer starts it again, by a shell, to find out which inputs to keep.
    sys.argv[0] = f"{sys.executable} -m {__package__}.one"
    atheris.Setup(sys.argv, chosen.check)
    atheris.Fuzz()
