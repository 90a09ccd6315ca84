"""Models that transformers shards over processes: every rank decodes what one process decodes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.fx import Graph, GraphModule

import focus_compile
from focus_compile.errors import Unsupported
from focus_compile.graph.sharding import Group, is_sharded
from focus_compile.ops.library import focus
from focus_compile.ops.ranks import embedding_shard
from focus_compile.plan.heads import sharded_heads
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(
    not dist.is_gloo_available(), reason="this build of PyTorch has no gloo"
)
HEADS = 4
needs_torch_2_13 = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="Dynamo hides what DTensors are called with: refused"
)
CASES = {2: ("experts", "trained", "tied-inductor", "plans"), 4: ("untied",)}
"""By the number of processes."""
Reports = Callable[[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What each rank writes of a case; those of as many processes run in the same ones."""

    @functools.cache
    def started(processes: int) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        start(folder, processes, CASES[processes])
        return folder

    def of_case(processes: int, case: str) -> list[dict[str, Any]]:
        paths = (started(processes) / case / f"{rank}.json" for rank in range(processes))
        return [json.loads(path.read_text()) for path in paths]

    return of_case


def start(folder: Path, processes: int, cases: Sequence[str]) -> None:
    """Ranks that wait for one another are killed after some minutes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "tests.parallel.rank", str(folder)]
    command += cases
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@needs_torch_2_13
@pytest.mark.parametrize(
    ("processes", "case"), [(n, case) for n in CASES for case in CASES[n] if case != "plans"]
)
def test_equals_one_process(processes: int, case: str, reports: Reports) -> None:
    """Tokens, retained and rescued tokens, steps of every rank, with FOCUS and densely."""
    found = reports(processes, case)
    whole = found[0]["whole"]
    for report in found:
        sharded = report["sharded"]
        assert sharded["focus"] == whole["focus"]
        assert sharded["dense"] == whole["dense"]
        heads = [count * processes for count in sharded["heads"]]
        assert heads == whole["heads"] and len(heads) > 1
    steps = whole["focus"]["retained"]
    assert len(steps) == whole["focus"]["forwards"] > 4
    kept = [keep for step in steps for row in step for keep in row]
    assert any(kept) and not all(kept)
    rescued = [any(row) for step in whole["focus"]["rescued"] for row in step]
    assert any(rescued) and not all(rescued)
    dense = whole["dense"]["retained"]
    assert dense and all(keep for step in dense for row in step for keep in row)


@needs_torch_2_13
def test_plans(reports: Reports) -> None:
    """Heads may be whole; a plan whose calls are not known is refused, and computes what it did."""
    for report in reports(2, "plans"):
        for name in ("mlp", "vocabulary", "features"):
            assert report[name]["refusals"] == [] and report[name]["ranks"] == [1]
            assert not report[name]["told"] and report[name]["steps"] == 1
            assert report[name]["from_eager"] < 1e-5
        (refusal,) = report["sequence"]["refusals"]
        assert refusal["reason"].startswith("weights are sharded over processes in a way that is")
        assert refusal["module"] == "model.norm"
        assert refusal["cure"].startswith("use transformers' tp_plan='auto' with PyTorch 2.13")
        assert report["sequence"]["from_eager"] == report["sequence"]["steps"] == 0


def graph_of_heads(first: Group | None, second: Group | None, joined: str | None) -> Any:
    """Two queries, each of a weight, and the second also of what the first gives."""
    graph = Graph()
    weights = [graph.placeholder(f"weight{index}") for index in (0, 1)]
    for weight, group in zip(weights, (first, second), strict=True):
        weight.meta["shard"] = group
    one = graph.call_function(torch.ops.aten.relu.default, (weights[0],))
    way = one
    if joined == "sum":
        way = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (one, "sum", "0"))
        way = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (way,))
    elif joined == "gather":
        way = graph.call_function(focus.gather_ranks.default, (one, 8, 2, "0"))
    two = graph.call_function(torch.ops.aten.add.Tensor, (way, weights[1]))
    graph.output((one, two))
    return sharded_heads(GraphModule({}, graph), [one, two])


def test_whose_heads_are_shared_out() -> None:
    group = Group(2, "0")
    assert graph_of_heads(None, None, None) is None
    for joined in ("sum", "gather"):
        assert graph_of_heads(group, group, joined) == group
        with pytest.raises(Unsupported, match="in a way that is not known here"):
            graph_of_heads(group, None, joined)
    assert graph_of_heads(group, None, None) == group
    with pytest.raises(Unsupported, match="in a way that is not known here"):
        graph_of_heads(None, group, None)


def test_ranks_draw_alike() -> None:
    """Tokens are not drawn from a sharded model without a seed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(2, 2)
        ids = torch.zeros(1, 1, dtype=torch.int64)
        arguments: dict[str, Any] = {"max_new_tokens": 1, "mask_token_id": 1, "temperature": 1.0}
        assert not is_sharded(model)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
        assert is_sharded(model)
        with pytest.raises(ValueError, match="processes, which must draw alike: give seed"):
            focus_compile.generate(model, ids, **arguments)
        with pytest.raises(AttributeError, match="config"):  # with a seed it is called
            focus_compile.generate(model, ids, seed=0, **arguments)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_vocabulary_in_parts(ranks: int) -> None:
    """The terms of all ranks add up to the embedding, whatever the last ranks have left."""
    table = torch.randn(10, 3, dtype=torch.float64)
    ids = torch.tensor([[0, 9, 4], [4, 3, 8]])
    width = -(-10 // ranks)
    starts = [min(10, rank * width) for rank in range(ranks)]
    terms = [focus.embedding_shard(table[start : start + width], ids, start) for start in starts]
    assert torch.equal(torch.stack(terms).sum(0), table[ids])
    assert torch.equal(embedding_shard(table, ids, 0), table[ids])
