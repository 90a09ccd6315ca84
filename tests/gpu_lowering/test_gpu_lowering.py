"""Prefix and suffix become Triton kernels for sm_80 and sm_90, without a GPU.

Each model is lowered once for sm_90, and one for sm_80, too, cold, each time in a process of its
own: the patches of ``fake_gpu.py`` change what PyTorch believes of the machine. bf16; every size is
a symbol. This shows what is emitted, and that it compiles; nothing runs.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_lowering.fake_gpu import ARCHES, unfit
from tests.support.paths import ROOT

UNFIT = unfit()
pytestmark = pytest.mark.skipif(UNFIT is not None, reason=str(UNFIT))

PRODUCTS = {"qwen3": {"mm"}, "moe": {"mm", "_grouped_mm"}, "canvas": {"mm"}}
"""Matrix products, by model: ATen's, as Inductor takes them unless it may tune on the device."""

FALLBACKS = {
    "qwen3": set(),
    "moe": {"aten.histc.default", "aten.sort.stable", "aten.topk.default"},
    "canvas": set(),
}
"""What Inductor does not lower: the router's choice and the order of its experts, nothing else."""

FOCUS = {
    "prefix": {"pack", "unpack"},
    "suffix": {"pack", "repack"},
}
FUSED = {
    "list_masked": 2, "attend_rows": 2, "attend_columns": 2, "select": 1, "number_kept": 1,
}  # fmt: skip
"""Kernels of ``focus_compile.ops.triton.kernels``, and how often the prefix launches each."""

ATTENTION = {"attend", "join", "line_index", "site_index", "site_mask", "visible"}
"""``focus::`` operators around attention, in both."""


@functools.cache
def lowered(model: str, arch: int, mode: str | None = None) -> dict[str, Any]:
    """What one process reports; ``mode``: Inductor's."""
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.gpu_lowering.lower", "--out", folder]
        done = subprocess.run(
            [*command, "--model", model, "--arch", str(arch), *(("--mode", mode) if mode else ())],
            cwd=ROOT,
            env={**os.environ, **threads},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text())
        return report


@pytest.fixture(params=[*(f"qwen3-{arch}" for arch in ARCHES), "moe-90", "canvas-90"])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    model, arch = request.param.split("-")
    return lowered(model, int(arch))


def test_graphs(report: dict[str, Any]) -> None:
    """Dynamo captures the model whole, and FOCUS applies to it: three programs of one module."""
    assert report["graphs"] == 1 and not report["graph_breaks"]
    assert list(report["programs"]) == ["dense", "prefix", "suffix"]


def test_every_kernel_compiles(report: dict[str, Any]) -> None:
    """Every kernel is Triton's, and has a cubin for the architecture."""
    for program in report["programs"].values():
        assert not program["host_kernels"]
        assert len(program["kernels"]) >= 7
        for kernel in program["kernels"]:
            assert kernel["arch"] == report["arch"], kernel
            assert kernel["cubin_bytes"] > 1000 and kernel["launches"] >= 1, kernel


@pytest.mark.parametrize("half", FOCUS)
def test_operators(report: dict[str, Any], half: str) -> None:
    """Products, what plain Inductor leaves to ATen as well, and ``focus::`` operators."""
    model = report["model"]
    expected = {f"focus.{name}.default" for name in FOCUS[half] | ATTENTION}
    expected |= PRODUCTS[model] | FALLBACKS[model]
    assert set(report["programs"][half]["operators"]) == expected


def test_fused_kernels(report: dict[str, Any]) -> None:
    """Importance, twice, and selection are our kernels: symbols are all that they know of a block.

    Inductor compiles them with the rest, and no operator for either is left.
    """
    kernels = {k["name"]: k for k in report["programs"]["prefix"]["kernels"]}
    launches = {name: kernels[name]["launches"] for name in FUSED}
    assert launches == FUSED
    for name in FUSED:
        assert kernels[name]["scalars"]["tokens"] == ["token"]
    for name in ("dense", "suffix"):
        assert not {k["name"] for k in report["programs"][name]["kernels"]} & FUSED.keys()


def test_cuda_graphs() -> None:
    """With ``mode="reduce-overhead"`` each program would be recorded whole.

    Inductor gives no reason against it, and finds nothing to leave out of the recording. It would
    say the same of programs with a scalar of the host, whose value a recording freezes: in this
    mode they have none, in others one.
    """
    programs = lowered("qwen3", 90, "reduce-overhead")["programs"]
    assert list(programs) == ["dense", "prefix", "suffix"]
    for name, program in programs.items():
        assert (program["cuda_graph_skips"], program["partitions"]) == (0, 1), name
        assert program["host_inputs"] == 0, name
    plain = lowered("qwen3", 90)["programs"]
    assert all(program["partitions"] == 0 for program in plain.values())
    assert [program["host_inputs"] for program in plain.values()] == [0, 1, 1]


def test_dense_operators(report: dict[str, Any]) -> None:
    """Attention as two batched products and a softmax is an artefact of this machine.

    A CPU build of PyTorch knows none of the fused attention kernels for CUDA, and takes
    ``scaled_dot_product_attention`` apart. With a GPU the dense program calls one of them.
    """
    model = report["model"]
    expected = PRODUCTS[model] | FALLBACKS[model] | {"bmm"}
    assert set(report["programs"]["dense"]["operators"]) == expected


def test_sizes_are_symbols(report: dict[str, Any]) -> None:
    """Kernels before the cut run over the fed tokens, those after it over the retained ones.

    The others compute rotary tables (of all positions), sums over the experts, or what to retain,
    for which the canvas is all that counts.
    """
    for half, rows, others in (("prefix", "fed", "retained"), ("suffix", "retained", "fed")):
        packed = 0
        for kernel in report["programs"][half]["kernels"]:
            assert others not in kernel["sizes"], kernel
            if rows in kernel["sizes"]:
                packed += 1
                assert kernel["arguments"]["xnumel"] in ("i32", "i64")
            else:
                assert set(kernel["sizes"]) <= {"token", "history", "batch"}, kernel
        assert packed >= 5


def test_only_selection_knows_the_batch(report: dict[str, Any]) -> None:
    """Rows are packed: no kernel of a layer knows the batch, nor the most tokens of a row."""
    for half in FOCUS:
        for kernel in report["programs"][half]["kernels"]:
            assert not {"fed_row", "retained_row"} & set(kernel["sizes"])
            if "batch" in kernel["sizes"]:
                assert half == "prefix" and set(kernel["sizes"]) <= {"batch", "token"}, kernel
