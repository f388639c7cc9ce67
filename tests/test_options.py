"""The command line and the environment: what is understood, and what is refused in which words."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest
from twisted.python.usage import UsageError

from acme_alpn_proxy import __version__
from acme_alpn_proxy.console import cli
from acme_alpn_proxy.options import ALIASES, COMMANDS, ConsoleOptions, ProxyOptions, Unusable

COMMAND_NEEDED = "one command is needed, start, stop, run, status, check, explain or hook"
RUN_NEEDS = "run needs a command behind --, as in: acme-alpn-proxy run -- lego run"


def console(*words: str, environment: Mapping[str, str] | None = None) -> ConsoleOptions:
    """The console script's options, parsed."""
    options = ConsoleOptions()
    options.environment = environment or {}
    options.parseOptions(words)
    return options


def refusal(*words: str, environment: Mapping[str, str] | None = None) -> str:
    """Why these words are refused."""
    with pytest.raises(UsageError) as problem:
        console(*words, environment=environment)
    return str(problem.value)


def test_defaults() -> None:
    """Without options they are those of the original program."""
    options = console("start")
    assert options["command"] == "start"
    assert (options["alpn"].text, options["fallback"].text) == ("127.0.0.1:31443", "127.0.0.1:443")
    assert options["redirect"] == "iptables,nftables,sk-lookup"
    assert options["drain-timeout"] == 180.0
    assert options["rulespec"] is None
    assert options["ipv6"] is True
    assert options["pidfile"] == "/var/run/acme-alpn-proxy.pid"
    assert options["logfile"] == "/var/log/acme-alpn-proxy.log"
    assert not options["nodaemon"]
    assert not options["wait"]


@pytest.mark.parametrize(
    "words",
    [
        ("--alpn", "[::1]:5001", "start"),
        ("--alpn=[::1]:5001", "start"),
        ("-alpn", "[::1]:5001", "start"),
        ("-alpn=[::1]:5001", "start"),
        ("start", "-alpn", "[::1]:5001"),
        ("start", "-alpn=[::1]:5001"),
        ("start", "--alpn", "[::1]:5001"),
    ],
)
def test_dashes_and_order(words: tuple[str, ...]) -> None:
    """One dash or two, with an equals sign or not, before or after the command: all the same."""
    options = console(*words)
    assert (options["alpn"].host, options["alpn"].port) == ("::1", 5001)
    assert options["command"] == "start"


def test_single_dashes_of_twistd() -> None:
    """Behind C{twistd acme-alpn-proxy} single dashes do too."""
    options = ProxyOptions()
    options.environment = {}
    options.parseOptions(["-fallback", "web.example:8443", "-redirect=none"])
    assert options["fallback"].host == "web.example"
    assert options["redirect"] == "none"


def test_no_words() -> None:
    """The defaults are complete."""
    options = ProxyOptions()
    options.environment = {}
    options.parseOptions()
    assert options["linger"] == 15.0


@pytest.mark.parametrize(
    "words", [("-n", "start"), ("start", "-nodaemon"), ("--nodaemon", "start")]
)
def test_foreground(words: tuple[str, ...]) -> None:
    """C{-n} and its long forms stay in the foreground."""
    assert console(*words)["nodaemon"]


def test_wait() -> None:
    """C{--wait} goes with stop and with run, and with nothing else."""
    assert console("stop", "--wait")["wait"]
    assert console("run", "--wait", "--", "true")["wait"]
    assert refusal("start", "--wait") == "--wait goes with stop or run"


def test_each_command_can_be_run() -> None:
    """What is understood as a command is one that can be run."""
    assert set(COMMANDS) == set(cli.COMMANDS)
    assert set(ALIASES.values()) <= set(COMMANDS)


def test_check() -> None:
    """C{check} goes by the name of C{doctor} too; its flags go with nothing else."""
    options = console("doctor", "--probe", "--json")
    assert (options["command"], options["probe"], options["json"]) == ("check", 1, 1)
    assert refusal("start", "--probe") == "--probe goes with check"
    assert refusal("stop", "-json") == "--json goes with status or check or explain"
    words = ("check", "--probe", "--redirect", "none")
    assert refusal(*words) == "--probe steers: choose one by --redirect, not none"
    assert console("check", "--redirect", "none")["probe"] == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), COMMAND_NEEDED),
        (
            ("restart",),
            f"{COMMAND_NEEDED}, not 'restart'",
        ),
        (
            ("start", "stop"),
            f"{COMMAND_NEEDED}, not 'start stop'",
        ),
        (
            ("start", "--", "-x"),
            f"{COMMAND_NEEDED}, not 'start -x'",
        ),
        (
            ("--", "start"),
            f"{COMMAND_NEEDED}, not 'start'",
        ),
        (("run",), RUN_NEEDS),
        (("run", "--"), RUN_NEEDS),
        (("run", "lego"), RUN_NEEDS),
        (("run", "lego", "--", "run"), RUN_NEEDS),
    ],
)
def test_commands(words: tuple[str, ...], why: str) -> None:
    """Anything but one known command is refused, and shown."""
    assert refusal(*words) == why


