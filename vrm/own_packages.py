"""`pipeline`, `actors`, `cluster` and `jobs` mean the packages beside this one, whatever else has these names.

Python looks into the current directory, PYTHONPATH and Ray's paths before it looks where packages are installed. A
user's own `pipeline.py` would then be found first. This file stands alone: until it has run, no other file of the
project can be imported safely.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

OWN_PACKAGES = ("pipeline", "actors", "cluster", "jobs")

ROOT = str(Path(__file__).resolve().parents[1])
"""The directory that holds `vrm` and the packages beside it."""


class OwnPackagesFirst(MetaPathFinder):
    """Finds the own packages in one directory, and nothing else.

    A Ray worker puts the driver's directories in front of `sys.path` with its first task. So this finder stands before
    the path, not on it.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in OWN_PACKAGES:
            return None
        # A process that multiprocessing starts gets the path alone: vLLM's engines import `actors` by it.
        sys.path[:] = without_clashes(sys.path, self.root)
        return PathFinder.find_spec(fullname, [self.root])


def find_own_packages_first() -> None:
    """To be called before the first import of an own package.

    Raises:
        ImportError: the process has imported a module of somebody else by one of the names.
    """
    for name in OWN_PACKAGES:
        if name in sys.modules:
            _require_own(name, sys.modules[name])
    if not any(isinstance(finder, OwnPackagesFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, OwnPackagesFirst(ROOT))


def find_own_packages_first_in_worker() -> None:
    """The same in a worker, which gets this function by value: another machine may have the packages elsewhere."""
    if (Path(ROOT) / "vrm").is_dir():
        sys.meta_path.insert(0, OwnPackagesFirst(ROOT))


def without_clashes(places: Sequence[str], root: str = ROOT) -> list[str]:
    """The entries of a path, those behind `root` that hold another module by the name of an own package."""
    clashing = [place for place in places if _holds_another(place, root)]
    others = [place for place in places if place not in clashing]
    if clashing and root not in others:
        others.append(root)
    return [*others, *clashing]


def _holds_another(place: str, root: str) -> bool:
    directory = Path(place)
    return str(directory.resolve()) != root and any(
        (directory / f"{name}.py").is_file() or (directory / name).is_dir() for name in OWN_PACKAGES
    )


def _require_own(name: str, module: ModuleType) -> None:
    file = getattr(module, "__file__", None)  # a namespace package has none
    if file is None or Path(file).resolve() != Path(ROOT) / name / "__init__.py":
        raise ImportError(
            f"this process has imported {file or module!r} as {name!r}, which is also the name of a package that vrm "
            f"needs. Use vrm before that import, or rename that module."
        )
