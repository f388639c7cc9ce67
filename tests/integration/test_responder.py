"""The program's own answers to validations, and steering that is there only while one is due."""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509

from acme_alpn_proxy.proxy.identifiers import server_name_for
from acme_alpn_proxy.responder.certificates import faults
from acme_alpn_proxy.responder.client import ControlError, ask, control_path

from .netns import Node, Street, wait_until
from .proxy import AT_ONCE, Proxy
from .visitors import visitors
from .website import NAME, Website

DIGEST = hashlib.sha256(b"token.thumbprint")
ADDRESS = "192.0.2.80"


class OnDemand:
    """A running C{start --on-demand}, and its control socket."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.path = control_path(str(proxy.pid_file))

    def ask(self, line: str) -> str:
        return ask(self.path, line, 20)

    def refusal(self, line: str) -> str:
        with pytest.raises(ControlError) as problem:
            self.ask(line)
        return str(problem.value)

    def auth(self, identifier: str, *seconds: str) -> None:
        self.ask(" ".join(["auth", identifier, DIGEST.hexdigest(), *seconds]))

    def status(self) -> dict[str, object]:
        (status,) = json.loads(self.proxy.run("--json", "status").stdout)["instances"]
        assert isinstance(status, dict)
        return status


@pytest.fixture
def on_demand(proxy: Proxy, site: Website) -> Iterator[OnDemand]:
    """It runs, and nothing is steered."""
    proxy.start("--on-demand", *AT_ONCE)
    assert proxy.namespace.rules() == []
    yield OnDemand(proxy)
    proxy.stop()


def answer(node: Node, host: str, server_name: str) -> x509.Certificate:
    """Validate as a CA does: the certificate that C{host} answers with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["acme-tls/1"])
    plain = node.namespace.connect(host, 443)
    plain.settimeout(10)
    with context.wrap_socket(plain, server_hostname=server_name) as tls:
        assert tls.selected_alpn_protocol() == "acme-tls/1"
        certificate = tls.getpeercert(binary_form=True)
        assert certificate is not None
    return x509.load_der_x509_certificate(certificate)


def test_answers(road: Street, on_demand: OnDemand) -> None:
    """A pending name and a pending address are answered with the certificate that a CA wants, over
    both families; from the first C{auth} to the last C{unauth} connections are steered."""
    on_demand.auth(NAME)
    assert on_demand.proxy.namespace.rules() != []
    on_demand.auth(ADDRESS)
    on_demand.auth("2001:DB8::1")
    for host in (road.host.ipv4, road.host.ipv6):
        for identifier in (NAME, ADDRESS, "2001:db8::1"):
            certificate = answer(road.visitor, host, server_name_for(identifier))
            assert list(faults(certificate, identifier, DIGEST.digest())) == []

    def answers() -> list[str]:
        report = json.loads(on_demand.ask(f"report {NAME}"))
        assert report["answered"] == 2
        return [asked["answer"] for asked in report["asked"]]

    wait_until(lambda: answers() == ["answered"] * 6, "the last handshake")
    assert on_demand.status()["pending_count"] == 3
    for identifier in (ADDRESS, NAME):
        on_demand.ask(f"unauth {identifier}")
        assert on_demand.proxy.namespace.rules() != []
    on_demand.ask("unauth 2001:db8::1")
    wait_until(lambda: on_demand.status()["state"] == "idle", "letting go")
    assert on_demand.proxy.namespace.rules() == []


def test_many(road: Street, site: Website, on_demand: OnDemand) -> None:
    """1,000 validations, 100 at a time, are all answered while visitors notice nothing."""
    on_demand.auth(NAME)
    with visitors(site, road.visitor, road.host) as crowd:
        crowd.wait_for(10, steered=True)
        with ThreadPoolExecutor(100) as pool:
            answers = pool.map(lambda _: answer(road.visitor, road.host.ipv4, NAME), range(1_000))
            assert len({each.fingerprint(each.signature_hash_algorithm) for each in answers}) == 1
        on_demand.ask(f"unauth {NAME}")
        crowd.wait_for(10)
        assert crowd.leave().failed == 0
