"""The man page and the shells' completions, made of the options themselves.

Usage: python packaging/generate.py DIRECTORY
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from twisted.python.reflect import accumulateClassList
from twisted.python.usage import UsageError

from acme_alpn_proxy import __version__
from acme_alpn_proxy.options import DEFAULT_LOGFILE, DEFAULT_PIDFILE, ConsoleOptions

NAME: Final = "acme-alpn-proxy"

KINDS: Final = {"logfile": "file", "uid": "user", "gid": "group"}
"""What a shell knows the values of, by the option."""


@dataclass(frozen=True)
class Option:
    """An option as a user sees it.

    @ivar choices: all the values it may have; none where it takes any, or none at all.
    """

    long: str
    short: str | None
    takes_value: bool
    about: str
    default: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What its value is, if it takes any."""
        if not self.takes_value:
            return "none"
        return "choice" if self.choices else KINDS.get(self.long, "any")


def options() -> list[Option]:
    """All options of the console script, by name."""
    flags: list[Any] = []
    parameters: list[Any] = []
    accumulateClassList(ConsoleOptions, "optFlags", flags)
    accumulateClassList(ConsoleOptions, "optParameters", parameters)
    found = [Option(long, short, False, about) for long, short, about in flags]
    for long, short, default, about, *coerce in parameters:
        shown = None if default is None else f"{getattr(default, 'text', default)}"
        if isinstance(default, float):
            shown = f"{default:g}"
        found.append(Option(long, short, True, about, shown, _choices(*coerce)))
    for name, method in inspect.getmembers(ConsoleOptions, inspect.isfunction):
        long = name.removeprefix("opt_").replace("_", "-")
        if name.startswith("opt_") and len(long) > 1:  # opt_h is a name for another
            about = (inspect.getdoc(method) or "").splitlines()[0].rstrip(".")
            found.append(Option(long, "h" if long == "help" else None, False, about))
    return sorted(found, key=lambda option: option.long)


def _choices(coerce: Callable[[str], object] | None = None) -> tuple[str, ...]:
    """What an option says when it is given none of its values."""
    try:
        if coerce is not None:
            coerce("")
    except (UsageError, ValueError) as problem:
        told = re.search(r"choose one of (.*)", str(problem))
        return tuple(told[1].split(", ")) if told else ()
    return ()


def commands() -> dict[str, str]:
    """All commands, and what they do: a paragraph of the help."""
    (paragraph,) = [text for text in _paragraphs() if text.startswith("start ")]
    return dict(_entries(paragraph))


def _paragraphs() -> list[str]:
    return ConsoleOptions.longdesc.split("\n\n")


def _entries(paragraph: str) -> Iterator[tuple[str, str]]:
    """A term and what it is, of each line; a line that begins with a space goes on."""
    for line in re.sub(r"\n +", " ", paragraph).splitlines():
        term, about = line.split(None, 1)
        yield term, about


# The man page: the macros of man(7).


def manual() -> str:
    """acme-alpn-proxy(8)."""
    date = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    title = f'.TH {NAME.upper()} 8 "{time.strftime("%Y-%m-%d", date)}" "{NAME} {__version__}"'
    lines = [title, ".SH NAME", _roff(f"{NAME} - TLS-ALPN-01 beside a web server, on port 443")]
    lines += [".SH SYNOPSIS", ".nf"]
    synopsis = ConsoleOptions.synopsis.removeprefix("Usage: ")
    lines += [_roff(line.strip()) for line in synopsis.splitlines()]
    lines += [".fi", ".SH DESCRIPTION"]
    later = []
    for text in _paragraphs():
        section = re.match(r"([A-Z][a-z ]+):\s+", text)
        if text.startswith("start "):
            later += [".SH COMMANDS", *_list(commands().items())]
            later += [".SH OPTIONS", *_list(_option_entries())]
        elif section:
            body = text[section.end() :]
            later.append(f".SH {section[1].upper()}")
            later += _list(_entries(body)) if "\n" in section[0] else [_roff(body)]
        else:
            lines.append(_roff(text))
    files = {DEFAULT_PIDFILE: "the PID of the instance that runs", DEFAULT_LOGFILE: "the log"}
    lines += [*later, ".SH FILES", *_list(files.items())]
    return "\n".join(lines) + "\n"


def _option_entries() -> Iterator[tuple[str, str]]:
    for option in options():
        names = f"--{option.long}" + "=VALUE" * option.takes_value
        default = f" (default: {option.default})" if option.default is not None else ""
        yield f"-{option.short}, {names}" if option.short else names, option.about + default


def _list(entries: Iterable[tuple[str, str]]) -> list[str]:
    lines = []
    for term, about in entries:
        lines += [".TP", f".B {_roff(term)}", _roff(about)]
    return lines


def _roff(text: str) -> str:
    text = textwrap.fill(text, 72, break_on_hyphens=False, break_long_words=False)
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


# The completions.


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
        if option.kind in words:
            reply = f'COMPREPLY=($(compgen {words[option.kind]} -- "$word")); return'
            cases.append(f"    --{option.long} | -{option.long}) {reply} ;;")
        elif option.takes_value:
            cases.append(f"    --{option.long} | -{option.long}) return ;;")
    names = " ".join(f"--{option.long}" for option in options())
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
    -*) COMPREPLY=($(compgen -W {_quoted(names)} -- "$word")) ;;
    *) COMPREPLY=($(compgen -W {_quoted(" ".join(commands()))} -- "$word")) ;;
    esac
}}
complete -F _acme_alpn_proxy {NAME}
"""


def zsh() -> str:
    """For zsh: a function of its completion system."""
    lines = [f"#compdef {NAME}", "_arguments \\"]
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
        names = f"--{option.long}{'=' * option.takes_value}"
        if option.short:
            names = f"'(-{option.short} {names})'{{-{option.short},{names}}}"
        lines.append(f"  {names}{about} \\")
    about_commands = [(name, _escaped(about, '"$`')) for name, about in commands().items()]
    words = " ".join(f'{name}\\:"{about}"' for name, about in about_commands)
    lines.append(f"  {_quoted(f'1:command:(({words}))')} \\")
    lines.append("  '*::command to run:_normal'")
    return "\n".join(lines) + "\n"


def fish() -> str:
    """For fish."""
    lines = [f"complete -c {NAME} -f"]
    for name, about in commands().items():
        words = f"-n __fish_use_subcommand -a {name} -d {_quoted_for_fish(about)}"
        lines.append(f"complete -c {NAME} {words}")
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


def main(directory: str) -> None:
    """Write them all."""
    for name, text in (
        (f"{NAME}.8", manual()),
        (f"{NAME}.bash", bash()),
        (f"_{NAME}", zsh()),
        (f"{NAME}.fish", fish()),
    ):
        Path(directory, name).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
