"""The command line and the environment: what is accepted, and the texts of refusals."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest
from twisted.python.usage import UsageError

from acme_alpn_proxy import __version__
from acme_alpn_proxy.addresses import ORIGINAL
from acme_alpn_proxy.console import cli
from acme_alpn_proxy.options import (
    ALIASES,
    COMMANDS,
    TOPICS,
    About,
    ConsoleOptions,
    ProxyOptions,
    Unusable,
    all_options,
    of_the_proxy,
)

ONE_COMMAND = (
    "one command is needed, start, stop, run, status, check, explain, hook, help, completion or"
    " manual"
)
RUN_NEEDS = "run needs a command after --, for example: acme-alpn-proxy run -- lego run"


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
    """After C{twistd acme-alpn-proxy}, single dashes work too."""
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
    """C{--wait} is accepted with stop and run only."""
    assert console("stop", "--wait")["wait"]
    assert console("run", "--wait", "--", "true")["wait"]
    assert refusal("start", "--wait") == "--wait works only with stop or run"


def test_each_command_can_be_run() -> None:
    """Every command that is accepted can be run."""
    assert set(COMMANDS) == set(cli.COMMANDS)
    assert set(ALIASES.values()) <= set(COMMANDS)


def test_check() -> None:
    """C{check} is also called C{doctor}; its flags are accepted with no other command."""
    options = console("doctor", "--probe", "--json")
    assert (options["command"], options["probe"], options["json"]) == ("check", 1, 1)
    assert refusal("start", "--probe") == "--probe works only with check"
    assert refusal("stop", "-json") == "--json works only with status, check or explain"
    words = ("check", "--probe", "--redirect", "none")
    assert refusal(*words) == (
        "--probe cannot be used with --redirect none, because it steers: choose another one"
    )
    assert console("check", "--redirect", "none")["probe"] == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), ONE_COMMAND),
        (
            ("restart",),
            f"{ONE_COMMAND}, not 'restart'",
        ),
        (
            ("start", "stop"),
            f"{ONE_COMMAND}, not 'start stop'",
        ),
        (
            ("start", "--", "-x"),
            f"{ONE_COMMAND}, not 'start -x'",
        ),
        (
            ("--", "start"),
            f"{ONE_COMMAND}, not 'start'",
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
    """C{-n} is accepted with start only."""
    assert refusal(*words) == "--nodaemon works only with start"


def test_run() -> None:
    """The words after C{run --} are another program's command line, and are not parsed."""
    options = console("run", "-alpn", "[::1]:5001", "--", "lego", "-alpn", "-x", "--", "run")
    assert (options["command"], options["alpn"].port) == ("run", 5001)
    assert options["argv"] == ["lego", "-alpn", "-x", "--", "run"]


def test_shared() -> None:
    """C{--shared} is accepted with run only, C{--json} and C{--watch} with status."""
    assert console("status", "--json", "--watch")["watch"]
    assert refusal("stop", "--json") == "--json works only with status, check or explain"
    assert refusal("stop", "--watch") == "--watch works only with status"
    assert console("run", "--shared", "--", "true")["shared"]
    assert refusal("start", "--shared") == "--shared works only with run"


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
        f"--{option} {address} is the proxy's own port, so the proxy would connect to itself; give"
        f" the address of the {'ACME client' if option == 'alpn' else 'web server'}"
    )


def test_named_routes() -> None:
    """C{--alpn-for} may be repeated, once for each name. Names are compared as in DNS; for an IP
    address, visitors ask with its reverse name."""
    assert console("start")["alpn-for"] == {}
    given = (
        "--alpn-for=Site.Example.=127.0.0.1:31444",
        "-alpn-for=*.site.example=[::1]:31445",
        "--alpn-for=192.0.2.7=unix:path=/run/b.sock",
        "--alpn-for=[2001:db8::7]=node.example:31443",
    )
    named = console(*given, "start")["alpn-for"]
    assert {name: str(address) for name, address in named.items()} == {
        "site.example": "127.0.0.1:31444",
        "*.site.example": "[::1]:31445",
        "7.2.0.192.in-addr.arpa": "unix:path=/run/b.sock",
        f"7.{'0.' * 23}8.b.d.0.1.0.0.2.ip6.arpa": "node.example:31443",
    }


