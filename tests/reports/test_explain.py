"""explain's data and files, and the artifacts in PyTorch's structured trace."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

import focus_compile
from focus_compile.backend import focus_backend
from focus_compile.views.cost import BATCH, FED, HISTORY, RETAINED, TOKENS
from tests.backend.test_refusal import REFUSED
from tests.support.dialects import DIALECTS, draw_call, qwen3
from tests.support.harness import MASK, PAPER
from tests.support.models.dream import Attention
from tests.support.paths import ROOT
from tests.support.toy import Toy

TRACED = """
import torch
from focus_compile import focus_backend, session
from tests.support.dialects import DIALECTS, draw_call
from tests.support.harness import MASK, eager_inner
from tests.support.models.dream import Attention
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


def run_python(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, *words],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def wrong_backend(gm: GraphModule, inputs: Any, **options: Any) -> Any:
    """The backend, with a layer's queries scaled where it compiles prefix and suffix."""
    program = focus_backend(gm, inputs, **options)
    for half in (program.prefix, program.suffix):
        for node in half.half.gm.graph.nodes:
            if node.target is torch.ops.focus.attend.default:
                node.args = (*node.args[:-1], 2 * node.args[-1])
    return program


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
    for half, operators in (("prefix", 2), ("suffix", 0)):
        program = torch.export.load(root / f"graph0_{half}.pt2")
        nodes = list(program.graph.nodes)
        targets = [str(node.target) for node in nodes]
        assert targets.count("focus.importance.default") == operators
        assert "focus.attend.default" in targets and not program.state_dict
        assert any("batch" in text for text in found["shapes"][half].values())
        assert len(program.range_constraints) >= 3  # rows, block, what is fed or retained
        assert (root / f"graph0_{'before' if operators else 'after'}.dot").stat().st_size > 1000
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
    files = {path.name for path in root.iterdir()}
    assert {"explanation.json", "explanation.txt"} <= files
    assert not [name for name in files if name.endswith((".diff", ".dot", ".pt2"))]


@torch.no_grad()
@pytest.mark.parametrize("name", ["an operator over tokens", "heads in another order", "one layer"])
def test_a_refusal_as_a_script(name: str, tmp_path: Path) -> None:
    """The script is smaller than the model's graph, and is refused for the same reason."""
    make, reason = REFUSED[name]
    model, arguments = make()
    torch._dynamo.reset()
    told = focus_compile.explain(model, *arguments())
    script = told.save(tmp_path) / "graph0_refused.py"
    text = script.read_text()
    assert reason in text and told.refusals[0].cure in text
    torch._dynamo.reset()
    refusal = told.refusals[0]
    with pytest.raises(BackendCompilerFailed) as raised:
        runpy.run_path(str(script), run_name="__main__")
    assert f"Unsupported: {refusal.reason}" in str(raised.value) and refusal.op in str(raised.value)


@torch.no_grad()
def test_the_script_of_a_refusal_is_short(tmp_path: Path) -> None:
    """A refusal in layer 1 of six: what comes after is left out."""
    ids = torch.randint(0, 23, (3, 9))
    lines = []
    for layers in (3, 6):
        model = Toy(lambda x: x.cumsum(1), layers=layers).eval()
        torch._dynamo.reset()
        told = focus_compile.explain(model, ids)
        (refusal,) = told.refusals
        script = told.save(tmp_path / str(layers)) / "graph0_refused.py"
        text = script.read_text()
        assert refusal.reason in text
        lines.append(len(text.splitlines()))
    assert lines[0] == lines[1]
    made = run_python(script)  # in a process that has imported nothing
    assert made.returncode != 0 and f"Unsupported: {refusal.reason}" in made.stderr


def real_call() -> dict[str, Any]:
    """A call in which tokens are evicted."""
    ids = torch.randint(0, MASK, (2, 15), generator=torch.Generator().manual_seed(1))
    ids[:, 2:13] = MASK
    mask = torch.ones(2, 1, 15, 15, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def test_a_real_run() -> None:
    """Equality, counts, and the files of Inductor's output code; by default nothing is run."""
    model, arguments = qwen3("sdpa").eval(), real_call()
    told = focus_compile.explain(model, run=True, mask_token_id=MASK, **arguments)
    made = told.measured
    assert made is not None and made.equal
    assert made.evicting is not None and max(made.dense, made.nothing_evicted) <= 1e-4
    assert made.fed == 30 > made.retained >= made.retained_row > 0
    with torch.no_grad(), focus_compile.session(mask_token_id=MASK, **PAPER) as focus:
        torch._dynamo.reset()
        torch.compile(model, backend="focus")(**arguments)
    assert (focus.stats.fed, focus.stats.retained) == (made.fed, made.retained)
    for name, files in made.code.items():
        (path,) = files
        text = Path(path).read_text()
        assert ("focus.importance" in text) == (name == "prefix")
        assert ("focus.attend" in text) == (name != "dense")
    assert "equality" in str(told) and made.code["suffix"][0] in str(told)
    assert told.graphs[0].sizes == {"batch": 2, "token": 15}
    assert focus_compile.explain(model, **arguments).measured is None


@pytest.mark.usefixtures("no_inductor")
def test_a_real_run_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that changes numbers is told."""
    monkeypatch.setattr("focus_compile.reports.measure.focus_backend", wrong_backend)
    told = focus_compile.explain(qwen3("sdpa").eval(), run=True, mask_token_id=MASK, **real_call())
    made = told.measured
    assert made is not None and not made.equal
    assert made.nothing_evicted > 1 and made.dense < 1e-4


def test_a_real_run_needs_a_mask_token() -> None:
    with pytest.raises(ValueError, match="no mask token"):
        focus_compile.explain(qwen3("sdpa"), torch.zeros(2, 5, dtype=torch.int64), run=True)
    with pytest.raises(ValueError, match=r"mask_token_id=\.\.\.: the model is a function"):
        focus_compile.explain(lambda x: x, torch.zeros(2, 5), run=True)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a process logs, and its structured trace."""
    folder = tmp_path_factory.mktemp("trace")
    made = run_python("-c", TRACED, TORCH_LOGS="+focus_compile", TORCH_TRACE=str(folder))
    assert made.returncode == 0, made.stderr
    (log,) = folder.iterdir()
    return made.stderr, log


@pytest.mark.parametrize("shown", [True, False])
def test_logs(shown: bool, traced: tuple[str, Path]) -> None:
    """``TORCH_LOGS="+focus_compile"`` shows the passes and what they changed; else all is quiet."""
    told = traced[0]
    if not shown:
        made = run_python("-c", TRACED)
        assert made.returncode == 0, made.stderr
        told = made.stderr
    for text in ("canonical: ", "retain: ", "what the passes changed", "focus.importance"):
        assert (text in told) == shown
    assert "leaves this graph as it is" in told


def test_artifacts_in_a_trace(traced: tuple[str, Path], tmp_path: Path) -> None:
    """tlparse finds the graphs before and after, the plan, and the reason of a refusal."""
    log = traced[1]
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
