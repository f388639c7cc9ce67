"""The main job: a certificate while visitors notice nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..documents import ROOT
from .acme import lego, pebble
from .netns import COMMAND_SECONDS, Street
from .proxy import Proxy
from .visitors import visitors
from .website import NAME, Website


def test_certificate_is_issued_while_visitors_notice_nothing(
    road: Street, site: Website, proxy: Proxy, tmp_path: Path
) -> None:
    """lego gets a certificate by TLS-ALPN-01 between start and stop; every visitor is served."""
    with (
        pebble(road.visitor, road.host, tmp_path / "ca") as ca,
        visitors(site, road.visitor, road.host) as crowd,
    ):
        proxy.start()
        crowd.wait_for(10, steered=True)
        issued = lego(road.host.namespace, ca, tmp_path / "lego", NAME)
        proxy.stop(wait=True)
        crowd.wait_for(10)
        report = crowd.leave()

    assert issued.names == [NAME]
    assert issued.challenges == ["tls-alpn-01"]
    assert report.failed == 0, report
    assert report.steered > 0
    # The peers are the CA's perspectives: three validations, each over IPv6.
    acme = [line for line in proxy.log.splitlines() if "acme" in line and road.visitor.ipv6 in line]
    assert len(acme) >= 3, proxy.log
    assert road.host.namespace.rules() == []


def test_demo() -> None:
    """C{make demo} shows a certificate and visitors without a failure."""
    demo = [sys.executable, "-m", "tests.integration.demo"]
    shown = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert shown.returncode == 0, shown.stderr
    assert "failures    0" in shown.stdout