@pytest.mark.parametrize(
    "route",
    [
        "",
        "127.0.0.1:1",
        "=127.0.0.1:1",
        "*=[::1]:1",
        "a.*.b=[::1]:1",
        "b\xfcch.er=[::1]:1",
        "a..b=c:1",
    ],
)
def test_no_name(route: str) -> None:
    """A route without a valid name is refused with an example; the message also says how a name
    with other letters than ASCII begins."""
    assert refusal(f"--alpn-for={route}", "start") == (
        f"--alpn-for {route!r}: a name and an address are needed, such as"
        " site.example=127.0.0.1:31444; an internationalized name is needed in its ASCII"
        " form, which begins with xn--"
    )


def test_bad_named_routes() -> None:
    """A name with two addresses, or with an unusable address, is refused."""
    words = ("--alpn-for", "a.example=[::1]:1", "--alpn-for", "A.example=[::1]:2", "start")
    assert refusal(*words) == (
        "--alpn-for 'A.example=[::1]:2': there is an address for this name already"
    )
    assert refusal("--alpn-for", "a.example=[::1]", "start").startswith(
        "--alpn-for '[::1]': a host and a port are needed"
    )
    assert refusal("--alpn-for", "a.example=[::1]:21443", "start").startswith(
        "--alpn-for [::1]:21443 is the proxy's own port"
    )


def test_original() -> None:
    """C{original} is accepted for the web server, but not for an ACME client."""
    assert console("--fallback", "original", "start")["fallback"] is ORIGINAL
    assert "a host and a port are needed" in refusal("--alpn", "original", "start")


def test_headers() -> None:
    """The PROXY protocol is chosen for each kind of target."""
    for option in ("alpn-proxy-protocol", "fallback-proxy-protocol"):
        assert console("start")[option] == "none"
        assert console(f"--{option}", "v2", "start")[option] == "v2"
        assert refusal(f"--{option}=v3", "start").endswith(
            f"--{option} 'v3': choose one of none, v1, v2"
        )


def test_load_balancers() -> None:
    """Load balancers are given as addresses and networks; a network with host bits set is refused,
    because it is probably a mistake."""
    assert console("start")["proxy-protocol-from"] is None
    networks = console("--proxy-protocol-from=192.0.2.1,2001:db8::/64", "start")
    assert list(map(str, networks["proxy-protocol-from"])) == ["192.0.2.1/32", "2001:db8::/64"]
    for bad in ("", "lb.example", "192.0.2.1/24", "192.0.2.1,", "192.0.2.0/33"):
        why = refusal(f"--proxy-protocol-from={bad}", "start")
        assert "an address or a network is needed, such as 192.0.2.1 or 2001:db8::/64: " in why


@pytest.mark.parametrize("option", ["hello-timeout", "connect-timeout", "linger", "drain-timeout"])
@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", "86401", ""])
def test_bad_seconds(option: str, value: str) -> None:
    """Seconds that are not a number from 0 to a day are refused."""
    assert refusal(f"--{option}={value}", "start").endswith(
        f"--{option} {value!r}: seconds are needed, a number from 0 to 86400"
    )


@pytest.mark.parametrize(("value", "seconds"), [("0", 0.0), ("2.5", 2.5), ("86400", 86_400.0)])
def test_seconds(value: str, seconds: float) -> None:
    """Fractions and both limits of the range are accepted."""
    assert console("start", "--linger", value)["linger"] == seconds


def test_unknown_redirect() -> None:
    """An unknown redirect is refused, and the message lists the known ones."""
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
    """The error of C{start} for an option that needs something missing, with this exit status."""
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
    """The rulespec in the environment is split as a shell would; a blank one counts as not set."""
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
    """Only the value C{y} switches IPv6 off, as in the original program."""
    options = console("start", environment={"ACME_ALPN_PROXY_DISABLEV6": value})
    assert options["ipv6"] is ipv6


def test_paths() -> None:
    """Paths are relative to the folder of the command: the daemon leaves that folder."""
    options = console(
        "start", "--logfile", "my.log", environment={"ACME_ALPN_PROXY_PIDFILE": "run/my.pid"}
    )
    assert options["logfile"] == os.path.join(os.getcwd(), "my.log")
    assert options["pidfile"] == os.path.join(os.getcwd(), "run/my.pid")


