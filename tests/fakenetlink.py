"""The part that fakes of L{acme_alpn_proxy.host.netlink.Netlink} have in common."""

from __future__ import annotations

from typing import TypeVar

_Fake = TypeVar("_Fake", bound="FakeNetlink")


class FakeNetlink:
    """Takes the place of the class and of its instance. Subclasses answer."""

    def __call__(self: _Fake, protocol: int) -> _Fake:
        return self

    def __enter__(self: _Fake) -> _Fake:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
