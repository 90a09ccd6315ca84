"""Every stage of ``python -m benchmarks.gpu`` goes all the way on a CPU; failures are results."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch._dynamo.utils import counters

from benchmarks.gpu import compile as compile_stage
from benchmarks.gpu import lanes, numbers, page, steps
from benchmarks.gpu import profile as profile_stage
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.plan import ROOT, Cell, Plan
from benchmarks.gpu.results import Results
from benchmarks.gpu.timeline import FORWARD, Timeline, kind_of
from benchmarks.gpu.worker import answer, measures

SHAPE = "bench-3l"
CHILD = """
import json, os, signal, sys, time
plan = json.loads(sys.argv[1])
print("what this process says", file=sys.stderr, flush=True)
for line in sys.stdin:
    what = json.loads(line)
    if what["do"] == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what["do"] == "hang":
        time.sleep(60)
    outcome = "error" if what["do"] == "fail" else "ok"
    told = {"outcome": outcome, "process": os.getpid(), "stage": plan["stage"]}
    print(json.dumps(told), flush=True)
"""
TESTS = """
import os, signal, time
def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)
def test_hangs(): time.sleep(60)
def test_spoils(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_last(): pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all stages write their JSON, and what they record."""
    return tmp_path_factory.mktemp("gpu")


def plan(stage: str, folder: Path, **changes: Any) -> Plan:
    given = {"batches": (2,), "task": "total", "repeats": 1, "history": 7} | changes
    return Plan(
        stage, "cpu", (SHAPE,), inductor=False, cache=str(folder / "cache"), commit="abc", **given
    )


def test_steps(folder: Path) -> None:
    """By the command line, in a process of their own; again, nothing is left to do."""
    given: dict[str, Any] = {
        "stage": "steps", "models": SHAPE, "batches": "2", "device": "cpu", "out": folder,
        "contestants": "focus;inductor", "task": "total", "repeats": 1, "inductor": False,
        "cache": folder / "cache", "history": 7, "limit": 500.0,
    }  # fmt: skip
    main(**given)
    report = json.loads((folder / "steps.json").read_text())
    assert report["machine"]["torch"] == torch.__version__ and report["left"] == []
    cells = report["cells"]
    assert cells["roofs"]["flops_per_s"] > cells["roofs"]["bytes_per_s"] > 0
    focus, dense = (cells[steps.key(SHAPE, 2, name)] for name in ("focus", "inductor"))
    for cell in (focus, dense):
        assert cell["outcome"] == "ok", cell
        assert 0 < cell["ms_per_step_min"] <= cell["ms_per_step"] and cell["peak_mib"] > 0
        whole = 1e-3 * (cell["steps"] * cell["ms_per_step"] + cell["ms_commit"])
        assert 0 < cell["tokens_per_s"] * whole <= 2 * 32
        assert cell["profile"]["ms_per_step"] > 0 and cell["profile"]["idle"] is None
    assert len(focus["retained_per_step"]) == focus["steps"] == dense["steps"]
    assert max(focus["retained_per_step"]) <= 64 > min(focus["fed_per_step"])
    assert dense["fed_per_step"] == []
    before = (folder / "steps.json").read_bytes()
    main(**given)
    assert (folder / "steps.json").read_bytes() == before


def test_profile(folder: Path) -> None:
    counters["graph_break"]["of another model, earlier in this process"] += 1
    given = plan("profile", folder, contestants=("focus",))
    results = Results(folder / "profile.json", "profile")
    for cell in profile_stage.cells(given):
        results.put(cell.key, answer(measures(given), cell.what))
    (found,) = results.cells.values()
    assert found["outcome"] == "ok", found
    spent = found["ms_by_kind"]
    assert {"importance", "selection", "pack", "join", "attend", "matrix products"} < set(spent)
    inside = sum(spent.values()) - spent["outside the model"]
    assert inside == pytest.approx(found["ms_per_step"])
    assert spent["host gap"] > 0


def test_compile(folder: Path) -> None:
    given = plan("compile", folder, contestants=("inductor",))
    results = Results(folder / "compile.json", "compile")
    cold, warm = compile_stage.cells(given)
    assert cold.lane != warm.lane and cold.environment == warm.environment
    results.put(cold.key, answer(measures(given), cold.what))
    assert results.cells[cold.key]["seconds_to_block_2"] > 0
    assert results.cells[cold.key]["captures"] >= 2  # the prompt, and blocks
    nobody = answer(measures(given), {**cold.what, "contestant": "nobody"})
    assert nobody["outcome"] == "error" and "contestant 'nobody': expected" in nobody["error"]


def test_the_committed_page() -> None:
    assert (page.DOCS / "gpu.md").read_text() == page.text(page.DOCS / "gpu")


def test_the_page(folder: Path) -> None:
    """Its tables from what the tests before this one found."""
    report = json.loads((folder / "steps.json").read_text())
    (row,) = page.rows(report)
    assert row["ratio"] > 0 and row["ratio_graphs"] is None
    assert 1 < row["limit"] < 3 and row["roof_ms"]["focus"] < row["roof_ms"]["inductor"]
    tests = Results(folder / "numbers.json", "numbers")
    tests.note(machine=report["machine"])
    tests.put("tests/gpu/test_a.py::test_b", {"outcome": "failed", "error": "E  |no|\n"})
    for stage in ("profile", "compile"):
        Results(folder / f"{stage}.json", stage).note(machine=report["machine"])
    made = page.text(folder)
    assert f"| {SHAPE} | 2 | focus |" in made and f"| {SHAPE} | inductor | cold |" in made
    assert "- tests/gpu/test_a.py::test_b: failed: `E  /no/`" in made
    assert "has never run on a GPU" in made  # a CPU is none
    lines = made.splitlines()
    for first, second in itertools.pairwise(lines):
        if first.startswith("|"):  # a table has one number of columns, and no gap
            assert not second or first.count("|") == second.count("|"), (first, second)


def test_a_failure_is_a_result(folder: Path) -> None:
    """A cell that dies, hangs or fails costs its process, which the next cell gets anew."""
    results = Results(folder / "lanes.json", "lanes")
    deeds = ("work", "again", "die", "work", "hang", "work", "fail", "work")
    cells = [Cell(f"{i} {deed}", "one", {"do": deed}) for i, deed in enumerate(deeds)]
    told: list[str] = []
    command = (sys.executable, "-c", CHILD)
    lanes.run(cells, plan("lanes", folder), results, budget=60, limit=3, say=told.append,
              command=command)  # fmt: skip
    found = list(results.cells.values())
    names = ["ok", "ok", "crashed", "ok", "timeout", "ok", "error", "ok"]
    assert [cell["outcome"] for cell in found] == names
    assert "exit status -11\nwhat this process says" in found[2]["error"]
    processes = [cell.get("process") for cell in found]
    assert processes[0] == processes[1] != processes[3] != processes[5] == processes[6]
    assert processes[7] != processes[6] and len(told) == 8
    late = [*cells, Cell("too late", "one", {"do": "work"})]
    lanes.run(late, plan("lanes", folder), results, budget=0, limit=3, say=told.append,
              command=command)  # fmt: skip
    assert json.loads(results.path.read_text())["left"] == ["too late"] and len(told) == 8


def test_out_of_memory_is_a_result() -> None:
    def measure(_: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    assert answer(measure, {})["outcome"] == "out of memory"


def test_numbers(folder: Path, tmp_path: Path) -> None:
    """Outcomes of a file in which tests fail, die, hang and spoil their process."""
    file = tmp_path / "test_bad.py"
    file.write_text(TESTS)
    results = Results(tmp_path / "numbers.json", "numbers")
    told: list[str] = []
    numbers.run(plan("numbers", folder), results, budget=120, limit=4, jobs=2, say=told.append,
                files=(str(file),))  # fmt: skip
    found = {name.partition("::")[2]: cell for name, cell in results.cells.items()}
    assert {name: cell["outcome"] for name, cell in found.items()} == {
        "test_right": "passed", "test_wrong": "failed", "test_dies": "crashed",
        "test_hangs": "timeout", "test_spoils": "failed", "test_last": "passed",
    }  # fmt: skip
    assert "one is not two" in found["test_wrong"]["error"]
    assert results.report["left"] == [] and len(told) == 6


def test_the_files_of_the_stage_are_there() -> None:
    there = {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert there == set(numbers.FILES)


def event(category: str, name: str, start: float, end: float, **args: Any) -> dict[str, Any]:
    tid = 7 if category in ("kernel", "gpu_memcpy") else 1
    return {
        "ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "pid": 1,
        "tid": tid, "args": args,
    }  # fmt: skip


def test_kernels_are_told_by_what_launched_them() -> None:
    """Events as the profiler writes them on a GPU: two steps of 100 us, a commit."""
    events = [event("user_annotation", FORWARD, start, start + 100) for start in (0, 150, 400)]
    events += [
        event("cpu_op", "focus::join", 5, 30),
        event("cpu_op", "aten::copy_", 6, 20),
        event("cuda_runtime", "cudaLaunchKernel", 7, 9, correlation=1),
        event("kernel", "elementwise_kernel", 10, 30, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 31, 32, correlation=2),
        event("kernel", "triton_poi_fused_add_0", 40, 50, correlation=2),
        event("cpu_op", "aten::mm", 41, 46),
        event("cuda_runtime", "cudaLaunchKernelExC", 42, 45, correlation=3),
        event("kernel", "nvjet_tst_128x64", 45, 75, correlation=3),  # beside the one before
        event("cuda_runtime", "cudaGraphLaunch", 151, 155, correlation=4),
        event("kernel", "list_masked_0", 160, 164, correlation=4),
        event("kernel", "something_new", 164, 170, correlation=4),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 180, 190, correlation=5),
        event("kernel", "gemm_of_the_commit", 410, 450, correlation=6),
        {"ph": "M", "name": "process_name", "args": {}},
    ]
    report = Timeline(events, 2).report()
    assert report["ms_per_step"] == pytest.approx(0.1)
    assert (report["kernels_per_step"], report["copies_per_step"]) == (2.5, 0.5)
    assert report["host_launches_per_step"] == 2
    assert report["idle"] == pytest.approx(1 - (20 + 35 + 10 + 10) / 200)
    spent = {name: ms * 2e3 for name, ms in report["ms_by_kind"].items()}
    assert spent == pytest.approx({
        "join": 20, "fused by Inductor": 10, "matrix products": 30, "importance": 4, "other": 6,
        "copies": 10, "host gap": 125, "at the same time": -5, "outside the model": 50,
    })  # fmt: skip
    assert set(report["other"]) == {"something_new"}
    with pytest.raises(ValueError, match="3 forwards in the profile: expected 4"):
        Timeline(events, 4).report()


@pytest.mark.parametrize(
    ("operators", "kernel", "kind"),
    [
        (("focus::attend", "aten::mm"), "cutlass_80", "attend"),
        (("focus_fused::choose",), "select", "selection"),
        ((), "select_0", "selection"),
        ((), "attend_rows_0", "importance"),
        ((), "fmha_cutlassF_bf16_aligned", "attend"),
        ((), "pytorch_flash::flash_fwd_kernel", "attend"),
        ((), "cutlass::device_kernel<...gemm...>", "matrix products"),
        ((), "triton_tem_fused_mm_3", "matrix products"),
        ((), "triton_red_fused_select_scatter_3", "fused by Inductor"),
        (("aten::add",), "vectorized_elementwise_kernel", "other"),
        ((), "Memset (Device)", "copies"),
    ],
)
def test_kinds(operators: tuple[str, ...], kernel: str, kind: str) -> None:
    assert kind_of(operators, kernel) == kind


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(folder: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no GPU here"):
        main(stage="numbers", out=folder / "none")
    with pytest.raises(typer.BadParameter, match="expected one of numbers, steps"):
        main(stage="everything", device="cpu", out=folder / "none")
