"""focus-compile and its commands: text, JSON, exit codes, one line for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import focus_compile
from focus_compile.cli import app
from tests.support.checkpoints import save_first_layers
from tests.support.dialects import DIALECTS, draw_call, qwen3, sdar_moe
from tests.support.harness import MASK
from tests.support.paths import TINY
from tests.support.toy import Toy

CHECKPOINT = TINY / "checkpoint"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped model's first layers."""
    return str(save_first_layers(CHECKPOINT, tmp_path_factory.mktemp("small")))


def run(*words: str) -> Result:
    torch._dynamo.reset()
    return CliRunner().invoke(app, list(words))


def factory() -> nn.Module:
    return qwen3("sdpa")


def eager_factory() -> nn.Module:
    return qwen3("eager")


def canvas_factory() -> tuple[nn.Module, dict[str, Any]]:
    """A model without a cache, and a call of it."""
    dialect = DIALECTS["llada-canvas"]
    model = dialect.build()
    return model, dialect.arguments(model, draw_call(dialect, 1))


def moe_factory() -> nn.Module:
    return sdar_moe("grouped_mm")


def refused_factory() -> tuple[nn.Module, dict[str, Any]]:
    return Toy(lambda x: x.cumsum(1)), {"ids": torch.zeros(2, 7, dtype=torch.int64)}


def no_model() -> str:
    return "nothing"


def test_explain_a_folder(tmp_path: Path) -> None:
    """The checkpoint that is shipped: applied, with files, as the function says."""
    made = run("explain", str(CHECKPOINT), "--json", "--save", str(tmp_path / "story"))
    assert made.exit_code == 0, made.output
    data = json.loads(made.stdout)
    assert data["applied"] and len(data["graphs"][0]["analysis"]["sites"]) == 8
    assert json.loads((tmp_path / "story" / "explanation.json").read_text()) == data


@pytest.mark.parametrize("name", ["factory", "eager_factory", "canvas_factory", "moe_factory"])
def test_explain_a_function(name: str) -> None:
    made = run("explain", f"tests.commands.test_cli:{name}", "--block", "8", "--history", "0")
    assert made.exit_code == 0, made.output
    assert "attention sites" in made.output and "the cut: inside layer 1" in made.output


def test_a_module_of_the_working_folder(tmp_path: Path) -> None:
    """As installed, and run where the user's file is."""
    source = "from tests.commands.test_cli import factory as make"
    (tmp_path / "mine.py").write_text(source)
    made = subprocess.run(
        [Path(sys.executable).with_name("focus-compile"), "explain", "mine:make", "--json"],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKPOINT.parent.parent.parent)},
        capture_output=True,
        text=True,
    )
    assert json.loads(made.stdout)["applied"]


def test_cost() -> None:
    """The same numbers as the cost of the graph that explain has."""
    words = ["tests.commands.test_cli:factory", "--batch", "4", "--block", "8", "--history", "16"]
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
    assert "ratio of FLOPs:" in run("cost", *words).output
    deep = json.loads(run("cost", *words, "--layers", "28", "--json").stdout)
    assert deep["ratio"] > data["ratio"] and deep["dense"] > 7 * data["dense"]
    assert data["bytes"]["focus"] < data["bytes"]["dense"] < deep["bytes"]["dense"]


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("name", ["factory", "canvas_factory", "moe_factory"])
def test_verify(name: str) -> None:
    """Eager and FOCUS, evicting and not; fewer tokens retained than fed.

    Through Inductor it is tests/reports/test_explain.py's real run: the command is its report.
    """
    words = ["verify", f"tests.commands.test_cli:{name}", "--block", "9", "--history", "5"]
    made = run(*words, "--mask-token-id", str(MASK), "--json")
    assert made.exit_code == 0, made.output
    data = json.loads(made.stdout)
    assert data["equal"] and data["retained"] < data["fed"]
    assert max(data["nothing_evicted"], data["evicting"]) <= data["tolerance"]


@pytest.mark.usefixtures("no_inductor")
def test_verify_in_words(small: str) -> None:
    made = run("verify", small, "--block", "8")
    assert made.exit_code == 0, made.output
    assert "FOCUS with nothing evicted and eager: " in made.stdout
    assert made.stdout.splitlines()[-1].startswith("equal within ")