@pytest.mark.parametrize(
    "words", [("stop", "-n"), ("run", "--nodaemon", "--", "true"), ("-n", "stop")]
)
def test_foreground_with_start_alone(words: tuple[str, ...]) -> None:
    """C{-n} goes with start alone."""
    assert refusal(*words) == "--nodaemon goes with start"


def test_run() -> None:
    """Behind C{run --} is another program's command line, and none of it is taken for ours."""
    options = console("run", "-alpn", "[::1]:5001", "--", "lego", "-alpn", "-x", "--", "run")
    assert (options["command"], options["alpn"].port) == ("run", 5001)
    assert options["argv"] == ["lego", "-alpn", "-x", "--", "run"]


def test_shared() -> None:
    """C{--shared} goes with run alone, C{--json} and C{--watch} with status."""
    assert console("status", "--json", "--watch")["watch"]
    assert refusal("stop", "--json") == "--json goes with status or check or explain"
    assert refusal("stop", "--watch") == "--watch goes with status"
    assert console("run", "--shared", "--", "true")["shared"]
    assert refusal("start", "--shared") == "--shared goes with run"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--frobnicate", "start"), "option --frobnicate not recognized"),
        (("start", "-x"), "option -x not recognized"),
        (("start", "--alpn"), "option --alpn requires argument"),
        (("start", "--nodaemon=yes"), "option --nodaemon must not have an argument"),
    ],
)
def test_unknown_flags(words: tuple[str, ...], why: str) -> None:
    """An unknown flag is refused by name, as is a flag without its argument."""
    assert refusal(*words) == why


@pytest.mark.parametrize("option", ["alpn", "fallback"])
@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1", "'127.0.0.1': a host and a port are needed, as in 127.0.0.1:443"),
        ("127.0.0.1:0", "'127.0.0.1:0': the port must be a number from 1 to 65535, not '0'"),
        ("web:70000", "'web:70000': the port must be a number from 1 to 65535, not '70000'"),
        ("[::g]:443", "'[::g]:443': '::g' is not an IPv6 address; one looks like [::1]:443"),
        ("", "'': a host and a port are needed, as in 127.0.0.1:443"),
    ],
)
def test_bad_addresses(option: str, address: str, why: str) -> None:
    """A bad address is refused with the option's name, the text and the remedy."""
    assert refusal("start", f"--{option}={address}").endswith(f"--{option} {why}")


@pytest.mark.parametrize("option", ["alpn", "fallback"])
@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:21443", "localhost:21443", "[::1]:21443", "tcp:host=127.0.0.1:port=21443"],
)
def test_own_listener(option: str, address: str) -> None:
    """A target that is the proxy itself would make connections go round: refused."""
    assert refusal(f"--{option}", address, "start") == (
        f"--{option} {address} is the proxy's own listener, so connections would go round for ever:"
        " name the port of the program that is to answer"
    )


@pytest.mark.parametrize("option", ["hello-timeout", "connect-timeout", "linger", "drain-timeout"])
@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", "86401", ""])
def test_bad_seconds(option: str, value: str) -> None:
    """Seconds that are no number, or none from 0 to a day, are refused."""
    assert refusal(f"--{option}={value}", "start").endswith(
        f"--{option} {value!r}: seconds are needed, a number from 0 to 86400"
    )


@pytest.mark.parametrize(("value", "seconds"), [("0", 0.0), ("2.5", 2.5), ("86400", 86_400.0)])
def test_seconds(value: str, seconds: float) -> None:
    """Fractions are taken, and both ends of the range."""
    assert console("start", "--linger", value)["linger"] == seconds


def test_unknown_redirect() -> None:
    """A way of steering that there is not is refused with those that there are."""
    assert refusal("start", "--redirect", "magic").endswith(
        "--redirect 'magic': choose one of iptables, nftables, sk-lookup, auto, none"
    )
    for words in ("iptables,magic", "iptables,none", "auto,iptables", "iptables,"):
        assert refusal("start", "--redirect", words).endswith(
            f"--redirect {words!r}: choose from iptables, nftables, sk-lookup"
        )


@pytest.mark.parametrize(
    ("given", "ways"),
    [
        ("nftables", "nftables"),
        ("none", "none"),
        ("sk-lookup,iptables", "sk-lookup,iptables"),
        ("nftables,iptables,nftables", "nftables,iptables"),
        ("auto", "sk-lookup,nftables,iptables"),
    ],
)
def test_ways(given: str, ways: str) -> None:
    """Ways of steering are one name or a list, in which each counts once; auto is a list."""
    assert console("start", "--redirect", given)["redirect"] == ways


