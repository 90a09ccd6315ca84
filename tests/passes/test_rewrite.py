"""All passes: their order, that they leave their input alone, and that a false graph is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from focus_compile.graph.recompute import InvalidGraph, check_values
from focus_compile.graph.replay import Replay
from focus_compile.graph.sizes import GENERIC
from focus_compile.passes import PASSES, Pass, rewrite
from focus_compile.plan.plan import Plan
from tests.passes.reading import Subject, snapshot

ORDER = ["canonical", "score", "retain", "narrow", "restore"]


def test_every_pass_has_tests_of_its_own() -> None:
    for apply in PASSES:
        assert Path(__file__).with_name(f"test_{apply.__name__}.py").exists()


def test_the_graph_after_each_pass(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    made = rewrite(tiny.canonical.gm, tiny.plan)
    assert [name for name, _ in made] == ORDER[1:]
    for name, gm in made:
        check_values(gm)
        assert gm.code == stages[name].code


@pytest.mark.parametrize("apply", PASSES, ids=lambda apply: apply.__name__)
def test_a_pass_leaves_its_input_as_it_was(
    apply: Pass, tiny: Subject, stages: dict[str, GraphModule]
) -> None:
    given = stages[ORDER[ORDER.index(apply.__name__) - 1]]
    before = snapshot(given)
    made = apply(given, tiny.plan)
    assert snapshot(given) == before
    assert made is not given and made.code != given.code
    assert not {*made.graph.nodes} & {*given.graph.nodes}
    assert apply(given, tiny.plan).code == made.code


def shape(gm: GraphModule, plan: Plan) -> GraphModule:
    replay, nodes, outputs = Replay.copy(gm)
    nodes["importance1"].meta = {"val": nodes["importance1"].meta["val"][:, :-1]}
    return replay.finish(outputs)


def dtype(gm: GraphModule, plan: Plan) -> GraphModule:
    replay, nodes, outputs = Replay.copy(gm)
    nodes["importance0"].meta = {"val": nodes["importance0"].meta["val"].double()}
    return replay.finish(outputs)


def literal(gm: GraphModule, plan: Plan) -> GraphModule:
    replay, nodes, outputs = Replay.copy(gm)
    with replay.before(nodes["importance1"]):
        args = (nodes["importance0"], [GENERIC["batch"], -1])
        replay.call(torch.ops.aten.view.default, args)
    return replay.finish(outputs)


FALSE = {
    shape: r"after shape: %importance1 .* claims \(\(10007, 20010\).* computes \(\(10007, 20011\)",
    dtype: r"after dtype: %importance0 .* claims .*float64, .* computes .*float32",
    literal: r"after literal: a size became a constant: %view",
}


def passes(*chosen: Pass) -> tuple[Pass, ...]:
    """The passes, with others before the last."""
    *most, last = PASSES
    return (*most, *chosen, last)


@pytest.mark.parametrize("lie", FALSE, ids=lambda lie: lie.__name__)
def test_a_false_pass_is_named(
    lie: Pass, shallow: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the passes before it, nor the one after it, which carries on what it left."""
    monkeypatch.setitem(rewrite.__globals__, "PASSES", passes(lie))
    with pytest.raises(InvalidGraph, match=FALSE[lie]):
        rewrite(shallow.canonical.gm, shallow.plan)


def test_narrow_computes_every_value_anew(
    shallow: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is false before it is true after it, and the last graph is what counts."""
    expected = rewrite(shallow.canonical.gm, shallow.plan)[-1][1]
    score, *rest = PASSES
    monkeypatch.setitem(rewrite.__globals__, "PASSES", (score, shape, dtype, *rest))
    made = dict(rewrite(shallow.canonical.gm, shallow.plan))
    with pytest.raises(InvalidGraph):
        check_values(made["shape"])
    assert made["restore"].code == expected.code
