"""The house: which module sees which, and that each says what it is."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from zope.interface import Interface, implementedBy
from zope.interface.verify import verifyClass

SOURCE = Path(__file__).parent.parent / "src"
PACKAGE = "acme_alpn_proxy"

LAYERS = (
    ("", "errors", "interfaces", "clienthello", "addresses", "deadlines", "finding", "notify"),
    ("redirects", "redirects.bpf", "firewall", "firewall.hostfacts", "firewall.xtables"),
    ("routing", "commands", "pidfile", "hangup", "drain", "options", "firewall.verdicts"),
    ("run", "status", "lazily"),
    ("statussocket", "metrics", "statistics", "logs"),
    (
        "transport",
        "relay",
        "reactor",
        "redirects.guard",
        "redirects.none",
        "firewall.iptablesrules",
    ),
    ("network", "firewall.nftrules", "firewall.interfacerules"),
    ("firewall.opinion", "samplehellos"),
    ("redirects.iptables", "redirects.sklookup", "redirects.auto"),
    ("protocols",),
    ("service",),
    ("program",),
    ("tap",),
    ("probe",),
    ("check",),
    ("launch",),
    ("cli",),
)
"""From the ground up: a module imports only from layers below its own. C{""} is the package."""

SEE_ONLY = {
    "clienthello": set(),
    "routing": {"clienthello"},
    "statistics": {"clienthello", "routing"},
    "redirects.auto": {"errors", "interfaces"},
    "redirects.none": {"interfaces"},
    "redirects.guard": {"errors", "interfaces", "firewall.xtables"},
}
"""Modules that see less of the project than their layer would let them."""

ROOMS = {
    "firewall": {"commands", "interfaces"},
    "redirects": {"commands", "errors", "interfaces", "firewall"},
}
"""What the modules of a package see besides each other: modules, and such packages."""

SEEN_BY = {
    "tap": {"launch", "probe", "check"},
    "probe": {"check"},
    "check": {"cli"},
    "launch": {"cli"},
    "lazily": {"launch", "cli"},
    "cli": set(),
}
"""Modules that hardly anybody imports."""

WITHOUT_TWISTED = (
    "errors",
    "clienthello",
    "finding",
    "routing",
    "samplehellos",
    "pidfile",
    "run",
    "statistics",
    "status",
    "notify",
    "firewall.hostfacts",
    "redirects.bpf",
)

MAY_TAKE_THE_REACTOR = {"tap", "launch", "check"}
"""By an import within a function, at the last moment."""


def _paths() -> dict[str, Path]:
    """Each module's path by its name, without the package's."""
    folder = SOURCE / PACKAGE
    paths = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        paths[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return paths


MODULES = _paths()
PLUGIN = SOURCE / "twisted" / "plugins" / "acme_alpn_proxy_plugin.py"


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All that runs: what only type checkers see is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _statements(child)


def _imported(path: Path, package: str = PACKAGE) -> set[str]:
    """The absolute names that a file imports; C{from x import y} gives C{x.y}."""
    names: set[str] = set()
    for node in _statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*parent, *filter(None, [origin])])
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return names


def _imports(module: str) -> set[str]:
    parent = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
    return _imported(MODULES[module], ".".join(filter(None, [PACKAGE, parent])))


def _project_imports(module: str) -> set[str]:
    """The project's modules that C{module} imports: names of theirs count as they do."""
    found = set()
    for name in _imports(module):
        if name.split(".")[0] == PACKAGE:
            inner = name.removeprefix(PACKAGE).lstrip(".")
            while inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found


def _room(module: str) -> str:
    return module.partition(".")[0]


def _layer(module: str) -> int:
    return next(at for at, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_its_layer() -> None:
    """Every module is in one layer, and no layer names a module that there is not."""
    named = [module for layer in LAYERS for module in layer]
    assert sorted(named) == sorted(MODULES), "tests/test_house.py: LAYERS and src do not agree"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    """A module imports only from layers below its own."""
    wrong = [seen for seen in _project_imports(module) if _layer(seen) >= _layer(module)]
    assert not wrong, f"{module} imports {', '.join(wrong)}, which is not below it: see LAYERS"


@pytest.mark.parametrize("module", SEE_ONLY)
def test_narrow_views(module: str) -> None:
    """Parsing and routing know each other alone, and redirects only their contract."""
    wrong = _project_imports(module) - SEE_ONLY[module]
    assert not wrong, f"{module} imports {', '.join(wrong)}: see SEE_ONLY"


@pytest.mark.parametrize("module", [module for module in MODULES if _room(module) in ROOMS])
def test_rooms(module: str) -> None:
    """Who judges the firewall, and who steers, knows its contract and nothing of the proxy."""
    room = _room(module)
    seen = {_room(each) for each in _project_imports(module)} - {room}
    assert seen <= ROOMS[room], f"{module} imports {', '.join(seen - ROOMS[room])}: see ROOMS"


@pytest.mark.parametrize("module", SEEN_BY)
def test_the_top(module: str) -> None:
    """What composes and what launches is imported by nobody but who launches it."""
    seen_by = {other for other in MODULES if module in _project_imports(other)}
    wrong = seen_by - SEEN_BY[module]
    assert not wrong, f"{module} is imported by {', '.join(wrong)}: see SEEN_BY"


@pytest.mark.parametrize("module", WITHOUT_TWISTED)
def test_without_twisted(module: str) -> None:
    """What needs no I/O of Twisted's imports nothing of it."""
    wrong = [name for name in _imports(module) if name.split(".")[0] == "twisted"]
    assert not wrong, f"{module} imports {', '.join(wrong)}"


@pytest.mark.parametrize("module", MODULES)
def test_reactor(module: str) -> None:
    """The global reactor is a last-moment default: nobody takes it when imported."""
    reactor = "twisted.internet.reactor"
    tree = ast.parse(MODULES[module].read_text())
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in at_once if "reactor" in [alias.name for alias in node.names]], (
        f"{module} imports the reactor as soon as it is imported"
    )
    assert reactor not in _imports(module) or module in MAY_TAKE_THE_REACTOR, (
        f"{module} imports the reactor: have it passed in"
    )


def test_plugin() -> None:
    """twistd reads every plugin on every start: ours imports nothing but what it is made of."""
    assert _imported(PLUGIN) == {"twisted.application.service.ServiceMaker"}


@pytest.mark.parametrize("path", [*MODULES.values(), PLUGIN], ids=lambda path: path.stem)
def test_docstrings(path: Path) -> None:
    """Every module says what it is for."""
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_implementations(module: str) -> None:
    """Every class has the methods, with the arguments, of the interfaces that it implements."""
    loaded = importlib.import_module(".".join(filter(None, [PACKAGE, module])))
    for _, made in inspect.getmembers(loaded, inspect.isclass):
        if made.__module__ == loaded.__name__ and not issubclass(made, type(Interface)):
            for interface in implementedBy(made).declared:
                assert verifyClass(interface, made)
