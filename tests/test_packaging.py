"""What is made of the options: the man page and the completions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.python.usage import UsageError

from acme_alpn_proxy.options import REDIRECTS, ConsoleOptions

ROOT = Path(__file__).parent.parent
PROGRAM = "acme-alpn-proxy"
LONG_OPTIONS = {f"--{name.rstrip('=')}" for name in ConsoleOptions().longOpt if name != "h"}


def run(*command: str | Path) -> str:
    """Run a command that has to go well without a word on stderr; gives what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def commands() -> set[str]:
    """The commands, as the program names them to who gives none."""
    with pytest.raises(UsageError) as refusal:
        ConsoleOptions().parseOptions([])
    told = re.search(r"one command is needed, ([a-z, ]+)", str(refusal.value))
    assert told is not None
    return set(re.split(", | or ", told[1].strip()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all that is made."""
    folder = tmp_path_factory.mktemp("made")
    run(sys.executable, ROOT / "packaging/generate.py", folder)
    return folder


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    """The man page as it is read."""
    return run("man", "--warnings", "-l", made / f"{PROGRAM}.8")


def test_man_page_names_everything(page: str) -> None:
    """The man page has every option, every command and every variable."""
    assert set(re.findall(r"--[a-z0-9-]+", page)) >= LONG_OPTIONS
    margin = re.search(r"^NAME\n( +)", page, re.MULTILINE)  # 7 or, from groff 1.24 on, 5 spaces
    assert margin is not None
    commands_on = page.partition("COMMANDS")[2]
    named = set(re.findall(rf"^{margin[1]}([a-z]+)\b", commands_on, re.MULTILINE))
    assert commands() <= named
    assert {"ACME_ALPN_PROXY_PIDFILE", "ACME_ALPN_PROXY_RULESPEC"} <= set(page.split())
    statuses = page.partition("EXIT STATUS")[2].partition("FILES")[0]
    assert re.search(r"^ +77 +not permitted$", statuses, re.MULTILINE)


def test_man_page_is_sound(made: Path) -> None:
    """mandoc, which is stricter than man, has nothing against the man page."""
    assert run("mandoc", "-T", "lint", made / f"{PROGRAM}.8") == ""


def complete_in_bash(made: Path, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    script = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1));'
        '_acme_alpn_proxy; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    file = made / f"{PROGRAM}.bash"
    return set(run("bash", "-uc", script, "bash", file, PROGRAM, *words).split())


def complete_in_fish(made: Path, *words: str) -> set[str]:
    """What fish offers for the last of these words."""
    line = " ".join([PROGRAM, *words])
    file = made / f"{PROGRAM}.fish"
    offers = run("fish", "--no-config", "-c", f"source {file}; complete -C '{line}'").splitlines()
    return {offer.split("\t")[0] for offer in offers}


@pytest.mark.parametrize("complete", [complete_in_bash, complete_in_fish])
def test_completion(made: Path, complete: Callable[..., set[str]]) -> None:
    """bash and fish offer commands, options, and the values that an option can have."""
    assert complete(made, "") == commands() | {"doctor"}
    assert complete(made, "sto") == {"stop"}
    assert complete(made, "--") - {"--"} >= LONG_OPTIONS
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
fpath=($ZDOTDIR $fpath)
autoload -Uz compinit
compinit -u -D
tell() { print -r -- $BUFFER; exit }
zle -N tell
bindkey '^X' tell
"""


def complete_in_zsh(made: Path, line: str) -> str:
    """What zsh makes of a line when Tab is typed; it completes at a terminal alone."""
    (made / ".zshrc").write_text(TYPED_IN_ZSH)
    ours, theirs = os.openpty()
    try:
        os.write(ours, f"{line}\t\x18".encode())
        done = subprocess.run(
            ["zsh", "-d", "-i"],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={"PATH": os.environ["PATH"], "TERM": "dumb", "ZDOTDIR": str(made)},
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
    assert complete_in_zsh(made, f"{PROGRAM} {typed}") == f"{PROGRAM} {completed}"


def test_completion_for_zsh_has_everything(made: Path) -> None:
    """What zsh is given has every option and command."""
    text = (made / f"_{PROGRAM}").read_text()
    assert set(re.findall(r"--[a-z0-9-]+", text)) >= LONG_OPTIONS
    assert commands() <= set(re.findall(r'([a-z]+)\\:"', text))
