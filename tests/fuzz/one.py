"""Runs one target under atheris: C{python -m tests.fuzz.one NAME}, then options of libFuzzer."""

from __future__ import annotations

import logging
import sys

import atheris

from . import target

if __name__ == "__main__":
    logging.disable()  # its own word for each module that it looks into
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["acme_alpn_proxy"]):
        chosen = target(name)
    atheris.Setup(sys.argv, chosen.check)
    atheris.Fuzz()
