"""focus-compile explain and cost: text, JSON, exit codes, one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import focus_compile
from focus_compile.cli import app
from tests.dialects import qwen3

CHECKPOINT = Path(__file__).resolve().parent.parent / "examples" / "tiny_dllm" / "checkpoint"


def run(*words: str) -> Result:
    torch._dynamo.reset()
    return CliRunner().invoke(app, list(words))


def factory() -> nn.Module:
    return qwen3("sdpa")


def eager_factory() -> nn.Module:
    return qwen3("eager")


def no_model() -> str:
    return "nothing"


def test_explain_a_folder(tmp_path: Path) -> None:
    """The checkpoint that is shipped: applied, with files, as the function says."""
    made = run("explain", str(CHECKPOINT), "--json", "--save", str(tmp_path / "story"))
    assert made.exit_code == 0, made.output
    data = json.loads(made.stdout)
    assert data["applied"] and len(data["graphs"][0]["analysis"]["sites"]) == 8
    assert json.loads((tmp_path / "story" / "explanation.json").read_text()) == data


@pytest.mark.parametrize("name", ["factory", "eager_factory"])
def test_explain_a_function(name: str) -> None:
    made = run("explain", f"tests.test_cli:{name}", "--block", "8", "--history", "0")
    assert made.exit_code == 0, made.output
    assert "attention sites" in made.output and "the cut: inside layer 1" in made.output


def test_cost() -> None:
    """The same numbers as the cost of the graph that explain has."""
    words = ["tests.test_cli:factory", "--batch", "4", "--block", "8", "--history", "16"]
    made = run("cost", *words, "--fed", "0.5", "--retained", "0.25", "--json")
    assert made.exit_code == 0, made.output
    data = json.loads(made.stdout)
    assert (data["fed"], data["retained"]) == (16, 8)
    model = factory().eval()
    torch._dynamo.reset()
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    (graph,) = focus_compile.explain(
        model, input_ids=torch.zeros(2, 8, dtype=torch.int64), attention_mask=mask
    ).graphs
    assert graph.cost is not None
    dense, focus = graph.cost.flops(4, 8, 0, 16, 8)
    bare = json.loads(
        run("cost", *words[:-1], "0", "--fed", "0.5", "--retained", "0.25", "--json").stdout
    )
    assert (bare["dense"], bare["focus"]) == (dense, focus)
    assert data["dense"] > dense and data["ratio"] == data["dense"] / data["focus"]
    assert "ratio:" in run("cost", *words).output


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("no/such/folder", "no such folder: no/such/folder"),
        (str(Path(__file__).parent), "is not a model: it has no config.json"),
        ("tests.test_cli:nowhere", "has no attribute 'nowhere'"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("tests.test_cli:no_model", "returned a str, not a torch.nn.Module"),
    ],
)
def test_bad_input(path: str, told: str) -> None:
    """One line, exit code 2."""
    for command in ("explain", "cost"):
        made = run(command, path)
        assert made.exit_code == 2
        assert told in made.stderr and len(made.stderr.strip().splitlines()) == 1
        assert not made.stdout


def test_a_model_that_needs_remote_code(tmp_path: Path) -> None:
    """A folder whose config names a class of its own files."""
    config = {"model_type": "sdar", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = run("explain", str(tmp_path))
    assert made.exit_code == 2
    assert len(made.stderr.strip().splitlines()) == 1 and "sdar" in made.stderr
