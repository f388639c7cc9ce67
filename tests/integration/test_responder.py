"""The program's own answers to validations, and steering only while an identifier is pending."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import ssl
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from acme_alpn_proxy.diagnosis.hellos import acme_hello
from acme_alpn_proxy.host.privileges import CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW
from acme_alpn_proxy.options import WAYS
from acme_alpn_proxy.proxy.identifiers import server_name_for
from acme_alpn_proxy.responder.certificates import ChallengeCertificates, faults
from acme_alpn_proxy.responder.client import ControlError, ask, control_path

from .netns import Node, Street, wait_until
from .proxy import AT_ONCE, NOBODY, Proxy
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
    """A daemon on demand that runs, with nothing steered."""
    proxy.start("--on-demand", *AT_ONCE)
    assert proxy.namespace.rules() == []
    yield OnDemand(proxy)
    proxy.stop()


def nothing_stays(on_demand: OnDemand) -> None:
    """Assert that no rule is left after the last connection has ended."""
    wait_until(lambda: on_demand.proxy.namespace.rules() == [], "the end of the last rule")


def answer(node: Node, host: str, server_name: str) -> x509.Certificate:
    """Validate as a CA does, and return the certificate with which C{host} answers."""
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
    nothing_stays(on_demand)


def test_many(road: Street, site: Website, on_demand: OnDemand) -> None:
    """1,000 validations, 100 at a time, are all answered; visitors notice nothing, and no memory is
    lost."""
    on_demand.auth(NAME)

    def resident() -> int:
        status = Path(f"/proc/{on_demand.proxy.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    def ask_often(times: int) -> None:
        with ThreadPoolExecutor(100) as pool:
            answers = pool.map(lambda _: answer(road.visitor, road.host.ipv4, NAME), range(times))
            assert len({each.fingerprint(hashes.SHA256()) for each in answers}) == 1

    with visitors(site, road.visitor, road.host) as crowd:
        crowd.wait_for(10, steered=True)
        ask_often(300)
        before = resident()
        ask_often(700)
        assert resident() < before * 1.25  # a leak of each would double it
        on_demand.ask(f"unauth {NAME}")
        crowd.wait_for(10)
        assert crowd.leave().failed == 0


def test_ten_thousand(road: Street, on_demand: OnDemand) -> None:
    """With 10,000 pending names, each is answered, and C{status} is complete."""
    names = [f"{number}.{NAME}" for number in range(10_000)]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(on_demand.path)
        client.settimeout(60)
        answers = client.makefile("rb")

        def ask_all(lines: list[str]) -> None:
            for at in range(0, len(lines), 100):
                some = lines[at : at + 100]
                client.sendall("".join(f"{line}\n" for line in some).encode())
                assert [answers.readline() for _ in some] == [b"OK\n"] * len(some)

        ask_all([f"auth {name} {DIGEST.hexdigest()}" for name in names])
        for name in (names[0], names[-1]):
            answer(road.visitor, road.host.ipv4, name)
        status = on_demand.status()
        assert status["pending_count"] == 10_000
        ask_all([f"unauth {name}" for name in names])


def alert(node: Node, host: str, server_name: str, newest: ssl.TLSVersion | None = None) -> str:
    """Validate, and return the reason why the handshake fails."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["acme-tls/1"])
    if newest is not None:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old versions are deprecated
            context.minimum_version = context.maximum_version = newest
    plain = node.namespace.connect(host, 443)
    plain.settimeout(10)
    with pytest.raises(ssl.SSLError) as problem:
        context.wrap_socket(plain, server_hostname=server_name)
    plain.close()
    return str(problem.value.reason)


def test_refusals(road: Street, on_demand: OnDemand) -> None:
    """A name that is not pending gets an alert if nobody answers at the ACME client's address, and
    that client's answer if somebody does; TLS before 1.2 gets an alert."""
    on_demand.auth(NAME)
    assert alert(road.visitor, road.host.ipv4, "other.example") == "TLSV1_UNRECOGNIZED_NAME"
    old = alert(road.visitor, road.host.ipv4, NAME, ssl.TLSVersion.TLSv1)
    assert old == "TLSV1_ALERT_PROTOCOL_VERSION"
    report = json.loads(on_demand.ask(f"report {NAME}"))
    assert [each["name"] for each in report["asked"]] == ["other.example", NAME]
    told = on_demand.proxy.run("explain", "other.example", NAME, check=False)
    assert told.returncode == 1
    assert (
        "registered this name with the proxy, and no program listens at 127.0.0.1:31443"
        in told.stdout
    )
    with road.host.namespace.listen("127.0.0.1", 31443) as client:
        plain = road.visitor.namespace.connect(road.host.ipv4, 443)
        plain.sendall(acme_hello("other.example"))
        accepted, _ = client.accept()
        with accepted, plain:
            assert accepted.recv(5)[:1] == b"\x16"
            accepted.sendall(b"from the client")
            assert plain.recv(15) == b"from the client"


