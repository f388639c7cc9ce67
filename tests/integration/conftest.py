"""Every test in here gets network namespaces, a site and a proxy of its own; it needs root."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .machine import Machine
from .netns import NotRoot, Street, require_root, street
from .packages import make_packages
from .proxy import Proxy
from .website import Website, website


@pytest.fixture(autouse=True)
def _root() -> None:
    reason = ""
    try:
        require_root()
    except NotRoot as error:
        reason = str(error)
    if reason:
        pytest.fail(reason, pytrace=False)


@pytest.fixture
def road() -> Iterator[Street]:
    """A host and a visitor, without any firewall rule."""
    with street() as both:
        assert both.host.namespace.rules() == []
        yield both


@pytest.fixture
def site(request: pytest.FixtureRequest, road: Street, tmp_path: Path) -> Iterator[Website]:
    """The site, on the host; if the test boots a machine, the web server is a process of that."""
    wrapper: tuple[str, ...] = ()
    if "debian" in request.fixturenames:
        booted: Machine = request.getfixturevalue("debian")
        wrapper = ("nsenter", f"--target={booted.init}", "--pid", "--no-fork")
    with website(road.host.namespace, tmp_path / "site", wrapper) as running:
        yield running


@pytest.fixture
def proxy(request: pytest.FixtureRequest, road: Street, tmp_path: Path) -> Iterator[Proxy]:
    """The proxy of the host, not started. In a test without a site something listens there."""
    with ExitStack() as ends:
        if "site" not in request.fixturenames:
            ends.enter_context(road.host.namespace.listen("::", 443))
        yield Proxy(road.host.namespace, tmp_path)


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the packages."""
    return make_packages(tmp_path_factory.mktemp("packages"))
