"""The fused kernels against their specification, and what they take of a GPU.

Numbers come from Triton's interpreter, in a process of its own; nothing is launched on a device.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from focus_compile.ops.importance import importance
from focus_compile.ops.library import focus

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install -e '.[triton]'", allow_module_level=True)

from focus_compile.ops.triton import operators as fused
from tests.fused.cubins import signatures, usage
from tests.support.paths import ROOT

CASES = 100


@functools.cache
def compared(what: str) -> list[dict[str, Any]]:
    """What the interpreter's process found, case by case."""
    command = [sys.executable, "-m", "tests.fused.interpret", "--what", what]
    done = subprocess.run(
        [*command, "--cases", str(CASES)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cases: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(cases) == CASES
    return cases


def test_importance() -> None:
    """Equal to the eager function to fp32's rounding, and to itself bit by bit."""
    cases = compared("importance")
    worst = max(case["error"] for case in cases)
    assert worst < 2e-6, worst
    assert all(case["same_again"] for case in cases) and sum(case["repeated"] for case in cases) > 5
    assert sum(case["masked"] > 0 for case in cases) > CASES / 2
    assert {case["tokens"] <= 32 for case in cases} == {False, True}  # one tile and several
    assert any(case["tokens"] > 200 for case in cases)
    assert any(case["heads"] > case["groups"] > 1 for case in cases)


def test_choose() -> None:
    """Mask and tables equal the eager functions' exactly, with ties, NaN and infinities."""
    cases = compared("choose")
    assert all(all(case["equal"]) for case in cases), [c for c in cases if not all(c["equal"])]
    assert max(case["signal_error"] for case in cases) < 1e-6
    assert sum(case["evicted"] > 0 for case in cases) > CASES / 3
    for kind in ("ties", "strange"):
        assert sum(case[kind] and case["evicted"] > 0 for case in cases) > 5, kind
    assert any(case["tokens"] > 256 and case["evicted"] > 0 for case in cases)  # two walks


@pytest.mark.parametrize("what", ["join", "attend"])
def test_moves(what: str) -> None:
    """What every layer calls gives the same bits as the eager functions, in each of its forms."""
    cases = compared(what)
    assert all(case["equal"] for case in cases), [case for case in cases if not case["equal"]]
    names = ("kind", "dtype", "reuse", "fresh", "history") if what == "join" else ("fed",)
    values = {name: {case[name] for case in cases} for name in names}
    several = {"kind": 3, "dtype": 3, "reuse": 3, "fresh": 2, "history": 5, "fed": 2}
    assert {name: len(found) for name, found in values.items()} == {n: several[n] for n in names}
    if what == "attend":
        assert any(case["heads"] > case["groups"] > 1 for case in cases)


ARCHES = (80, 90, 100)
REGISTERS, SPILLED, SHARED = 232, 32, 48 * 1024
"""Registers of a thread and bytes of it that spill; bytes of shared memory of a block.

48 KiB is what any GPU gives without asking.
"""


@pytest.mark.parametrize("arch", ARCHES)
def test_cubins(arch: int) -> None:
    """Every kernel compiles, for heads of every kind of size and all types, within the limits."""
    found = {}
    for name in signatures("bf16"):
        attends = name.startswith("attend")
        for element in ("bf16", "fp32") if attends else ("bf16",):
            for size in (32, 64, 96, 256) if attends else (128,):
                found[name, element, size] = usage(name, arch, element, size)
    assert len(found) == 23
    print({kernel: str(taken) for kernel, taken in found.items()})
    for kernel, taken in found.items():
        assert taken.registers <= REGISTERS and taken.shared <= SHARED, (kernel, taken)
        assert taken.stack <= SPILLED and taken.local == 0, (kernel, taken)


def test_operators_on_a_cpu() -> None:
    """They call the specification there, and compile."""
    torch.manual_seed(0)
    query, key = torch.randn(3, 6, 11, 16), torch.randn(3, 2, 11, 16)
    masked, fed = torch.rand(3, 11) < 0.7, torch.ones(3, 11, dtype=torch.bool)
    numbers = (torch.full((3,), -1), torch.ones(3), torch.tensor(1.5))
    weights, bias = torch.tensor([-1.0, 1.0]), torch.zeros(3, 11)
    first = importance(query, key, masked, 0.25)
    second = importance(query.flip(2), key, masked, 0.25)
    delta = focus.signal(first, second, weights, bias)
    mask = focus.retain(delta, masked, fed, *numbers)
    assert not mask.all()
    expected = (first, delta, mask, *focus.tables(mask))

    def both() -> tuple[torch.Tensor, ...]:
        made = fused.importance(query, key, masked, 0.25)
        return made, *fused.choose(made, second, weights, bias, masked, fed, *numbers)

    for function in (both, torch.compile(both, fullgraph=True)):
        assert all(map(torch.equal, function(), expected))