def test_cut_anywhere(road: Street, on_demand: OnDemand) -> None:
    """Handshakes that end early, stop without an end, or are followed by data do no harm: the next
    one is answered, and none of them stays live."""
    on_demand.auth(NAME)
    never = road.visitor.namespace.connect(road.host.ipv4, 443)
    never.sendall(acme_hello(NAME))
    lengths = [*range(0, 1_700, 100), *range(1_690, 1_701)]
    for length in lengths:
        with road.visitor.namespace.connect(road.host.ipv4, 443) as plain:
            plain.sendall(acme_hello(NAME)[:length])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["acme-tls/1"])
    for length in range(80):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname=NAME)
        with road.visitor.namespace.connect(road.host.ipv4, 443) as plain:
            plain.settimeout(10)
            done = False
            while not done:
                try:
                    tls.do_handshake()
                    done = True
                except ssl.SSLWantReadError:
                    plain.sendall(outgoing.read())
                    incoming.write(plain.recv(65_536))
            plain.sendall(outgoing.read()[:length])
    plain = road.visitor.namespace.connect(road.host.ipv4, 443)
    plain.settimeout(10)
    with context.wrap_socket(plain, server_hostname=NAME) as talking, suppress(OSError):
        talking.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert talking.recv(1) == b""
    answer(road.visitor, road.host.ipv4, NAME)
    never.close()

    def live() -> int:
        status: Any = on_demand.status()
        return int(status["routes"]["acme"]["live"])

    wait_until(lambda: live() == 0, "the end of all validations")
    assert "Traceback" not in on_demand.proxy.log


def test_lifetime(on_demand: OnDemand) -> None:
    """If a client has died, its identifier expires, and steering ends."""
    on_demand.auth(NAME, "1")
    wait_until(lambda: on_demand.status()["state"] == "idle", "the end of its time")
    nothing_stays(on_demand)


