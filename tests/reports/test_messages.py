"""Every warning and error has its line in docs/messages.md, and a test that provokes it."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule
from typer.testing import CliRunner

import focus_compile
from focus_compile.analysis import Analysis
from focus_compile.cli import app
from focus_compile.errors import Unsupported, module_path
from focus_compile.graph.nodes import fake_mode_of
from focus_compile.graph.recompute import InvalidGraph, check_values
from focus_compile.graph.sizes import GENERIC
from focus_compile.ops.library import focus
from focus_compile.plan.plan import make_plan
from focus_compile.programs.program import SpecializedSize
from tests.support.harness import Run, Sizes, build_model, random_call
from tests.support.paths import ROOT

CHECKPOINT = str(ROOT / "examples" / "tiny_dllm" / "checkpoint")
LEAST, WINDOW = 13, 18


@pytest.fixture(scope="module")
def messages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("messages", ROOT / "docs" / "messages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_written_anew(messages: ModuleType) -> None:
    assert (ROOT / "docs" / "messages.md").read_text() == messages.text()


def test_every_message_is_explained(messages: ModuleType) -> None:
    """And the table has no entry that none of them needs."""
    told = [text for _, text in messages.sites()]
    assert len(told) > 50
    assert not [text for text in told if messages.part(text) is None]
    assert {messages.part(text) for text in told} == set(messages.MESSAGES)


def test_every_message_is_provoked(messages: ModuleType) -> None:
    """Some test holds 18 characters of it, or all of a shorter piece between what is filled in."""
    known = strings()
    missing = []
    for _, text in messages.sites():
        pieces = [piece.strip() for piece in text.replace("%s", "...").split("...")]
        least = min(LEAST, max(map(len, pieces)))
        parts = [
            piece[at : at + WINDOW]
            for piece in pieces
            if len(piece) >= least
            for at in range(max(1, len(piece) - WINDOW + 1))
        ]
        if not any(part in known for part in parts):
            missing.append(text)
    assert not missing


def strings() -> str:
    """All literals of the tests, a match's escapes taken away."""
    found = []
    for path in sorted(ROOT.glob("tests/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("\\", ""))
    return "\n".join(found)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate", "os:getcwd", "--prompt", "x"], "no tokenizer: os:getcwd is not a folder"),
        (["report", CHECKPOINT, "--fed", "0.1", "--retained", "0.5"], "is less than --retained"),
        (["report", CHECKPOINT, "--trace", __file__], " is no trace: "),
    ],
)
def test_command_line(words: list[str], told: str, tmp_path: Path) -> None:
    if words[0] == "report":
        words = [*words, "-o", str(tmp_path / "report.html")]
    made = CliRunner().invoke(app, words)
    assert made.exit_code == 2 and told in made.stderr and made.stderr.count("\n") == 1


def test_a_bias_of_another_shape() -> None:
    run = Run(build_model(Sizes(layers=3)))
    signal = focus_compile.Signal((-1.0, 1.0), torch.zeros(3, 8))
    told = r"the signal's bias has shape \(3, 8\): expected \(3, 9\)"
    with focus_compile.session(signal=signal), pytest.raises(ValueError, match=told):
        run.logits(random_call(3, run.model, 3, 9, 17))


def test_a_graph_without_fake_tensors() -> None:
    with pytest.raises(ValueError, match="the graph holds no fake tensor"):
        fake_mode_of(GraphModule(torch.nn.Module(), Graph()))


def test_a_size_that_a_compiler_makes_constant() -> None:
    """Prefix and suffix must serve every size: a compiler that asks for one is found out."""

    def asks(gm: GraphModule, inputs: Any) -> Any:
        for value in inputs:
            if isinstance(value, torch.Tensor):
                [int(size) for size in value.shape]
        return gm

    run = Run(build_model(Sizes(layers=3)))
    program = run.program_of(random_call(3, run.model, 3, 9, 17)).suffix
    program.inner = asks
    with pytest.raises(SpecializedSize, match="sizes became constants: "):
        program._compile()


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    model = build_model(Sizes(layers=3))
    call = random_call(3, model, 3, 9, 17)
    with torch.no_grad():
        (graph,) = focus_compile.explain(model, **call.kwargs(model)).graphs
    assert graph.analysis is not None
    return graph.analysis


def test_a_plan_checks_itself(analysis: Analysis) -> None:
    plan = analysis.plan
    first, second, third = plan.sites
    unpacked = {name: place for name, place in plan.packed.items() if name != second.query}
    late = {**plan.packed, second.query: plan.packed[third.query]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sites": (first,)}, "a plan that scores layer 1 needs its attention site"),
        ({"sites": (second, first)}, "attention sites are not in layer order"),
        ({"packed": unpacked}, f"attention of layer 1 reads {second.query}, not packed"),
        ({"packed": late}, "the cut lies after the queries of layer 1"),
    ]
    for changes, told in cases:
        with pytest.raises(Unsupported, match=f"^{told}$"):
            dataclasses.replace(plan, **changes)


def test_the_site_at_fault_is_named(analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first one, whichever it is."""
    out, query = analysis.plan.sites[2].out, analysis.plan.sites[2].query
    packed = {name: place for name, place in analysis.plan.packed.items() if name != query}
    monkeypatch.setattr("focus_compile.plan.plan.packed_values", lambda *_: packed)
    with pytest.raises(Unsupported, match=f"attention of layer 2 reads {query}, ") as refusal:
        make_plan(analysis.canonical)
    (node,) = (node for node in analysis.canonical.gm.graph.nodes if node.name == out)
    assert refusal.value.op == str(node.target)
    assert refusal.value.module == module_path(node) == "model.layers.2.self_attn"


def test_a_pass_that_is_wrong_is_found(analysis: Analysis) -> None:
    """A recorded shape that is not true; a size of the generic call as a literal."""
    gm = analysis.stages[-1][1]
    check_values(gm)
    wrong = copy.deepcopy(gm)
    delta = wrong.graph.find_nodes(op="call_function", target=focus.signal.default)[0]
    delta.meta["val"] = delta.meta["val"].transpose(0, 1)
    with pytest.raises(InvalidGraph, match=r"claims .* but computes "):
        check_values(wrong)
    baked = copy.deepcopy(gm)
    power = torch.ops.aten.pow.Tensor_Scalar
    norm = baked.graph.find_nodes(op="call_function", target=power)[0]
    norm.args = (norm.args[0], GENERIC["batch"])
    with pytest.raises(InvalidGraph, match="a size became a constant: "):
        check_values(baked)
