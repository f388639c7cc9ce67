"""Large tables of nftables, read in the kernel. Needs root."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path

from .netns import Namespace

SCRIPT = """
from acme_alpn_proxy.firewall import largetables, nfchains
def need_no_listing():
    return sorted(largetables.need_no_listing(nfchains.base_chains()))
with largetables.read_meanwhile():
    pass
read = largetables._is_alike
largetables._is_alike = lambda name: exit(f"{name} is read twice")
print(need_no_listing())
largetables._is_alike = read
largetables._read.clear()
print(need_no_listing())
"""


def look(namespace: Namespace) -> list[str]:
    """The tables that need no listing: as read meanwhile, and as read later."""
    return namespace.run(sys.executable, "-c", SCRIPT).stdout.splitlines()


def test_bans(tmp_path: Path) -> None:
    """A large list of bans needs no listing, until one of its rules looks at a port."""
    first = ipaddress.ip_address("40.0.0.0")
    bans = "\n".join(f"ip saddr {first + n} drop" for n in range(2_000))
    rules = tmp_path / "rules"
    rules.write_text(
        f"table inet bans {{ chain c {{ type filter hook input priority 0; {bans}\n}}; }}\n"
        "table ip empty { chain c { type filter hook input priority 0; }; }\n"
        "table ip strict { chain c { type filter hook input priority 0; policy drop; }; }\n"
    )
    with Namespace.made("h") as host:
        assert look(host) == ["[]", "[]"]
        host.run("nft", "-f", rules)
        assert look(host) == ["[('inet', 'bans'), ('ip', 'empty')]"] * 2
        host.run("nft", "add", "rule", "inet", "bans", "c", "tcp", "dport", "443", "drop")
        assert look(host) == ["[]", "[]"]
