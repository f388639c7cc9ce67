"""The completions, tried in the shells."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from acme_alpn_proxy.console.completion import NAMES
from acme_alpn_proxy.options import COMMANDS, REDIRECTS, SHELLS, ConsoleOptions

from .commands import NAME, program, run

ROOT = Path(__file__).parents[2]
LONG_OPTIONS = {f"--{name.rstrip('=')}" for name in ConsoleOptions().longOpt if len(name) > 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the output of C{completion} for each shell; zsh needs a special file name."""
    folder = tmp_path_factory.mktemp("made")
    for shell in SHELLS:
        (folder / shell).write_text(program("completion", shell))
    (folder / f"_{NAME}").write_text(program("completion", "zsh"))
    return folder


def complete_in_bash(made: Path, *words: str) -> set[str]:
    """The words that bash offers for the last of these words."""
    script = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1));'
        '_acme_alpn_proxy; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    file = made / "bash"
    return set(run("bash", "-uc", script, "bash", file, NAME, *words).split())


def complete_in_fish(made: Path, *words: str) -> set[str]:
    """The words that fish offers for the last of these words."""
    line = " ".join([NAME, *words])
    file = made / "fish"
    offers = run("fish", "--no-config", "-c", f"source {file}; complete -C '{line}'").splitlines()
    return {offer.split("\t")[0] for offer in offers}


@pytest.mark.parametrize("complete", [complete_in_bash, complete_in_fish])
def test_completion(made: Path, complete: Callable[..., set[str]]) -> None:
    """bash and fish offer commands, options, and the values that an option can have."""
    assert complete(made, "") == set(COMMANDS)
    assert complete(made, "sto") == {"stop"}
    assert complete(made, "--") - {"--"} >= LONG_OPTIONS
    assert complete(made, "help", "") == set(COMMANDS)
    assert complete(made, "completion", "") == set(SHELLS)
    assert complete(made, "--redirect", "") == set(REDIRECTS)
    assert complete(made, "--uid", "nobod") == {"nobody"}
    assert complete(made, "--hello-timeout", "") == set()
    assert str(ROOT / "pyproject.toml") in complete(made, "--logfile", str(ROOT / "pyproj"))


def test_completion_in_bash(made: Path) -> None:
    """bash hands C{--option=value} over in three words; single dashes are for old hooks."""
    assert complete_in_bash(made, "--redirect", "=") == set(REDIRECTS)
    assert complete_in_bash(made, "--redirect", "=", "sk") == {"sk-lookup"}
    assert complete_in_bash(made, "-redirect", "no") == {"none"}
    assert "sh" in complete_in_bash(made, "run", "--", "sh")


TYPED_IN_ZSH = """
PROMPT=
if [[ $FROM = file ]]; then fpath=($ZDOTDIR $fpath); fi
autoload -Uz compinit
compinit -u -D
if [[ $FROM = text ]]; then eval "$(<$ZDOTDIR/zsh)"; fi
tell() { print -r -- $BUFFER; exit }
zle -N tell
bindkey '^X' tell
"""


def complete_in_zsh(made: Path, line: str, how: str) -> str:
    """The line that zsh makes after Tab; zsh completes only at a terminal."""
    (made / ".zshrc").write_text(TYPED_IN_ZSH)
    ours, theirs = os.openpty()
    try:
        os.write(ours, f"{line}\t\x18".encode())
        done = subprocess.run(
            ["zsh", "-d", "-i"],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={"PATH": os.environ["PATH"], "TERM": "dumb", "ZDOTDIR": str(made), "FROM": how},
            start_new_session=True,
            text=True,
            timeout=60,
            check=True,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    return done.stdout.rstrip()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("sto", "stop"),
        ("help sto", "help stop"),
        ("completion z", "completion zsh"),
        ("--redir", "--redirect="),
        ("--redirect=sk", "--redirect=sk-lookup"),
        ("--redirect sk", "--redirect sk-lookup"),
        ("--uid=nobod", "--uid=nobody"),
        (f"--logfile={ROOT}/pyproj", f"--logfile={ROOT}/pyproject.toml"),
        ("--hello-timeout ", "--hello-timeout"),
    ],
)
def test_completion_in_zsh(made: Path, typed: str, completed: str) -> None:
    """zsh completes commands, options, and the values that an option can have."""
    assert complete_in_zsh(made, f"{NAME} {typed}", "file") == f"{NAME} {completed}"


@pytest.mark.parametrize("name", NAMES)
def test_evaluated_in_zsh(made: Path, name: str) -> None:
    """With C{eval} in C{.zshrc} the completion works too, also for the one-file program."""
    assert complete_in_zsh(made, f"{name} sto", "text") == f"{name} stop"


@pytest.mark.parametrize("shell", SHELLS)
def test_one_file(made: Path, shell: str) -> None:
    """The completion also knows the one-file program."""
    assert "acme-alpn-proxy.pyz" in (made / shell).read_text()


def test_completion_for_zsh_has_everything(made: Path) -> None:
    """The completions for zsh have every option and command."""
    text = (made / f"_{NAME}").read_text()
    assert set(re.findall(r"--[a-z0-9-]+", text)) >= LONG_OPTIONS
    assert set(COMMANDS) <= set(re.findall(r'([a-z]+)\\:"', text))
