"""The tiers hold what the suite collects: no test is lost between them, and none rots unseen."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.tiers import MARKERS, PATTERNS, tier

SHARE = 0.7
"""How many of all tests the default tier has at least."""

REST_ONLY = {
    "tests/gpu_lowering/test_gpu_lowering.py",  # one cold lowering takes a minute
    "tests/system/test_crowd.py",  # Inductor in eight threads, and in two processes
    "tests/house/test_how_it_works.py",  # compiles for a page
    "tests/examples/test_own_loop.py",  # an example from its first line to its last, in a process
    "tests/system/test_soak.py",
    "tests/house/test_tiers.py",  # collects the suite three times
}
"""Files of which the default tier has nothing."""


def collected(*options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.fixture(scope="module")
def ids() -> list[str]:
    return collected("--full")


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


def test_rest_is_what_the_default_leaves_out(ids: list[str]) -> None:
    default, rest = collected(), collected("--rest")
    assert not {*default} & {*rest} and sorted(default + rest) == sorted(ids)