def test_real_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's own environment is read if no other is given."""
    monkeypatch.setenv("ACME_ALPN_PROXY_PIDFILE", "/run/my.pid")
    options = ConsoleOptions()
    options.parseOptions(["stop"])
    assert options["pidfile"] == "/run/my.pid"


@pytest.mark.parametrize("words", [("-h",), ("--help",), ("-help",), ("help",), ("-n", "--help")])
def test_ways_to_ask_for_help(words: tuple[str, ...]) -> None:
    """All usual ways to ask for help work, including Go's, with other words on the line."""
    options = console(*words)
    assert (options["command"], options["about"]) == ("help", "")


@pytest.mark.parametrize(
    "words",
    [("help", "run"), ("run", "--help"), ("run", "-h"), ("run", "--help", "--", "lego", "-h")],
)
def test_help_of_a_command(words: tuple[str, ...]) -> None:
    """All usual ways to ask for the help of one command work."""
    options = console(*words)
    assert (options["command"], options["about"]) == ("help", "run")


def test_help_of_another_name() -> None:
    """The help accepts the other name of a command, and refuses an unknown command."""
    assert console("help", "doctor")["about"] == "check"
    assert refusal("help", "restart").startswith("help explains one command: start, stop, ")
    assert refusal("restart", "--help").startswith("help explains one command: start, stop, ")
    assert refusal("help", "start", "stop").startswith("help explains one command: ")


def test_help_of_the_command_of_run() -> None:
    """After C{--}, the request for help goes to the other program."""
    assert console("run", "--", "lego", "--help")["command"] == "run"


def test_completion() -> None:
    """Completions are for one of three shells."""
    assert console("completion", "zsh")["about"] == "zsh"
    for words in ((), ("tcsh",), ("bash", "zsh")):
        assert refusal("completion", *words) == (
            "completion needs the name of a shell, bash, zsh or fish"
        )


@pytest.mark.parametrize("flag", ["-V", "--version", "-version"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """C{--version} prints this program's, not Twisted's."""
    with pytest.raises(SystemExit) as end:
        console(flag)
    assert end.value.code == 0
    assert capsys.readouterr().out == f"acme-alpn-proxy {__version__}\n"


def test_of_the_proxy() -> None:
    """Two starts with different options are different; a command's own options do not count."""
    usual = of_the_proxy(console("start"))
    assert usual["--alpn"] == "127.0.0.1:31443"
    assert (usual["--linger"], usual["--uid"], usual["--force"]) == ("15", "unset", "off")
    for words in (("-n", "start"), ("run", "--wait", "--shared", "--", "true")):
        assert of_the_proxy(console(*words)) == usual
    variables = {"ACME_ALPN_PROXY_RULESPEC": "-j 'a b'", "ACME_ALPN_PROXY_DISABLEV6": "y"}
    given = ("start", "-alpn", "[::1]:5001", "--linger", "1.5", "--force", "--redirect", "auto")
    other = of_the_proxy(console(*given, environment=variables))
    assert {name: text for name, text in other.items() if usual[name] != text} == {
        "--alpn": "[::1]:5001",
        "--linger": "1.5",
        "--force": "on",
        "--redirect": "sk-lookup,nftables,iptables",
        **variables,
    }


def test_topics() -> None:
    """Each option is under a heading of the help, in the order of the help."""
    described = [each[3] for each in all_options("optParameters")]
    described += [each[2] for each in all_options("optFlags")]
    assert [about for about in described if not isinstance(about, About)] == []
    assert {about.topic for about in described} <= set(TOPICS)


def test_bracket_that_is_not_closed() -> None:
    """An IPv6 address as a name has both brackets, or none."""
    assert refusal("--alpn-for=[::1=127.0.0.1:5001", "start").startswith("--alpn-for '[::1=")
    assert refusal("--alpn-for=::1]=127.0.0.1:5001", "start").startswith("--alpn-for '::1]=")


def test_help_of_the_hook() -> None:
    """C{hook --help} explains the hook; a client's own words may be the same."""
    for word in ("--help", "-h"):
        options = console("hook", word)
        assert (options["command"], options["about"]) == ("help", "hook")
    assert console("hook", "uacme", "--help")["argv"] == ["uacme", "--help"]