def test_what_is_refused_is_exit_code_1(tmp_path: Path) -> None:
    for words in (["explain"], ["verify", "--mask-token-id", "22"]):
        made = run(words[0], "tests.commands.test_cli:refused_factory", *words[1:])
        assert made.exit_code == 1
        assert "mixes tokens outside attention" in made.stdout and "what to do: " in made.stdout
    output = tmp_path / "page.html"
    made = run("report", "tests.commands.test_cli:refused_factory", "-o", str(output))
    assert made.exit_code == 1 and "mixes tokens outside attention" in output.read_text()


@pytest.mark.usefixtures("no_inductor")
def test_generate_and_report(small: str, tmp_path: Path) -> None:
    """Answers as the function gives them; the page shows the steps of the trace."""
    prompts = ["total:a3b4c5d6=", "total:a1b2c3d4e5="]
    trace, output = tmp_path / "trace.json", tmp_path / "report.html"
    words = [part for prompt in prompts for part in ("--prompt", prompt)]
    words += ["--max-new-tokens", "32", "--trace", str(trace), "--json"]
    dense = json.loads(run("generate", small, *words, "--dense").stdout)
    assert dense["retained_fraction"] == dense["fed_fraction"] == 1
    assert all(
        all(row) for step in json.loads(trace.read_text())["steps"] for row in step["retained"]
    )
    made = run("generate", small, *words)
    assert made.exit_code == 0, made.output
    data = json.loads(made.stdout)
    assert len(data["answers"]) == 2 and data["retained_fraction"] < data["fed_fraction"] <= 1
    steps = json.loads(trace.read_text())["steps"]
    assert len(steps) == data["forwards"]
    decoded = torch.tensor([step["decoded"] for step in steps])
    retained = torch.tensor([step["retained"] for step in steps])
    assert (decoded.sum(0) == 1).all() and (decoded <= retained).all()
    made = run("report", small, "-o", str(output), "--trace", str(trace))
    assert made.exit_code == 0, made.output
    text = output.read_text()
    assert 'id="heatmap"' in text and 'id="funnel"' in text


@pytest.mark.parametrize("text", ["no json", "[]", '{"block_length": 3, "rows": 1, "steps": [3]}'])
def test_a_bad_trace(text: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(text)
    words = ["-o", str(tmp_path / "r.html"), "--trace", str(trace), "--block", "8"]
    made = run("report", "tests.commands.test_cli:factory", *words)
    assert made.exit_code == 2 and len(made.stderr.strip().splitlines()) == 1


def test_no_mask_token() -> None:
    """Neither config nor family tells: one line."""
    made = run("verify", "tests.commands.test_cli:factory")
    assert made.exit_code == 2
    assert "no mask token" in made.stderr and "--mask-token-id" in made.stderr
    assert len(made.stderr.strip().splitlines()) == 1


def test_generate_needs_a_tokenizer() -> None:
    made = run("generate", "tests.commands.test_cli:factory", "--prompt", "x")
    assert made.exit_code == 2 and "no tokenizer" in made.stderr


def test_bench_is_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options go through; outside of a checkout one line says so."""
    made = subprocess.run(
        [Path(sys.executable).with_name("focus-compile"), "bench", "--help"],
        check=True,
        cwd=CHECKPOINT.parent.parent.parent,
        capture_output=True,
        text=True,
    )
    assert "Throughput of eager" in made.stdout
    seen: list[Any] = []

    def run_it(command: list[str], check: bool) -> Any:
        seen.append(command[1:])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr("focus_compile.cli.subprocess.run", run_it)
    assert run("bench", "--quick", "--threads", "1").exit_code == 3
    assert seen == [["-m", "benchmarks.throughput", "--quick", "--threads", "1"]]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    made = run("bench")
    assert made.exit_code == 2 and "no benchmarks here: run" in made.stderr


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("no/such/folder", "no such folder: no/such/folder"),
        (str(Path(__file__).parent), "is not a model: it has no config.json"),
        ("tests.commands.test_cli:nowhere", "has no attribute 'nowhere'"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("tests.commands.test_cli:no_model", "returned a str, not a torch.nn.Module"),
    ],
)
def test_bad_input(path: str, told: str) -> None:
    """One line, exit code 2."""
    for command in ("explain", "cost", "verify", "report"):
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
