"""Prefix and suffix become Triton kernels for sm_80 and sm_90, without a GPU.

Each model is lowered once for sm_90, and one for sm_80, too, cold, in a process for each
architecture: the patches of ``fake_gpu.py`` change what PyTorch believes of the machine. bf16;
every size is a symbol. This shows what is emitted, and that it compiles; nothing runs.
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
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from focus_compile.ops.attention import attend
from tests.gpu_lowering.fake_gpu import ARCHES, gpu_attention, unfit
from tests.support.paths import ROOT

UNFIT = unfit()
pytestmark = pytest.mark.skipif(UNFIT is not None, reason=str(UNFIT))

FUSED_ATTENTION = "aten._scaled_dot_product_efficient_attention.default"
PRODUCTS = {name: {"mm"} for name in ("qwen3", "held", "int8", "canvas")}
PRODUCTS["moe"] = {"mm", "_grouped_mm"}
"""Matrix products, by model: ATen's, as Inductor takes them unless it may tune on the device."""

FALLBACKS = {
    "qwen3": set(),
    "moe": {"aten.histc.default", "aten.sort.stable", "aten.topk.default"},
    "canvas": set(),
    "held": set(),
    "int8": set(),
}
"""What Inductor does not lower: the router's choice and the order of its experts, nothing else."""

FOCUS = {
    "prefix": {"pack", "unpack"},
    "suffix": {"repack"},
}
FUSED = {
    "list_masked": 2, "attend_rows": 2, "attend_columns": 2, "select": 1, "number_kept": 1,
}  # fmt: skip
"""Kernels of ``focus_compile.ops.triton.kernels``, and how often the prefix launches each."""

ATTENTION = {"attend", "join", "line_index", "site_index", "site_mask", "visible"}
"""``focus::`` operators around attention, in both."""


GRAPHS = "/reduce-overhead"
"""Inductor's mode, behind a model."""
LOWERED = {
    80: ("qwen3",),
    90: (
        "qwen3", "held", "int8", "moe", "canvas", "qwen3-5", "llada", "llada-5", f"qwen3{GRAPHS}",
        f"held{GRAPHS}",
    ),
}  # fmt: skip


