"""Classes and the interfaces that they implement; the plugin that twistd reads."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
from zope.interface import Interface, implementedBy
from zope.interface.verify import verifyClass

import acme_alpn_proxy

MODULES = [
    acme_alpn_proxy.__name__,
    *(each.name for each in pkgutil.walk_packages(acme_alpn_proxy.__path__, "acme_alpn_proxy.")),
]
PLUGIN = (
    Path(acme_alpn_proxy.__path__[0]).parent / "twisted" / "plugins" / "acme_alpn_proxy_plugin.py"
)


@pytest.mark.parametrize("module", MODULES)
def test_implementations(module: str) -> None:
    """Every class has the methods, with the arguments, of the interfaces that it implements."""
    loaded = importlib.import_module(module)
    for _, made in inspect.getmembers(loaded, inspect.isclass):
        if made.__module__ == loaded.__name__ and not issubclass(made, type(Interface)):
            for interface in implementedBy(made).declared:
                assert verifyClass(interface, made)


def test_plugin() -> None:
    """twistd loads every plugin at every start, so our plugin imports only C{ServiceMaker}."""
    imported = [
        node
        for node in ast.walk(ast.parse(PLUGIN.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    (only,) = imported
    assert ast.unparse(only) == "from twisted.application.service import ServiceMaker"
