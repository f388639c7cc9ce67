"""The completions for bash, zsh and fish, made from the options themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from ..options import COMMANDS, SHELLS
from .help import NAME, options

NAMES: Final = (NAME, f"{NAME}.pyz")
"""The names of the program."""

_WORDS_AFTER: Final[dict[str, Iterable[str]]] = {
    "help": COMMANDS,
    "completion": SHELLS,
    "hook": ("uacme", "dehydrated"),
}
"""The words that may follow a command."""


def bash() -> str:
    """For bash, with or without the package bash-completion."""
    cases = []
    for option in options():
        words = {
            "choice": f"-W {_quoted(' '.join(option.choices))}",
            "file": "-f",
            "user": "-u",
            "group": "-g",
        }
        reply = ""
        if option.kind in words:
            reply = f'COMPREPLY=($(compgen {words[option.kind]} -- "$word")); '
        if option.value:
            cases.append(f"    --{option.long} | -{option.long}) {reply}return ;;")
    for command, words_after in _WORDS_AFTER.items():
        cases.append(f"    {command}) COMPREPLY=({_compgen(words_after)}); return ;;")
    names = [f"--{option.long}" for option in options()]
    return rf"""_acme_alpn_proxy() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} at=$((COMP_CWORD - 1)) each
    COMPREPLY=()
    for each in "${{COMP_WORDS[@]:1:at}}"; do
        if [ "$each" = -- ]; then COMPREPLY=($(compgen -c -f -- "$word")); return; fi
    done
    # --option=value comes as three words.
    if [ "$word" = = ]; then word=; elif [ "${{COMP_WORDS[at]}}" = = ]; then at=$((at - 1)); fi
    case ${{COMP_WORDS[at]}} in
{chr(10).join(cases)}
    esac
    case $word in
    -*) COMPREPLY=({_compgen(names)}) ;;
    *) COMPREPLY=({_compgen(COMMANDS)}) ;;
    esac
}}
complete -F _acme_alpn_proxy {" ".join(NAMES)}
"""


def _compgen(words: Iterable[str]) -> str:
    return f'$(compgen -W {_quoted(" ".join(words))} -- "$word")'


def zsh() -> str:
    """For zsh, as a file in C{fpath} or for C{eval}."""
    lines = [f"#compdef {' '.join(NAMES)}", "_acme_alpn_proxy() {", "case $CURRENT$words[2] in"]
    for command, words_after in _WORDS_AFTER.items():
        lines.append(f"(3{command}) compadd {' '.join(words_after)}; return ;;")
    lines += ["esac", "_arguments \\"]
    for option in options():
        value = {
            "none": "",
            "any": ":value: ",
            "choice": f":value:({' '.join(option.choices)})",
            "file": ":file:_files",
            "user": ":user:_users",
            "group": ":group:_groups",
        }[option.kind]
        about = _quoted(f"[{_escaped(option.about, '[]:')}]{value}")
        names = f"--{option.long}{'=' * bool(option.value)}"
        if option.short:
            names = f"'(-{option.short} {names})'{{-{option.short},{names}}}"
        lines.append(f"  {names}{about} \\")
    about_commands = [(name, _escaped(about, '"$`')) for name, about in COMMANDS.items()]
    words = " ".join(f'{name}\\:"{about}"' for name, about in about_commands)
    lines.append(f"  {_quoted(f'1:command:(({words}))')} \\")
    lines += ["  '*::command to run:_normal'", "}"]
    lines.append('if [ "$funcstack[1]" = _acme-alpn-proxy ]; then _acme_alpn_proxy "$@"')
    lines.append(f"else compdef _acme_alpn_proxy {' '.join(NAMES)}; fi")
    return "\n".join(lines) + "\n"


def fish() -> str:
    """For fish."""
    lines = [f"complete -c {name} -w {NAME}" for name in NAMES[1:]]
    lines.append(f"complete -c {NAME} -f")
    for name, about in COMMANDS.items():
        words = f"-n __fish_use_subcommand -a {name} -d {_quoted_for_fish(about)}"
        lines.append(f"complete -c {NAME} {words}")
    for name, words_after in _WORDS_AFTER.items():
        condition = _quoted_for_fish(f"__fish_seen_subcommand_from {name}")
        offers = _quoted_for_fish(" ".join(words_after))
        lines.append(f"complete -c {NAME} -n {condition} -a {offers}")
    for option in options():
        value = {
            "none": "",
            "any": " -x",
            "choice": f" -xa '{' '.join(option.choices)}'",
            "file": " -rF",
            "user": " -xa '(__fish_complete_users)'",
            "group": " -xa '(__fish_complete_groups)'",
        }[option.kind]
        short = f" -s {option.short}" if option.short else ""
        about = _quoted_for_fish(option.about)
        lines.append(f"complete -c {NAME}{short} -l {option.long}{value} -d {about}")
    return "\n".join(lines) + "\n"


def _escaped(text: str, characters: str) -> str:
    return re.sub(rf"([\\{re.escape(characters)}])", r"\\\1", text)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"'\''") + "'"


def _quoted_for_fish(text: str) -> str:
    return f"'{_escaped(text, chr(39))}'"


COMPLETIONS: Final[dict[str, Callable[[], str]]] = {"bash": bash, "zsh": zsh, "fish": fish}
"""The function that makes the completions, for each of L{SHELLS}."""