@functools.cache
def reports(arch: int) -> dict[str, dict[str, Any]]:
    """What one process reports of every model that is lowered for an architecture."""
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.gpu_lowering.lower", "--out", folder]
        done = subprocess.run(
            [*command, "--arch", str(arch), "--model", *LOWERED[arch]],
            cwd=ROOT,
            env={**os.environ, **threads},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        paths = {model: Path(folder) / model / "report.json" for model in LOWERED[arch]}
        return {model: json.loads(path.read_text()) for model, path in paths.items()}


def lowered(model: str, arch: int = 90) -> dict[str, Any]:
    return reports(arch)[model]


@pytest.fixture(
    params=[*(f"qwen3-{arch}" for arch in ARCHES), "held-90", "int8-90", "moe-90", "canvas-90"]
)
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
        assert len(program["kernels"]) >= 6
        for kernel in program["kernels"]:
            assert kernel["arch"] == report["arch"], kernel
            assert kernel["cubin_bytes"] > 1000 and kernel["launches"] >= 1, kernel


@pytest.mark.parametrize("half", FOCUS)
def test_operators(report: dict[str, Any], half: str) -> None:
    """Products, what plain Inductor leaves to ATen as well, and ``focus::`` operators."""
    model = report["model"]
    used = (FOCUS[half] | ATTENTION) - ({"join"} if model == "held" else set())
    expected = {f"focus.{name}.default" for name in used}
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
    programs = lowered(f"qwen3{GRAPHS}")["programs"]
    assert list(programs) == ["dense", "prefix", "suffix"]
    for name, program in programs.items():
        assert (program["cuda_graph_skips"], program["partitions"]) == (0, 1), name
        assert program["host_inputs"] == 0, name
    plain = lowered("qwen3")["programs"]
    assert all(program["partitions"] == 0 for program in plain.values())
    assert [program["host_inputs"] for program in plain.values()] == [0, 1, 1]


def test_cuda_graphs_write_into_the_cache() -> None:
    """The slots of a cache are read and written where they lie, not copied before every replay.

    Not among the inputs that stay, yet: weights, of which the capture forgets that they are some,
    and the keys and values that a session keeps.
    """
    programs = lowered(f"held{GRAPHS}")["programs"]
    assert programs["prefix"]["fixed_inputs"] == 2 * 2  # keys and values of layers 0 and 1
    assert programs["suffix"]["fixed_inputs"] == 2  # of the last layer


def test_dense_operators(report: dict[str, Any]) -> None:
    """Products and fused attention; which one it is, ``fake_gpu.gpu_attention`` chose."""
    model = report["model"]
    expected = PRODUCTS[model] | FALLBACKS[model] | {FUSED_ATTENTION}
    assert set(report["programs"]["dense"]["operators"]) == expected


def is_no_mask(kernel: dict[str, Any]) -> bool:
    return "constant_pad_nd" not in kernel["name"]


def test_sizes_are_symbols(report: dict[str, Any]) -> None:
    """Kernels before the cut run over the fed tokens, those after it over the retained ones.

    The others compute rotary tables (of all positions), sums over the experts, or what to retain,
    for which the canvas is all that counts; masks have a line for each query of their rows.
    """
    for half, rows, others in (("prefix", "fed", "retained"), ("suffix", "retained", "fed")):
        packed = 0
        for kernel in filter(is_no_mask, report["programs"][half]["kernels"]):
            assert others not in kernel["sizes"], kernel
            if rows in kernel["sizes"]:
                packed += 1
                assert kernel["arguments"]["xnumel"] in ("i32", "i64")
            else:
                assert set(kernel["sizes"]) <= {"token", "history", "batch"}, kernel
        assert packed >= 5


def test_only_selection_knows_the_batch(report: dict[str, Any]) -> None:
    """Rows are packed: no kernel of a layer knows the batch, nor the most tokens of a row.

    Those that pad masks do, once for all layers: ``test_masks_are_padded_once``.
    """
    for half in FOCUS:
        for kernel in filter(is_no_mask, report["programs"][half]["kernels"]):
            assert not {"fed_row", "retained_row"} & set(kernel["sizes"])
            if "batch" in kernel["sizes"]:
                assert half == "prefix" and set(kernel["sizes"]) <= {"batch", "token"}, kernel


OWN = {FUSED_ATTENTION: 1, "mm": 1, "focus.attend.default": 3}
"""Launches of operators that layers call; those of ours are counted in ``tests/fused``."""
JOIN = {"in place": 1, "copied": 2}
LAYERS = {
    ("qwen3", "dense", "copied"): 17.5,
    ("qwen3", "suffix", "copied"): 19,
    ("qwen3", "suffix", "in place"): 17,
    ("llada", "dense", "copied"): 13.5,
    ("llada", "suffix", "copied"): 19,
    ("llada", "suffix", "in place"): 17,
}
"""Launches of one layer: model, program, whether K/V of the step before are written in place."""


@pytest.mark.parametrize(("model", "program", "joins"), LAYERS)
def test_launches_of_a_layer(model: str, program: str, joins: str) -> None:
    """All of a layer's launches, by the difference between models of 3 and of 5 layers.

    FOCUS adds 6 at most. Half a launch: Inductor cuts some layers otherwise than others.
    """
    found = []
    for name in (model, f"{model}-5"):
        given = lowered(name)["programs"][program]
        total = sum(kernel["launches"] for kernel in given["kernels"])
        known = OWN | {"focus.join.default": JOIN[joins]}
        found.append(total + sum(known.get(op, 0) * n for op, n in given["operators"].items()))
    fewer, more = (lowered(name)["programs"][program] for name in (model, f"{model}-5"))
    counts = more["operators"].items() - fewer["operators"].items()
    assert {name for name, _ in counts} <= known.keys(), "an operator whose launches are not known"
    each = (found[1] - found[0]) / 2
    assert each == LAYERS[model, program, joins]
    dense = next(count for key, count in LAYERS.items() if key[:2] == (model, "dense"))
    assert each <= dense + 6


def test_masks_are_padded_once() -> None:
    """ATen copies a mask whose rows are no multiple of 8 in every attention; ours are, for all.

    Two masks: of the queries of the second scored layer, and of those of all others.
    """
    for name in ("qwen3", "qwen3-5"):
        kernels = lowered(name)["programs"]["suffix"]["kernels"]
        assert sum(k["launches"] for k in kernels if "constant_pad_nd" in k["name"]) == 2


@pytest.mark.parametrize("columns", [27, 32])
def test_attention_copies_no_mask(columns: int) -> None:
    """What ATen's fused attention on a GPU does with the mask that ``focus::attend`` gives it."""
    batch, groups, share, size, most = 2, 2, 3, 16, 5
    query = torch.randn(1, groups * share, batch * most, size)
    key = torch.randn(batch, groups, 27, size)
    index = torch.arange(batch * most).view(batch, most)
    mask = torch.zeros(batch, 1, share * most, columns)
    with gpu_attention(), enable_python_dispatcher():
        made = make_fx(lambda *args: attend(*args, 0.25), tracing_mode="fake")(
            query, key, key, mask, index, torch.arange(batch * most)
        )
    targets = [node.target for node in made.graph.nodes]
    assert torch.ops.aten._scaled_dot_product_efficient_attention.default in targets
    assert (torch.ops.aten.constant_pad_nd.default in targets) == (columns == 27)
