"""explain's data and files, and the artifacts in PyTorch's structured trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import focus_compile
from focus_compile.cost import BATCH, FED, HISTORY, RETAINED, TOKENS
from tests.dialects import DIALECTS, draw_call
from tests.models.dream import Attention

TRACED = """
import torch
from focus_compile import focus_backend, session
from tests.dialects import DIALECTS, draw_call
from tests.harness import MASK, eager_inner
from tests.models.dream import Attention
dialect = DIALECTS["dream"]
model, draw = dialect.build().eval(), draw_call(dialect, 1)
def backend(gm, inputs):
    return focus_backend(gm, inputs, options={"mask_token_id": MASK}, inner=eager_inner)
with torch.no_grad(), session() as focus:
    torch.compile(model, backend=backend)(**dialect.arguments(model, draw))
    assert focus.stats.steps == 1
torch._dynamo.reset()
half = dialect.build().eval()
half.layers = half.layers[:1]
arguments = dialect.arguments(half, draw)
with torch.no_grad():
    torch.compile(half, backend=backend)(**arguments)
"""


def story(name: str) -> focus_compile.Explanation:
    torch._dynamo.reset()
    dialect = DIALECTS[name]
    model = dialect.build().eval()
    return focus_compile.explain(model, **dialect.arguments(model, draw_call(dialect, 1)))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("dream", "cat with the history"),
        ("llada-canvas", "none: keys are the block's own"),
        ("sdar-static", "replaces slots"),
    ],
)
def test_data_and_files(name: str, write: str, tmp_path: Path) -> None:
    """JSON holds what the text says; before, after and difference are the graphs'."""
    told = story(name)
    root = told.save(tmp_path / "new" / "folder")
    data = json.loads((root / "explanation.json").read_text())
    assert data == told.to_dict() == json.loads(told.to_json())
    assert (root / "explanation.txt").read_text() == str(told)
    (graph,) = data["graphs"]
    found = graph["analysis"]
    assert data["applied"] and graph["refusal"] is None and graph["break"] is None
    assert [site["write"] for site in found["sites"]] == [write] * len(found["sites"])
    assert write in str(told)
    assert "[batch, token]" in found["inputs"].values()
    assert found["live"]["retain_mask"] == "canvas"
    assert set(found["packed"].values()) == {"fed", "retained"}
    assert found["passes"][0]["focus_operators"] <= found["passes"][-1]["focus_operators"]
    before, after, diff = (
        (root / f"graph0{end}").read_text() for end in ("_before.py", "_after.py", ".diff")
    )
    assert "focus.importance" not in before and after.count("focus.importance") == 2
    assert "+++ restore" in diff and "\n+" in diff and "focus.importance" in diff
    cost = told.graphs[0].cost
    assert cost is not None
    assert cost.focus.free_symbols <= {BATCH, TOKENS, HISTORY, FED, RETAINED}
    assert graph["flops"] == {"dense": str(cost.dense), "focus": str(cost.focus)}


def test_data_of_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A refusal and a graph break, as data; no graph to write."""
    monkeypatch.setattr(Attention, "branches", True)
    told = story("dream")
    root = told.save(tmp_path)
    graphs = json.loads((root / "explanation.json").read_text())["graphs"]
    broke = next(graph["break"] for graph in graphs if graph["break"])
    assert "torch.all(mask)" in broke["line"] and "Qwen3ForCausalLM" in broke["remedy"]
    refused = [graph["refusal"] for graph in graphs if graph["refusal"]]
    assert refused and all(refusal["reason"] for refusal in refused)
    assert sorted(path.name for path in root.iterdir()) == ["explanation.json", "explanation.txt"]


def test_artifacts_in_a_trace(tmp_path: Path) -> None:
    """tlparse finds the graphs before and after, the plan, and the reason of a refusal."""
    root = Path(__file__).resolve().parent.parent
    subprocess.run(
        [sys.executable, "-c", TRACED],
        check=True,
        cwd=root,
        env=os.environ | {"TORCH_TRACE": str(tmp_path / "trace"), "PYTHONPATH": str(root)},
    )
    (log,) = (tmp_path / "trace").iterdir()
    tlparse = Path(sys.executable).with_name("tlparse")
    subprocess.run(
        [tlparse, log, "-o", tmp_path / "out", "--no-browser"], check=True, capture_output=True
    )
    found = {path.name.rsplit("_", 1)[0]: path for path in (tmp_path / "out").rglob("focus_*")}
    assert set(found) == {"focus_before", "focus_plan", "focus_after", "focus_refusals"}
    assert "focus.importance" in found["focus_after"].read_text()
    assert "focus." not in found["focus_before"].read_text()
    assert len(json.loads(found["focus_plan"].read_text())["sites"]) >= 2
    assert "two layers" in json.loads(found["focus_refusals"].read_text())["reason"]
