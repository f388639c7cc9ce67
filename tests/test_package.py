"""The published files: the sdist, the wheel made from it, and the installed result, away from the
source.

It needs a package index, for the build backend and for the dependencies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from acme_alpn_proxy import __version__

ROOT = Path(__file__).parent.parent
PLUGINS = "twisted/plugins"


def run(*argv: str | Path, cwd: Path) -> str:
    """Run a command that cannot see this source or environment, and return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        argv,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def make_environment(folder: Path, *requirements: str | Path) -> Path:
    """A virtual environment with these packages and their dependencies; returns its folder of
    programs."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    run(folder / "bin" / "pip", "install", "--quiet", *requirements, cwd=folder.parent)
    return folder / "bin"


@dataclass
class Package:
    """Both distributions, and the programs of an environment with only the wheel."""

    sdist: Path
    wheel: Path
    bin: Path

    def run(self, program: str, *words: str) -> str:
        """Run a program of the environment, in a folder outside the source tree."""
        return run(self.bin / program, *words, cwd=self.bin.parent.parent)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Built from a copy of the source that has been run before, so that caches exist."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist"))
    (source / "src" / PLUGINS / "dropin.cache").write_bytes(b"")
    builder = make_environment(folder / "builder", "hatchling")
    run(builder / "hatchling", "build", "--target", "sdist", "--directory", folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    isolated = ("--no-deps", "--no-build-isolation")
    run(builder / "pip", "wheel", "--quiet", *isolated, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    clean = make_environment(folder / "clean", wheel, f"twisted=={version('twisted')}")
    return Package(sdist, wheel, clean)


def test_sdist(package: Package) -> None:
    """The sdist has what a build needs, and no caches; the wheel of these tests is made from it."""
    with tarfile.open(package.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/acme_alpn_proxy/py.typed"} <= names
    assert [name for name in names if "dropin.cache" in name or "__pycache__" in name] == []


def test_wheel(package: Package) -> None:
    """The wheel holds every module, the plugin and C{py.typed}. It holds no caches, and no file
    that would replace one of Twisted's."""
    with zipfile.ZipFile(package.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    files = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    assert names == files | {"acme_alpn_proxy/py.typed"}
    assert [name for name in names if name.startswith("twisted/")] == [
        f"{PLUGINS}/acme_alpn_proxy_plugin.py"
    ]


def test_away_from_the_source(package: Package) -> None:
    """The environment imports the installed package, not the source."""
    script = "import acme_alpn_proxy, sys; print(acme_alpn_proxy.__file__, *sys.path, sep='\\n')"
    file, *path = package.run("python", "-c", script).splitlines()
    assert Path(file).is_relative_to(package.bin.parent)
    assert [folder for folder in path if Path(folder).is_relative_to(ROOT)] == []


def test_twistd_lists_it(package: Package) -> None:
    """C{twistd --help} lists the plugin, with its one line."""
    (line,) = [
        line
        for line in package.run("twistd", "--help").splitlines()
        if line.split()[:1] == ["acme-alpn-proxy"]
    ]
    assert "Get TLS certificates" in line


def test_twistd_help(package: Package) -> None:
    """C{twistd acme-alpn-proxy --help} shows its options."""
    assert "--fallback=" in package.run("twistd", "acme-alpn-proxy", "--help")


def test_help(package: Package) -> None:
    """The console script is there and shows its usage."""
    assert package.run("acme-alpn-proxy", "--help").startswith("Usage: acme-alpn-proxy")


def test_version(package: Package) -> None:
    """The console script and the package's metadata have the same version."""
    assert package.run("acme-alpn-proxy", "--version") == f"acme-alpn-proxy {__version__}\n"
    script = "from importlib.metadata import version; print(version('acme-alpn-proxy'))"
    assert package.run("python", "-c", script) == f"{__version__}\n"
