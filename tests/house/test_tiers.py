"""The tiers hold what the suite collects: no test is lost between them, and none rots unseen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_collection_modifyitems
from tests.support.paths import ROOT
from tests.tiers import MARKERS, PATTERNS, SLOW, slow, tier

SHARE = 0.7
"""How many of all tests the default tier has at least."""

REST_ONLY = {
    "tests/gpu_lowering/test_gpu_lowering.py",  # one cold lowering takes a minute
    "tests/system/test_crowd.py",  # Inductor in eight threads, and in two processes
    "tests/house/test_how_it_works.py",  # compiles for a page
    "tests/examples/test_own_loop.py",  # an example from its first line to its last, in a process
    "tests/system/test_soak.py",
    "tests/faults/test_inductor.py",  # processes whose caches are cold, full or damaged
    "tests/runtime/test_signal.py",  # a trained model answers forty prompts
    "tests/house/test_tiers.py",  # collects the suite
}
"""Files of which the default tier has nothing."""


@pytest.fixture(scope="module")
def ids() -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--full"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_tier_has_tests(ids: list[str]) -> None:
    tiers = [tier(test) for test in ids]
    without = {name for name in MARKERS if name not in tiers}
    assert without == {"gpu"}  # a parameter carries that one
    default = [test for test, name in zip(ids, tiers, strict=True) if name is None]
    assert len(default) >= SHARE * len(ids)
    files = {test.split("::")[0] for test in ids}
    assert files - {test.split("::")[0] for test in default} == REST_ONLY


def test_every_pattern_is_needed(ids: list[str]) -> None:
    """Each is the first to match some test."""
    deciding = {next((p for p, _ in PATTERNS if re.search(p, test)), None) for test in ids}
    assert {pattern for pattern, _ in PATTERNS} <= deciding


def test_every_slow_test_is_there(ids: list[str]) -> None:
    assert {test for test in ids if tier(test) == "slow"} == SLOW


def test_slow_tests() -> None:
    """Those over the limit, but for the quickest of a file, and for what a pattern places."""
    seconds = {"tests/a.py::x": 9.0, "tests/a.py::y": 8.0, "tests/a.py::z[1]": 11.0}
    seconds |= {"tests/b.py::x": 99.0, "tests/c.py::x": 99.0, "tests/c.py::y": 0.1}
    seconds |= {"tests/fused/test_fused.py::test_importance": 99.0}
    assert slow(seconds) == ["tests/a.py::x", "tests/a.py::z[1]", "tests/c.py::x"]


class Item:
    """What pytest has collected of a test."""

    def __init__(self, nodeid: str) -> None:
        self.nodeid, self.path = nodeid, Path(nodeid.split("::", maxsplit=1)[0])
        self.names: list[str] = []

    def add_marker(self, name: str) -> None:
        self.names.append(name)

    def iter_markers(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.names]


def test_rest_is_what_the_default_leaves_out(ids: list[str]) -> None:
    def collected(**options: bool) -> list[str]:
        items: Any = [Item(test) for test in ids]
        config: Any = SimpleNamespace(
            args_source=pytest.Config.ArgsSource.TESTPATHS,
            getoption=lambda name: options.get(name[2:], False),
            hook=SimpleNamespace(pytest_deselected=lambda items: None),
        )
        pytest_collection_modifyitems(config, items)
        return [item.nodeid for item in items]

    default, rest = collected(), collected(rest=True)
    assert not {*default} & {*rest} and sorted(default + rest) == sorted(ids)
    assert sorted(collected(full=True)) == sorted(ids)
    assert {tier(test) for test in default} == {None}
