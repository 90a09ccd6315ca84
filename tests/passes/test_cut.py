"""Cut: prefix and suffix, with the host's narrowing between them, are the FOCUS graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from focus_compile.errors import Unsupported
from focus_compile.passes import PASSES
from focus_compile.plan.domains import Domain
from focus_compile.programs.cut import cut
from focus_compile.programs.halves import Half, Halves, Returned
from tests.passes.reading import Subject, snapshot, subject
from tests.passes.step import RETAINED, controls, tables
from tests.passes.tiny import LAYERS, Values, call, model


@pytest.fixture(scope="module")
def halves(tiny: Subject, stages: dict[str, GraphModule]) -> Halves:
    return cut(stages["restore"], tiny.plan)


def run(half: Half, values: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        made = half.gm(*[values[name] for name in half.inputs])
    return dict(zip(half.outputs, made, strict=True))


def by_graph_name(tiny: Subject, values: Values) -> dict[str, Any]:
    called = {name: graph for graph, name in tiny.names.items()}
    return {called.get(name, name): value for name, value in values.items()}


def test_lines(tiny: Subject, stages: dict[str, GraphModule], halves: Halves) -> None:
    """Every line but those of the outputs stands in one half, in its order."""
    whole = tiny.lines(stages["restore"])
    prefix, suffix = tiny.lines(halves.prefix.gm), tiny.lines(halves.suffix.gm)
    first = [line for line in whole if line in prefix and line not in suffix]
    assert first[0].startswith("pack = focus.pack(ids, fed_tokens")
    assert any(line.startswith("retain_mask = ") for line in prefix)
    assert prefix[-1] == "sizes = getitem(tables, 3)"
    assert not any("tokens.size" in line.replace("fed_tokens", "") for line in prefix)
    assert suffix[-1] == "linear = aten.linear(add, head)"
    assert not any("importance" in line or "focus.retain" in line for line in suffix)
    assert len(prefix) + len(suffix) == len(whole) - 1
    assert whole[-1].startswith("restore = ")


def test_what_passes_from_prefix_to_suffix(tiny: Subject, halves: Halves) -> None:
    prefix, suffix = halves.prefix, halves.suffix
    live = [name for name in suffix.inputs if name in prefix.outputs]
    control = ["retain_mask", "order", "inverse", "places", "sizes", "delta"]
    assert list(prefix.outputs[:6]) == control == list(vars(halves.selection).values())
    assert {"inverse", "retain_mask", "joined1_k", "joined1_v"} < {*live}
    assert "tokens" in suffix.inputs and "rows" in suffix.inputs
    assert "tokens" not in prefix.inputs and "rows" not in prefix.inputs
    assert "masked" in prefix.inputs and "masked" not in suffix.inputs
    names = [tiny.names.get(name, name) for name in suffix.inputs]
    assert {"past1_k", "past2_k", "slots2_k"} < {*names}
    assert not {"past1_v", "slots1_k"} & {*names}


def test_what_is_returned(halves: Halves) -> None:
    logits, *cache = halves.own
    assert logits == halves.logits
    assert logits is not None
    assert logits.domain is Domain.RETAINED
    assert (logits.batch_dim, logits.token_dim, logits.last) == (0, 1, None)
    pairs = [(f"joined{layer}_k", f"joined{layer}_v") for layer in range(LAYERS)]
    assert cache == [Returned(name) for pair in pairs for name in pair]
    stored = {
        f"slots{layer}_{part}": f"joined{layer}_{part}" for layer in range(LAYERS) for part in "kv"
    }
    assert halves.slots == stored
    assert halves.vocabulary == (0,)


@pytest.mark.parametrize("prefix", [False, True])
def test_numbers(
    prefix: bool, tiny: Subject, stages: dict[str, GraphModule], halves: Halves
) -> None:
    """The halves, composed by the test, against the graph that they were cut from."""
    given = {**call(), **controls(prefix)}
    own, control, _ = tiny.run(stages["restore"], given)["output"]
    values = by_graph_name(tiny, given)
    del values["tokens"], values["rows"]  # the prefix decides
    values |= run(halves.prefix, values)
    for name, expected in zip(vars(halves.selection).values(), control, strict=True):
        assert torch.equal(values[name], expected)
    count, most = values["sizes"].tolist()
    values["tokens"], values["rows"] = values["order"][:count], values["places"][:, :most]
    tokens, _, rows = tables(RETAINED)
    assert torch.equal(values["tokens"], tokens) and torch.equal(values["rows"], rows)
    values |= run(halves.suffix, values)
    logits, *cache = halves.own
    assert logits is not None
    assert torch.equal(values[logits.name][0], own[0][RETAINED])
    assert own[0][RETAINED].abs().min() > 0
    for found, expected in zip(cache, own[1:], strict=True):
        assert found is not None
        assert torch.equal(values[found.name], expected)


def test_slots_that_the_model_does_not_return() -> None:
    """Keys and values of layers 0 and 1 are the prefix's all the same, later ones the suffix's."""
    changed = subject(call(), lambda values: model(values)[:1])
    gm = changed.canonical.gm
    for apply in PASSES:
        gm = apply(gm, changed.plan)
    made = cut(gm, changed.plan)
    assert len(made.own) == 1
    early, late = list(made.slots.values())[:4], list(made.slots.values())[4:]
    assert {*early} < {*made.prefix.outputs} and late and {*late} < {*made.suffix.outputs}


def test_last_tokens(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    made = cut(stages["restore"], tiny.plan, {0: 3})
    assert made.own[0] is not None and made.own[0].last == 3
    with pytest.raises(Unsupported) as refusal:
        cut(stages["restore"], tiny.plan, {1: 3})
    reason = "the model returns last tokens of a value that is not packed"
    assert str(refusal.value).startswith(f"{reason} [op focus.join.default")
    assert refusal.value.cure


def test_the_input_is_left_as_it_was(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    before = snapshot(stages["restore"])
    made = cut(stages["restore"], tiny.plan)
    assert snapshot(stages["restore"]) == before
    nodes = {*made.prefix.gm.graph.nodes, *made.suffix.gm.graph.nodes}
    assert not nodes & {*stages["restore"].graph.nodes}
