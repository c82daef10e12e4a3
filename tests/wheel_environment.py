"""The package as other people get it: sdist, wheel, and environments with nothing but it and one extra's requirements.

An environment is a virtual one whose packages are links to the installed distributions that the extra's requirements
reach, so that it takes a second to make and no network; what the extra does not ask for is not there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("proto", "teacher_server", "trainer", "evaluator", "study", "deploy")
METADATA = ("pyproject.toml", "README.md", "LICENSE")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")


def copy_of_sources(folder: Path) -> Path:
    """What a build reads, links as links; a build leaves files behind, and another's leavings would get into it."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=_IGNORED)
    for name in METADATA:
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(kind: str, sources: Path, out: Path) -> Path:
    """The `wheel` or `sdist` of a source folder, by the backend that pyproject.toml names, without the network."""
    call = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", call], cwd=sources, check=True, stdout=subprocess.DEVNULL, timeout=120)
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def requirements(wheel: Path, extra: str) -> list[Requirement]:
    """What the wheel asks for with an extra; "" for none."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    given = (Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: "))
    return [one for one in given if one.marker is None or one.marker.evaluate({"extra": extra})]


@cache
def _installed() -> dict[str, Distribution]:
    """Distributions of this environment by name, ours left out."""
    found: dict[str, Distribution] = {}
    for one in distributions():
        # The first of a name is what is imported: setuptools puts its own copies of others at the end of the path.
        found.setdefault(canonicalize_name(one.metadata["Name"]), one)
    found.pop("tutelage", None)
    return found


def reached(wanted: Iterable[Requirement]) -> set[str]:
    """Names of the installed distributions that these requirements need, and theirs, and so on.

    Raises:
        PackageNotFoundError: one of `wanted` is not installed here.

    """
    names: set[str] = set()
    waiting = [(distribution(one.name).metadata["Name"], "", *one.extras) for one in wanted]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, *extras = waiting.pop()
        name = canonicalize_name(name)
        if name not in _installed():  # a platform's, or what the lock leaves out
            continue
        names.add(name)
        for extra in extras or [""]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in _installed()[name].requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append((needed.name, "", *needed.extras))
    return names


@cache
def _files() -> dict[str, list[tuple[PurePosixPath, Path]]]:
    """Of each distribution, its files by their place below site-packages; scripts and the like left out."""
    found: dict[str, list[tuple[PurePosixPath, Path]]] = {}
    for name, one in _installed().items():
        paths = [path for path in one.files or () if path.parts[0] not in ("..", "__pycache__")]
        found[name] = [(PurePosixPath(path), Path(str(one.locate_file(path)))) for path in paths]
    return found


def _link(site: Path, names: set[str]) -> None:
    """Links to whole folders where only the named distributions have files in them, else one level further down."""
    level: dict[PurePosixPath, list[tuple[PurePosixPath, Path, bool]]] = defaultdict(list)
    for name, files in _files().items():
        for path, source in files:
            level[PurePosixPath(path.parts[0])].append((path, source, name in names))
    while level:
        place, files = level.popitem()
        if not any(wanted for _, _, wanted in files):
            continue
        path, source, _ = next(one for one in files if one[2])
        depth = len(place.parts)
        if all(wanted for _, _, wanted in files):
            whole = source
            for _ in path.parts[depth:]:
                whole = whole.parent
            if not (site / place).exists():
                (site / place).symlink_to(whole)
            continue
        (site / place).mkdir(exist_ok=True)
        for path, source, wanted in files:
            level[PurePosixPath(*path.parts[: depth + 1])].append((path, source, wanted))


class Environment:
    """A virtual environment with the wheel and what one extra asks for.

    Args:
        folder: of the environment; made.
        wheel: ours.
        extra: its name; "" for none.

    """

    def __init__(self, folder: Path, wheel: Path, extra: str) -> None:
        venv.EnvBuilder(symlinks=True).create(folder)
        self.folder = folder
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        _link(self.site, reached(requirements(wheel, extra)))
        install = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        install += ["--disable-pip-version-check", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(install, check=True, timeout=120)

    @property
    def variables(self) -> dict[str, str]:
        """Of a process that sees nothing of the environment that the tests run in."""
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TUTELAGE", "VIRTUAL"))
        }
        own = {"PATH": f"{self.python.parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        return kept | own

    def run(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command of the environment's `bin`."""
        return subprocess.run(
            [str(self.python.with_name(command[0])), *command[1:]],
            cwd=cwd,
            env=self.variables | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