@pytest.mark.parametrize(
    ("option", "default", "choices"),
    [
        ("log-format", "text", "text, json"),
        ("log-level", "info", "debug, info, warn, error"),
    ],
)
def test_logs(option: str, default: str, choices: str) -> None:
    """Format and level of the log are one of a few."""
    assert console("start")[option] == default
    for choice in choices.split(", "):
        assert console("start", f"--{option}={choice}")[option] == choice
    assert refusal("start", f"--{option}=no").endswith(f"--{option} 'no': choose one of {choices}")


def unusable(option: str, value: str, status: int) -> str:
    """What C{start} says of an option that asks for what is not there, with this exit status."""
    with pytest.raises(Unusable) as refused:
        console(option, value, "start")
    assert refused.value.status == status
    return str(refused.value)


def test_user_and_group() -> None:
    """A user and a group are taken by name or number; one that does not exist is refused."""
    options = console("start", "--uid", "nobody", "--gid", "7")
    assert (options["uid"], options["gid"]) == (65_534, 7)
    for bad in ("no-such", "-5", "4294967294", "99999999999"):
        assert f"--uid {bad!r}: there is no such user; " in unusable("--uid", bad, os.EX_NOUSER)
        assert f"--gid {bad!r}: there is no such group; " in unusable("--gid", bad, os.EX_NOUSER)


def test_rulespec() -> None:
    """The environment's rulespec is split as a shell would; a blank one is none at all."""
    spec = "-p tcp -m comment --comment 'my proxy'"
    options = console("start", environment={"ACME_ALPN_PROXY_RULESPEC": spec})
    assert options["rulespec"] == ["-p", "tcp", "-m", "comment", "--comment", "my proxy"]
    for blank in ("", "  "):
        options = console("start", environment={"ACME_ALPN_PROXY_RULESPEC": blank})
        assert options["rulespec"] is None


def test_bad_rulespec() -> None:
    """A quote that is not closed is refused, and the rulespec shown."""
    spec = "-p tcp --comment 'my proxy"
    with pytest.raises(Unusable) as refused:
        console("start", environment={"ACME_ALPN_PROXY_RULESPEC": spec})
    assert str(refused.value) == (
        f"ACME_ALPN_PROXY_RULESPEC: No closing quotation in {spec!r}; quote as in a shell"
    )
    assert refused.value.status == os.EX_CONFIG


@pytest.mark.parametrize(("value", "ipv6"), [("y", False), ("", True), ("n", True), ("yes", True)])
def test_disable_ipv6(value: str, ipv6: bool) -> None:
    """Only C{y} leaves IPv6 alone, as in the original program."""
    options = console("start", environment={"ACME_ALPN_PROXY_DISABLEV6": value})
    assert options["ipv6"] is ipv6


def test_paths() -> None:
    """Paths are those seen from where the command was given: the daemon leaves that folder."""
    options = console(
        "start", "--logfile", "my.log", environment={"ACME_ALPN_PROXY_PIDFILE": "run/my.pid"}
    )
    assert options["logfile"] == os.path.join(os.getcwd(), "my.log")
    assert options["pidfile"] == os.path.join(os.getcwd(), "run/my.pid")


def test_real_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's own environment is read when nothing else is given."""
    monkeypatch.setenv("ACME_ALPN_PROXY_PIDFILE", "/run/my.pid")
    options = ConsoleOptions()
    options.parseOptions(["stop"])
    assert options["pidfile"] == "/run/my.pid"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """C{--help} shows the usage, every command and every variable on a line of its own."""
    with pytest.raises(SystemExit) as end:
        console("--help")
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Usage: acme-alpn-proxy [options] start|stop|status|check"
    assert lines[1] == "       acme-alpn-proxy [options] run -- COMMAND..."
    for beginning in (
        "start ",
        "stop ",
        "run ",
        "status ",
        "ACME_ALPN_PROXY_PIDFILE ",
        "ACME_ALPN_PROXY_RULESPEC ",
        "ACME_ALPN_PROXY_DISABLEV6=y ",
        "77 ",
    ):
        assert [line for line in lines if line.startswith(beginning)] != [], beginning


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """C{--version} prints this program's, not Twisted's."""
    with pytest.raises(SystemExit) as end:
        console("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"acme-alpn-proxy {__version__}\n"


@pytest.mark.parametrize("flag", ["-h", "--help", "-help"])
def test_ways_to_ask_for_help(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Help is asked for in each of the usual ways, Go's among them."""
    with pytest.raises(SystemExit) as end:
        console(flag)
    assert not end.value.code
    assert "Usage: acme-alpn-proxy" in capsys.readouterr().out
