"""Models that transformers shards over processes: every rank decodes what one process decodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
CASES = [("untied", 4, ""), ("experts", 2, ""), ("trained", 2, ""), ("tied", 2, "inductor")]


def reports(folder: Path, processes: int, module: str, *args: str) -> list[dict[str, Any]]:
    """What each rank writes; ranks that wait for one another are killed after some minutes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", module, str(folder), *args]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@needs_torch_2_13
@pytest.mark.parametrize(("case", "processes", "inductor"), CASES)
def test_equals_one_process(case: str, processes: int, inductor: str, tmp_path: Path) -> None:
    """Tokens, retained and rescued tokens, steps of every rank, with FOCUS and densely."""
    found = reports(tmp_path, processes, "tests.parallel.sharded", case, *filter(None, [inductor]))
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
    assert whole["dense"]["retained"] == []


@needs_torch_2_13
def test_plans(tmp_path: Path) -> None:
    """Heads may be whole; a plan whose calls are not known is refused, and computes what it did."""
    for report in reports(tmp_path, 2, "tests.parallel.plans"):
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
