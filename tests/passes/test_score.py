"""Score: the importance of masked tokens at the first two sites, and nothing else changes.

The pass refuses nothing: a site that it could not score is refused by the plan.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from focus_compile.graph.sharding import Group
from focus_compile.passes.score import score
from tests.passes.reading import Subject, missing, subject
from tests.passes.step import MASKED, controls
from tests.passes.tiny import PAST, SIZE, TOKENS, Values, call, dense, model
from tests.reference.algorithm import importance

Scored = list[tuple[Tensor, Tensor]]


def scored(values: Values) -> Scored:
    """Queries and keys of the block, of every layer."""
    seen: Scored = []

    def attend(layer: int, query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        seen.append((query, key))
        return dense(layer, query, key, *rest)

    model(values, attend)
    return seen


def by_rows(query: Tensor, key: Tensor) -> Tensor:
    """The reference of one row at a time, over its masked tokens alone; 0 elsewhere."""
    out = torch.zeros(MASKED.shape)
    for b, masked in enumerate(MASKED):
        if masked.any():
            q, k = (part[b].transpose(0, 1)[masked] for part in (query, key))
            out[b, masked] = importance(q, k, 1 / math.sqrt(SIZE))
    return out


def test_lines(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    before, after = (tiny.lines(stages[name]) for name in ("canonical", "score"))
    assert missing(after, before) == [
        "importance0 = focus.importance(mul, mul, masked, 0.25)",
        "importance1 = focus.importance(mul, mul, masked, 0.25)",
    ]
    assert not missing(before, after)
    sites = [index for index, line in enumerate(after) if "aten.scaled_dot" in line]
    assert [after[index - 1].split()[0] for index in sites] == ["importance0", "importance1", "cat"]
    assert tiny.inputs(stages["score"]) == [*tiny.inputs(stages["canonical"]), "masked"]
    assert tiny.outputs(stages["score"]) == tiny.outputs(stages["canonical"])


def test_numbers(tiny: Subject, stages: dict[str, GraphModule]) -> None:
    values = {**call(), **controls()}
    seen = tiny.run(stages["score"], values)
    expected = [by_rows(*pair) for pair in scored(values)[:2]]
    assert not torch.allclose(*expected)
    torch.testing.assert_close([seen["importance0"], seen["importance1"]], expected)
    assert not seen["importance0"][~MASKED].any()
    torch.testing.assert_close(seen["output"], model(values))


def rotated(
    layer: int, query: Tensor, key: Tensor, value: Tensor, values: Values
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys are changed after they were cached, by where they stand in history and block."""
    key = torch.cat([values[f"past{layer}_k"], key], 2)
    value = torch.cat([values[f"past{layer}_v"], value], 2)
    turned = key * values["places"]
    mask = values["mask"]
    out = F.scaled_dot_product_attention(query, turned, value, attn_mask=mask, enable_gqa=True)
    return out, key, value


def test_keys_that_are_changed_after_the_history_joined_them() -> None:
    """The block's part of what the site attends to is scored."""
    values = {**call(layers=2), "places": torch.randn(PAST + TOKENS, SIZE)}
    changed = subject(values, lambda given: model(given, rotated))
    before = changed.canonical.gm
    after = score(before, changed.plan)
    assert missing(changed.lines(after), changed.lines(before)) == [
        "block0_k = focus.block(mul, masked)",
        "importance0 = focus.importance(mul, block0_k, masked, 0.25)",
        "block1_k = focus.block(mul, masked)",
        "importance1 = focus.importance(mul, block1_k, masked, 0.25)",
    ]
    seen = changed.run(after, {**values, "masked": MASKED})
    (query, key), *_ = scored(values)
    expected = by_rows(query, key * values["places"][PAST:])
    torch.testing.assert_close(seen["importance0"], expected)
    assert not torch.allclose(expected, by_rows(query, key))


def test_ranks_that_share_out_heads(tiny: Subject) -> None:
    """Both importances are summed after the second site's, and only sums bear the names."""
    plan = dataclasses.replace(tiny.plan, heads=Group(2, "ranks"))
    before = tiny.canonical.gm
    assert missing(tiny.lines(score(before, plan)), tiny.lines(before)) == [
        "importance0_own = focus.importance(mul, mul, masked, 0.25)",
        "importance1_own = focus.importance(mul, mul, masked, 0.25)",
        "importances = focus.sum_ranks(importance0_own, importance1_own, 2, ranks)",
        "importance0 = getitem(importances, 0)",
        "importance1 = getitem(importances, 1)",
    ]
