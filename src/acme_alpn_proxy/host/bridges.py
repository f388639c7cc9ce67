"""Bridges of this host whose IP packets pass the firewall while they are bridged (br_netfilter)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .netlink import ROUTE, Netlink, attributes

PROC: Final = Path("/proc")

SWITCHES: Final = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}
"""Switches for all bridges of this network namespace, by family, below C{/proc/sys/net/bridge}."""

_GET_LINK: Final = 18
_IFLA_IFNAME: Final = 3
_IFLA_LINKINFO: Final = 18
_INFO_KIND: Final = 1
_INFO_DATA: Final = 2
_OWN_SWITCHES: Final = {4: 36, 6: 37}
"""Attributes, by family: IFLA_BR_NF_CALL_IPTABLES and IFLA_BR_NF_CALL_IP6TABLES of
C{linux/if_link.h}."""


def filtered_bridges(family: int, proc: Path = PROC) -> set[str]:
    """The names of the bridges whose packets pass the firewall; raises L{OSError}.

    @param family: 4 or 6.
    """
    try:
        for_all = int((proc / "sys/net/bridge" / SWITCHES[family]).read_text())
    except OSError:  # br_netfilter is not loaded
        return set()
    found = set()
    with Netlink(ROUTE) as kernel:
        for answer in kernel.dump(_GET_LINK, bytes(16)):
            link = attributes(answer[16:])
            about = attributes(link.get(_IFLA_LINKINFO, b""))
            if about.get(_INFO_KIND, b"").rstrip(b"\0") == b"bridge":
                own = attributes(about.get(_INFO_DATA, b"")).get(_OWN_SWITCHES[family], b"\0")
                if for_all or any(own):
                    found.add(link[_IFLA_IFNAME].rstrip(b"\0").decode("utf-8", "replace"))
    return found
