"""No import goes upwards: the floors of the package, top to bottom."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli", "lm_eval", "testing"),
    ("reports",),
    ("calibration",),
    ("generation",),
    ("entry",),
    ("backend",),
    ("views", "runtime"),
    ("analysis",),
    ("programs",),
    ("passes",),
    ("plan",),
    ("capture",),
    ("axes",),
    ("adapters",),
    ("graph", "ops", "models"),
    ("config",),
    ("compiling", "errors", "log", "rounding", "calibrated", "intervals"),
    ("torch_private",),
    ("refusals",),
)
"""What stands on one floor imports nothing of its neighbours, and nothing of the floors above."""
HEIGHT = {name: -level for level, names in enumerate(FLOORS) for name in names}


def sources() -> dict[str, Path]:
    """Modules by the name under which they are installed, without ``focus_compile.``."""
    found = {}
    for folder, prefix in (("focus_compile", ""), ("passes", "passes.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    found.pop("__init__")  # the package itself: the roof over all
    return found


def imported(tree: ast.AST) -> set[str]:
    """What is imported of the package, wherever in a module: as far as modules go."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "focus_compile":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    ours = {name.removeprefix("focus_compile.") for name in found}
    return {name for name in ours if name.split(".")[0] in HEIGHT}


def upwards(name: str, tree: ast.AST) -> list[str]:
    """Imports of a module that go to a higher floor, or across one."""
    own = name.split(".", maxsplit=1)[0]
    others = {target: target.split(".")[0] for target in imported(tree)}
    return sorted(t for t, room in others.items() if room != own and HEIGHT[room] >= HEIGHT[own])


SOURCES = sources()


@pytest.mark.parametrize("name", SOURCES)
def test_no_import_goes_upwards(name: str) -> None:
    assert name.split(".", maxsplit=1)[0] in HEIGHT, "a room without a floor"
    assert upwards(name, ast.parse(SOURCES[name].read_text())) == []


def test_a_planted_import_is_found() -> None:
    planted = ast.parse("def f():\n    from focus_compile.runtime.session import session")
    assert upwards("plan.sites", planted) == ["runtime.session"]
    assert upwards("views.cost", planted) == ["runtime.session"]
    assert upwards("generation.loop", planted) == upwards("runtime.block", planted) == []
    assert upwards("graph.nodes", ast.parse("from focus_compile import backend")) == ["backend"]


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in ROOT.glob("focus_compile/**/__init__.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(settings["packages"]) == packages | {"focus_compile.passes"}
    assert settings["packages"] == sorted(settings["packages"])
