"""Positions that the model counts itself: an arange in the graph, after the history."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from tests.reference.system import standalone_batch
from tests.support.harness import (
    Run,
    Sizes,
    bound,
    build_model,
    eager_logits,
    random_call,
    retained,
)

TOKENS = 9


@functools.cache
def compiled(dynamic: bool | None) -> Run:
    return Run(build_model(Sizes(layers=3)), dynamic=dynamic)


@pytest.mark.parametrize("history", [17, 33, 0, None])
@pytest.mark.parametrize("dynamic", [True, False, None])
def test_nothing_evicted(dynamic: bool | None, history: int | None) -> None:
    run = compiled(dynamic)
    run.configure(alpha=1e9)
    call = random_call(1, run.model, 3, TOKENS, history)
    logits = run.logits(dataclasses.replace(call, positions=None))
    expected = eager_logits(run.model, call)
    assert (logits - expected).abs().max().item() <= bound(expected)


@pytest.mark.parametrize("history", [17, 5])
@pytest.mark.parametrize("dynamic", [True, None])
def test_with_eviction(dynamic: bool | None, history: int) -> None:
    run = compiled(dynamic)
    run.configure(alpha=1.5)
    call = random_call(2, run.model, 4, TOKENS, history, masked=torch.ones(4, TOKENS) > 0)
    logits = run.logits(dataclasses.replace(call, positions=None))
    positions, visible = call.positions, call.visible
    assert positions is not None and visible is not None
    expected = standalone_batch(run.model, call.ids, call.masked, call.past, positions, visible)
    masks = torch.tensor([step.retain_mask for step in expected])
    assert torch.equal(retained(logits), masks) and not masks.all()
    for row, step in enumerate(expected):
        assert (logits[row][masks[row]] - step.logits).abs().max().item() <= 1e-4
