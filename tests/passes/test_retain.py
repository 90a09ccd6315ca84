"""Retain: signal, selection and index tables between the cut and layer 1's attention.

The pass refuses nothing. What it selects is worked by hand in :mod:`tests.passes.step`.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from tests.passes.reading import Subject, missing
from tests.passes.step import DELTA, MASKED, RETAINED, controls, tables
from tests.passes.tiny import call, model


def test_lines(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    before, after = (tiny.lines(stages[name]) for name in ("score", "retain"))
    added = [
        "delta = focus.signal(importance0, importance1, signal_weights, signal_bias)",
        "retain_mask = focus.retain(delta, masked, fed, progress, average, alpha)",
        "tables = focus.tables(retain_mask)",
        "order = getitem(tables, 0)",
        "inverse = getitem(tables, 1)",
        "places = getitem(tables, 2)",
        "sizes = getitem(tables, 3)",
    ]
    assert missing(after, before) == added
    assert not missing(before, after)
    first = after.index(added[0])
    assert after[first : first + len(added)] == added
    assert after[first - 1].startswith("importance1 = ")
    assert "dot_product" in after[first + len(added)]


def test_inputs_and_outputs(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    assert missing(tiny.inputs(stages["retain"]), tiny.inputs(stages["score"])) == [
        "fed", "progress", "average", "alpha", "signal_weights", "signal_bias",
    ]  # fmt: skip
    own = tiny.outputs(stages["score"])
    control = "[retain_mask, order, inverse, places, sizes, delta]"
    assert tiny.outputs(stages["retain"]) == f"[{own}, {control}]"


def test_numbers(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    """What is retained, by hand, and where it stands; the model's own outputs stay dense."""
    values = {**call(), **controls()}
    own, control = tiny.run(stages["retain"], values)["output"]
    mask, order, inverse, places, sizes, delta = control
    assert torch.equal(delta, DELTA) and torch.equal(mask, RETAINED)
    assert not RETAINED[MASKED].all()
    tokens, where, rows = tables(RETAINED)
    assert sizes.tolist() == [len(tokens), rows.shape[1]]
    assert torch.equal(order[: len(tokens)], tokens)
    assert torch.equal(inverse, where)
    assert torch.equal(places[:, : rows.shape[1]], rows)
    torch.testing.assert_close(own, model(values))


def test_the_signal_weighs_both_importances(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    """Layer 1 minus layer 0, as FOCUS ranks; and what else the inputs say."""
    values = {**call(), **controls()}
    seen = tiny.run(stages["score"], values)
    first, second = seen["importance0"], seen["importance1"]
    zero = torch.zeros_like(DELTA)
    for weights, bias, expected in (
        ([-1.0, 1.0], zero, second - first),
        ([0.5, 2.0], DELTA, 0.5 * first + 2 * second + DELTA),
    ):
        changed = {"signal_weights": torch.tensor(weights), "signal_bias": bias}
        delta = tiny.run(stages["retain"], {**values, **changed})["delta"]
        torch.testing.assert_close(delta, expected)
        assert delta[MASKED].std() > 0.01