def test_folder(road: Street, proxy: Proxy, site: Website, tmp_path: Path) -> None:
    """A certificate in a client's folder is served for the name that its file has."""
    folder = tmp_path / "alpn-certs"
    folder.mkdir()
    made = ChallengeCertificates()
    pem = made.certificate(NAME, DIGEST.digest()).public_bytes(serialization.Encoding.PEM)
    (folder / f"{NAME}.crt.pem").write_bytes(pem)
    (folder / f"{NAME}.key.pem").write_bytes(
        made._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    proxy.start("--alpn-certs", str(folder), *AT_ONCE)
    certificate = answer(road.visitor, road.host.ipv4, NAME)
    assert list(faults(certificate, NAME, DIGEST.digest())) == []
    assert alert(road.visitor, road.host.ipv4, "other.example") == "TLSV1_UNRECOGNIZED_NAME"
    proxy.stop()


def test_run(on_demand: OnDemand) -> None:
    """If a daemon on demand runs, C{run} makes it steer while the command runs."""
    command = "iptables -t nat -S PREROUTING | grep -c acme-alpn-proxy"
    done = on_demand.proxy.run("run", "--", "sh", "-c", command)
    assert done.stdout == "1\n"
    wait_until(lambda: on_demand.status()["state"] == "idle", "letting go")


def test_cannot_steer(road: Street, proxy: Proxy, site: Website) -> None:
    """If a daemon on demand cannot steer any more, the client gets the reason, and nothing is
    applied."""
    proxy.start("--on-demand", "--redirect", "iptables", *AT_ONCE)
    here = OnDemand(proxy)
    run = road.host.namespace.run
    run("iptables", "-A", "INPUT", "-p", "tcp", "--dport", "443", "-j", "ACCEPT")
    run("iptables", "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
    run("iptables", "-P", "INPUT", "DROP")
    rules = road.host.namespace.rules()
    assert "INPUT" in here.refusal(f"auth {NAME} {DIGEST.hexdigest()}")
    assert road.host.namespace.rules() == rules
    assert here.status()["pending_count"] == 0
    failed = proxy.run("run", "--", "true", check=False)
    assert (failed.returncode, failed.stdout) == (78, "")
    assert "INPUT" in failed.stderr
    run("iptables", "-P", "INPUT", "ACCEPT")
    here.auth(NAME)
    assert road.host.namespace.rules() != rules
    proxy.stop(wait=True)
    assert road.host.namespace.rules() == rules


@pytest.mark.parametrize("way", WAYS)
def test_one_after_the_other(road: Street, site: Website, proxy: Proxy, way: str) -> None:
    """If a daemon on demand starts and stops steering for one order after the other, no visitor is
    lost. If it is killed during an order, the web server serves visitors again."""
    proxy.start("--on-demand", "--redirect", way)
    on_demand = OnDemand(proxy)
    with visitors(site, road.visitor, road.host) as crowd:
        for number in range(10):
            on_demand.auth(f"{number}.{NAME}")
            answer(road.visitor, road.host.ipv4, f"{number}.{NAME}")
            on_demand.ask(f"unauth {number}.{NAME}")
        crowd.wait_for(10)
        assert crowd.leave().failed == 0
    on_demand.auth(NAME)
    os.kill(proxy.pid, signal.SIGKILL)

    def is_served() -> bool:
        try:
            with site.visit(road.visitor.namespace, road.host.ipv4) as visit:
                return not visit.get().steered
        except OSError:
            return False

    wait_until(is_served, "the web server serves on")
    proxy.start("--on-demand", "--redirect", way, *AT_ONCE)
    assert OnDemand(proxy).status()["state"] == "idle"
    proxy.stop()


def test_another_user(proxy: Proxy, site: Website) -> None:
    """Only root may use the control socket, also in a folder that everybody may enter."""
    connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = f"{folder}/control"
        proxy.start("--on-demand", "--control", path, *AT_ONCE)
        for user, status in (((), 0), (NOBODY, 1)):
            command = (*user, "/usr/bin/python3", "-c", connect, path)
            done = proxy.namespace.run(*command, check=False)
            assert done.returncode == status
        assert "PermissionError" in done.stderr
        proxy.stop()


@pytest.mark.parametrize("way", ["nftables", "sk-lookup"])
def test_as_another_user(road: Street, site: Website, proxy: Proxy, way: str) -> None:
    """A daemon on demand that has become another user can start and stop steering again and again,
    with only the capabilities that this needs. With only iptables its start is refused."""
    proxy.start("--on-demand", "--redirect", f"iptables,{way}", "--uid", "nobody", *AT_ONCE)
    status = Path(f"/proc/{proxy.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert fields["Uid"].split() == ["65534"] * 4
    kept = 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW | 1 << CAP_BPF
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == kept
    assert int(fields["CapBnd"], 16) == int(fields["CapInh"], 16) == int(fields["CapAmb"], 16) == 0
    on_demand = OnDemand(proxy)
    for number in range(3):
        on_demand.auth(f"{number}.{NAME}")
        assert on_demand.status()["redirect"] == way
        answer(road.visitor, road.host.ipv4, f"{number}.{NAME}")
        on_demand.ask(f"unauth {number}.{NAME}")
    wait_until(lambda: on_demand.status()["state"] == "idle", "letting go")
    proxy.stop()
    words = ("--on-demand", "--redirect", "iptables", "--uid", "nobody", "start")
    refused = proxy.run(*words, check=False)
    assert refused.returncode == 2
    assert "cannot use iptables" in refused.stderr


def test_refused_hook(proxy: Proxy) -> None:
    """If the request of a hook is refused, no daemon is left."""
    words = ("begin", "tls-alpn-01", NAME, "token", "no-digest")
    refused = proxy.run("--logfile", str(proxy.log_file), "hook", "uacme", *words, check=False)
    assert refused.returncode == 1
    assert "SHA-256" in refused.stderr
    wait_until(lambda: proxy.namespace.pids() == [], "the end of the daemon")
    assert not Path(control_path(str(proxy.pid_file))).exists()


def test_run_with_other_options(on_demand: OnDemand) -> None:
    """If the options of C{run} differ from those of the running daemon, its command is not run."""
    words = ("--alpn", "127.0.0.1:5555", "run", "--", "echo", "was run")
    done = on_demand.proxy.run(*words, check=False)
    assert (done.returncode, done.stdout) == (os.EX_TEMPFAIL, "")
    assert "alpn 127.0.0.1:31443 / 127.0.0.1:5555" in done.stderr


def test_killed(proxy: Proxy, on_demand: OnDemand) -> None:
    """C{stop} removes the control socket of a killed daemon."""
    os.kill(proxy.pid, signal.SIGKILL)
    wait_until(lambda: "no instance runs" in proxy.run("status", check=False).stdout, "its end")
    assert Path(on_demand.path).exists()
    proxy.run("stop")
    assert not Path(on_demand.path).exists()
