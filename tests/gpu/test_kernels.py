"""The nine Triton kernels against the eager functions: 700 cases on a GPU.

On a CPU they run in Triton's interpreter (``tests/fused`` has more of that).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.gpu.where import Where
from tests.support.paths import ROOT

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install -e '.[triton]'", allow_module_level=True)


def compared(where: Where, what: str, cases: int, dtype: str = "float32") -> list[dict[str, Any]]:
    """What a process of its own found, case by case."""
    command = [sys.executable, "-m", "tests.fused.interpret", "--what", what, "--dtype", dtype]
    command += ["--cases", str(cases), "--device", where.device, "--seed", "1"]
    interpreted = {} if where.gpu else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **interpreted, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2500:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == cases
    return found


@pytest.mark.parametrize(("dtype", "cases"), [("float32", 100), ("bfloat16", 100), ("float16", 50)])
def test_importance(where: Where, dtype: str, cases: int) -> None:
    """Products of 16-bit numbers are exact: the bound of fp32 holds for them, too."""
    if not where.gpu and dtype != "float32":
        pytest.skip("Triton's interpreter multiplies 16-bit numbers wrongly")
    found = compared(where, "importance", where.draws(cases, 10), dtype)
    worst = max(found, key=lambda case: case["error"])
    assert worst["error"] < 1e-4, worst
    assert all(case["same_again"] for case in found)
    assert sum(case["masked"] > 0 for case in found) > len(found) / 2


@pytest.mark.parametrize("what", ["join", "attend"])
def test_moves(where: Where, what: str) -> None:
    """What every layer calls: bits are moved, none is changed."""
    found = compared(where, what, where.draws(100, 10))
    assert all(case["equal"] for case in found), [case for case in found if not case["equal"]]


def test_choose(where: Where) -> None:
    """Mask and tables equal the eager functions' exactly, with ties, NaN and infinities."""
    found = compared(where, "choose", where.draws(250, 10))
    assert all(all(case["equal"]) for case in found), [c for c in found if not all(c["equal"])]
    assert max(case["signal_error"] for case in found) < 1e-5
    assert sum(case["evicted"] > 0 for case in found) > len(found) / 3
