"""The main job, shown: a certificate from a test CA while many visitors connect.

Everything happens in network namespaces that are made for it and thrown away; of the host only its
programs are used. Run as root: C{python -m tests.integration.demo}.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .acme import Issued, lego, pebble
from .netns import CommandFailed, NotRoot, street
from .proxy import Proxy
from .visitors import READING_SECONDS, Report, visitors
from .website import NAME, NoWebServer, website

NAMES = (NAME, f"www.{NAME}")


class Unexpected(Exception):
    """Something that the demo was to show has not happened."""


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"  {what:<60}", end="", flush=True)
    began = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed")
        raise
    print(f"{time.monotonic() - began:6.2f} s")


def _issue(directory: Path) -> tuple[Issued, Report]:
    with street() as road, website(road.host.namespace, directory / "site") as site:
        proxy = Proxy(road.host.namespace, directory)
        before = road.host.namespace.rules()
        with (
            pebble(road.visitor, road.host, directory / "ca") as ca,
            visitors(site, road.visitor, road.host) as crowd,
        ):
            with _step("visitors come and go, the web server serves them"):
                crowd.wait_for(50)
            with _step("acme-alpn-proxy start: new connections are steered"):
                proxy.start()
            with _step("visitors come and go through the proxy"):
                crowd.wait_for(50, steered=True)
            with _step("lego orders the certificate, pebble validates both names"):
                issued = lego(road.host.namespace, ca, directory / "lego", *NAMES)
            with _step("acme-alpn-proxy stop --wait: the last connection has ended"):
                proxy.stop(wait=True)
            with _step("visitors come and go, the web server serves them"):
                crowd.wait_for(50)
            report = crowd.leave()
        if road.host.namespace.rules() != before:
            raise Unexpected("firewall rules are left")
    return issued, report


def _account(issued: Issued, report: Report, seconds: float) -> str:
    certificate = issued.certificate
    each = ", ".join(f"{family} {tally.served:,}" for family, tally in report.families.items())
    slowest = max(tally.slowest_seconds for tally in report.families.values())
    return f"""
  Certificate
    names       {", ".join(issued.names)}
    issuer      {certificate.issuer.rfc4514_string()}
    serial      {certificate.serial_number:x}
    valid       {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to \
{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC
    challenges  {", ".join(issued.challenges)}
  Visitors
    served      {report.served:,} ({each}), {report.steered:,} of them through the proxy
    slowest     {slowest:.2f} s, {READING_SECONDS:.2f} s of it spent reading the page
    failures    {report.failed}
  Time          {seconds:.1f} s
"""


def _check(issued: Issued, report: Report) -> None:
    if sorted(issued.names) != sorted(NAMES):
        raise Unexpected(f"the certificate is for {issued.names}")
    if issued.challenges != ["tls-alpn-01"] * len(NAMES):
        raise Unexpected(f"the challenges were {issued.challenges}")
    if report.failed:
        raise Unexpected("visitors failed: " + "; ".join(report.first_failures))


def main() -> int:
    """Run the demo; 0 if all of it held, 1 if not."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go, too
    print("A certificate by TLS-ALPN-01 while many visitors connect (in temporary namespaces)\n")
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="acme-alpn-proxy-demo-") as directory:
            issued, report = _issue(Path(directory))
        print(_account(issued, report, time.monotonic() - began))
        _check(issued, report)
    except (AssertionError, CommandFailed, NotRoot, NoWebServer, TimeoutError, Unexpected) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
