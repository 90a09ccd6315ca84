"""Canonical form: one graph for every capture of a model, with sizes read off its inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from focus_compile.axes.propagate import label
from focus_compile.capture.canonical import Canonical, canonicalize
from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import graph_inputs
from focus_compile.graph.recompute import check_values
from tests.passes.reading import Subject, missing, snapshot
from tests.passes.tiny import GROUPS, LAYERS, SIZE, Symbolic, Values, call, captured, dense, model

CACHES = [f"past{layer}_{part}" for layer in range(LAYERS) for part in "kv"]
HISTORY: Symbolic = dict.fromkeys(CACHES, (2,))
EVERYTHING: Symbolic = {
    **dict.fromkeys(CACHES, (0, 2)),
    "ids": (0, 1),
    "mask": (0, 2, 3),
    "table": (0,),
    "style": (0,),
}


def text(made: Canonical) -> tuple[str, list[tuple[object, ...]]]:
    """All that programs are compiled from: the graph, and what its inputs are."""
    return made.gm.code, [(given.name, given.shape, given.strided) for given in made.inputs]


def test_lines(tiny: Subject) -> None:
    """Numbers become sizes of inputs; nothing else of the first layer changes."""
    before, after = tiny.lines(captured(call())), tiny.lines(tiny.canonical.gm)
    assert before[3] == "view = aten.view(linear, [4, 7, -1, 16])"
    assert after[3] == "view = aten.view(linear, [ids.size(0), ids.size(1), 6, 16])"
    kinds = [[line.split("(")[0] for line in lines] for lines in (before, after)]
    assert kinds[0] == kinds[1]
    changed = missing(after, before)
    assert any("size" in line for line in changed)


def test_what_inputs_are(tiny: Subject) -> None:
    shapes = {tiny.names[given.name]: given.shape for given in tiny.canonical.inputs}
    assert shapes["ids"] == ("batch", "token")
    assert shapes["mask"] == ("batch", 1, "token", ("history", "token"))
    assert shapes["style"][:2] == ("batch", 1)
    assert shapes["table"] == ("token", SIZE)
    assert {shapes[name] for name in CACHES} == {("batch", GROUPS, "history", SIZE)}
    strided = {tiny.names[given.name] for given in tiny.canonical.inputs if given.strided}
    assert strided == {*CACHES}


@pytest.mark.parametrize("symbolic", [HISTORY, EVERYTHING], ids=["history", "everything"])
def test_symbols_and_numbers_have_one_form(symbolic: Symbolic, shallow: Subject) -> None:
    gm = captured(call(layers=2), model, symbolic)
    sizes = [size for node in graph_inputs(gm) for size in node.meta["val"].shape]
    assert any(isinstance(size, torch.SymInt) for size in sizes)
    assert text(canonicalize(label(gm))) == text(shallow.canonical)


def test_other_sizes_and_a_strided_cache_have_one_form(shallow: Subject) -> None:
    values = call(batch=8, tokens=9, past=11, layers=2)
    for name in {*CACHES} & {*values}:
        values[name] = values[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert text(canonicalize(label(captured(values)))) == text(shallow.canonical)


@torch.no_grad()
def test_numbers_at_other_sizes(tiny: Subject) -> None:
    """One graph, captured at one size, computes all."""
    check_values(tiny.canonical.gm)
    for sizes in ((4, 7, 5), (8, 9, 11), (1, 2, 3), (5, 3, 0)):
        values = call(*sizes)
        out = tiny.run(tiny.canonical.gm, values)["output"]
        torch.testing.assert_close(out, model(values), atol=2e-5, rtol=1e-5)


def repeated(
    layer: int, query: Tensor, key: Tensor, value: Tensor, values: Values
) -> tuple[Tensor, Tensor, Tensor]:
    """Every layer makes the mask for itself, and copies its keys without need."""
    own = {**values, "mask": torch.logical_not(values["hidden"])}
    return dense(layer, query, torch.ops.aten.slice(key.to(key.dtype), 2), value, own)


def test_copies_are_dropped_and_repetitions_computed_once() -> None:
    values = call(layers=2)
    values["hidden"] = ~values.pop("mask")
    gm = captured(values, lambda given: model(given, repeated))
    before, after = gm.code, canonicalize(label(gm)).gm.code
    assert (before.count("aten.logical_not"), after.count("aten.logical_not")) == (2, 1)
    for copy in ("aten.to.dtype", "aten.slice.Tensor"):
        assert copy in before and copy not in after


def test_the_input_is_left_as_it_was(shallow: Subject) -> None:
    gm = captured(call(layers=2))
    before = snapshot(gm)
    made = canonicalize(label(gm))
    assert snapshot(gm) == before
    assert made.gm is not gm and made.gm.code == shallow.canonical.gm.code


def returns_a_size(gm: GraphModule) -> GraphModule:
    with gm.graph.inserting_before(gm.graph.output_node()):
        first = next(iter(gm.graph.nodes))
        size = gm.graph.call_function(torch.ops.aten.sym_size.int, (first, 1))
    size.meta["val"] = first.meta["val"].shape[1]
    gm.graph.output_node().args = ((size,),)
    return gm


def test_refused() -> None:
    with pytest.raises(Unsupported) as refusal:
        canonicalize(label(returns_a_size(captured(call(layers=2)))))
    assert str(refusal.value) == "the graph returns a size [op aten.sym_size.int]"
    assert refusal.value.cure
