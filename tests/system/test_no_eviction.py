"""With a budget that evicts nothing, FOCUS computes what eager computes.

Everything still happens: importance, selection, packing, the merge with (empty) slots, restoring.
An inner compiler that compiles nothing makes the grid fast; test_inductor.py has Inductor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

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
BATCHES = (3, 8, 1)
HISTORIES = (17, 33, 0, None)
"""Cached tokens; None: no cache. Without one the length of the canvas varies instead."""
CANVASES = (TOKENS, TOKENS + 17, TOKENS + 33)
MASKS = {
    "sdpa": ("bool", "float", "bool shared", "float shared", None),
    "eager": ("float", "float shared", None),
}
"""Eager attention adds its mask to the scores: a bool mask is not valid there."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """What is compiled for: a model, a kind of mask and a kind of sizes."""

    attention: str
    mask: str | None
    dynamic: bool | None = True
    dtype: str = "fp32"


@functools.cache
def compiled(setup: Setup) -> Run:
    """A model whose captures are shared by the cases of this module."""
    model = build_model(Sizes(layers=3), setup.attention, DTYPES[setup.dtype])
    return Run(model, {"alpha": 1e9}, dynamic=setup.dynamic)


def check(setup: Setup, batch: int, tokens: int, history: int | None) -> None:
    run = compiled(setup)
    call = random_call(batch + tokens, run.model, batch, tokens, history, setup.mask)
    logits, expected = run.logits(call), eager_logits(run.model, call)
    assert retained(logits).all()
    assert (logits - expected).abs().max().item() <= bound(expected)


def lengths(history: int | None) -> tuple[int, ...]:
    return CANVASES if history is None else (TOKENS,)


GRID = [
    pytest.param(Setup(attention, mask), batch, history, id=f"{attention}-{mask}-{batch}-{history}")
    for attention, masks in MASKS.items()
    for mask in masks
    for batch in BATCHES
    for history in HISTORIES
    if mask in ("bool", "float") or (batch, history) in ((3, 17), (3, None))
]


@pytest.mark.parametrize(("setup", "batch", "history"), GRID)
def test_logits_are_eager(setup: Setup, batch: int, history: int | None) -> None:
    for tokens in lengths(history):
        check(setup, batch, tokens, history)


@pytest.mark.parametrize(("batch", "history"), [(3, 17), (3, 33), (8, 33), (8, None), (1, 33)])
@pytest.mark.parametrize("attention", MASKS)
def test_sizes_that_become_dynamic(attention: str, history: int | None, batch: int) -> None:
    """Dynamo's default: static at first, symbolic where a size has changed."""
    for tokens in lengths(history):
        check(Setup(attention, "float", dynamic=None), batch, tokens, history)


@pytest.mark.parametrize(("batch", "history"), [(3, 17), (1, 0), (8, None)])
@pytest.mark.parametrize("attention", MASKS)
def test_static_sizes(attention: str, history: int | None, batch: int) -> None:
    check(Setup(attention, "float", dynamic=False), batch, TOKENS, history)


@pytest.mark.parametrize("history", [17, None])
@pytest.mark.parametrize("attention", MASKS)
def test_half_precision(attention: str, history: int | None) -> None:
    """bf16 is at most 1.25 times as far from fp32 as eager bf16 is."""
    run = compiled(Setup(attention, "float", dtype="bf16"))
    wide = build_model(Sizes(layers=3), attention)
    with torch.no_grad():
        for target, source in zip(wide.parameters(), run.model.parameters(), strict=True):
            target.copy_(source)
    for seed in range(5):
        call = random_call(seed, wide, 3, TOKENS, history, "float")
        narrow = call.to(torch.bfloat16)
        exact = eager_logits(wide, narrow.to(torch.float32))
        expected = (eager_logits(run.model, narrow).float() - exact).norm().item()
        actual = run.logits(narrow).float()
        assert retained(actual).all()
        assert 0 < (actual - exact).norm().item() <= 1.25 * expected
