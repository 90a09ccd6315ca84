"""Inductor cannot compile the prefix, or finds garbage in its cache: two processes, one cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT


def child(what: str, folder: Path) -> dict[str, Any]:
    """What a process with a cache of its own reports."""
    own = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.inductor", what, str(folder)],
        cwd=ROOT,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def cold(folder: Path) -> dict[str, Any]:
    return child("cold", folder)


@pytest.fixture(scope="module")
def damaged(folder: Path, cold: dict[str, Any]) -> dict[str, Any]:
    assert cold["after"]["right"]
    return child("damaged", folder)


@pytest.mark.parametrize(
    ("fault", "program", "told"),
    [
        ("folder", "prefix", "NotADirectoryError: [Errno 20] Not a directory: "),
        ("disk", "prefix", "OSError: [Errno 28] No space left on device"),
        ("compiler", "prefix", "InvalidCxxCompiler: No working C++ compiler found"),
        ("suffix", "suffix", "OSError: [Errno 28] No space left on device"),
    ],
)
def test_inductor_fails(cold: dict[str, Any], fault: str, program: str, told: str) -> None:
    """One error that names the program and the cause; nothing dense stands in for it."""
    report = cold[fault]
    assert report["program"] == program
    assert report["error"].startswith(f"the {program} was not compiled, ")
    assert told in report["error"]
    assert report["dense"] == 0


def test_it_compiles_once_the_fault_is_gone(cold: dict[str, Any]) -> None:
    """The prefix ran in the call whose suffix failed, and in this one."""
    assert cold["after"] == {"right": True, "counts": [0, 2, 1]}
    assert cold["misses"] >= 1


def test_damaged_kernels(damaged: dict[str, Any]) -> None:
    assert damaged["libraries"] > 0
    assert damaged["library"]["program"] == "prefix"
    assert damaged["library"]["dense"] == 0


def test_damaged_entries_are_compiled_again(damaged: dict[str, Any]) -> None:
    assert damaged["entries"] > 0
    assert damaged["after"]["right"]
