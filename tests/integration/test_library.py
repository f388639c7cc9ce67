"""The example of an operator's own way to steer, in an application that twistd runs."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from ..documents import ROOT
from .netns import Street, terminate, wait_until
from .website import PAGE, Website

TWISTD = Path(sys.executable).parent / "twistd"
EXAMPLE = ROOT / "examples" / "own_redirect.tac"
STEER = """#!/bin/sh
case $1 in
on) operation=-I ;;
off) operation=-D ;;
esac
for each in iptables ip6tables; do
    $each -w 5 -t nat $operation PREROUTING -p tcp --dport 443 -j REDIRECT --to-ports 21443 || exit
done
echo "$1" >>"$0.log"
"""


def test_own_redirect(road: Street, site: Website, tmp_path: Path) -> None:
    """Visitors are steered by the application's own command, until the application has ended."""
    host = road.host.namespace
    log, command = tmp_path / "log", tmp_path / "steer"
    command.write_text(STEER)
    command.chmod(0o755)
    words = ("env", f"STEER={command}", TWISTD, "-ny", EXAMPLE, "--pidfile=")
    process = host.popen(*words, log=log)
    try:
        started = "Started: the proxy receives new connections to port 443"
        wait_until(lambda: started in log.read_text(), "the example has started")
        with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
            answer = visit.get()
        assert (answer.body, answer.steered) == (PAGE, True)
        process.send_signal(signal.SIGTERM)
        process.wait(15)
    finally:
        terminate(process)
    assert Path(f"{command}.log").read_text().split() == ["on", "off"]
    assert host.rules() == []


def test_command_that_is_missing(road: Street, site: Website, tmp_path: Path) -> None:
    """A refusal of the redirect is one line, and no visitor is steered."""
    words = ("env", "STEER=/nowhere", TWISTD, "-ny", EXAMPLE, "--pidfile=")
    process = road.host.namespace.popen(*words, log=tmp_path / "log")
    try:
        assert process.wait(15) != 0
    finally:
        terminate(process)
    assert "/nowhere is not executable; set STEER to a program" in (tmp_path / "log").read_text()
    assert road.host.namespace.rules() == []
