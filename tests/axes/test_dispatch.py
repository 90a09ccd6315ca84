"""Tokens sorted by expert: every way back to their own order works, and nothing else passes."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import focus_compile
from tests.support.dialects import DIALECTS, Dialect, Subject, draw_call
from tests.support.models.llada2 import Experts, LLaDA2, grouped_mm
from tests.system.test_dialects import TOLERANCE

Way = Callable[[Experts, Tensor, Tensor, Tensor], Tensor]


def listed(experts: Experts, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that the experts computed, in the order of the list; that order; counts."""
    ids, order = torch.sort(index.reshape(-1))
    counts = torch.histc(ids.float(), bins=len(experts.down), min=0, max=len(experts.down) - 1)
    return computed(experts, x[order // index.shape[-1]], counts), order, counts


def computed(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    gate, up = grouped_mm(rows, experts.gate_up.transpose(1, 2), ends).chunk(2, dim=-1)
    return grouped_mm(F.silu(gate) * up, experts.down.transpose(1, 2), ends)


def combined(out: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def order_of_the_order(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out, order, _ = listed(experts, x, index)
    return combined(out[order.argsort()], x, weights)


def rows_put_back(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out, order, _ = listed(experts, x, index)
    back = torch.empty_like(out)
    back[order] = out
    return combined(back, x, weights)


def rows_added_up(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out, order, _ = listed(experts, x, index)
    out = out * weights.reshape(-1)[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // index.shape[-1], out.to(x.dtype))


@pytest.mark.parametrize("way", [order_of_the_order, rows_put_back, rows_added_up])
def test_way_back(way: Way) -> None:
    subject = Subject(changed(way))
    evicted = 0
    for seed in range(6):
        draw = draw_call(subject.dialect, seed)
        with focus_compile.session(alpha=1.2):
            actual = subject.focus(draw)
        with focus_compile.session(alpha=1e9):
            whole = subject.focus(draw)
        torch.testing.assert_close(whole, subject.eager(draw), atol=TOLERANCE, rtol=TOLERANCE)
        evicted += int((actual == 0).all(-1).sum())
    assert evicted


def never_put_back(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out, _, _ = listed(experts, x, index)
    return combined(out, x, weights)


def in_another_order(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out, order, _ = listed(experts, x, index)
    return combined(out[order], x, weights)


def running_sum(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out, order, _ = listed(experts, x, index)
    return combined(out.cumsum(0)[order.argsort()], x, weights)


def normed_over_rows(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out, order, _ = listed(experts, x, index)
    return combined(out.softmax(0)[order.argsort()], x, weights)


def by_load(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out, order, counts = listed(experts, x, index)
    return combined(out[order.argsort()], x, weights) / counts.amax(0)


def counts_of_all(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Ends that are not known to be those of the list."""
    order = torch.sort(index.reshape(-1))[1]
    chosen = F.one_hot(index, len(experts.down)).sum((0, 1)).float()
    out = computed(experts, x[order // index.shape[-1]], chosen)
    return combined(out[order.argsort()], x, weights)


def ends_left_out(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Counts, not where they end: the rows of an expert depend on how many others there are."""
    ids, order = torch.sort(index.reshape(-1))
    counts = torch.histc(ids.float(), bins=len(experts.down), min=0, max=len(experts.down) - 1)
    rows = x[order // index.shape[-1]]
    out = grouped_mm(rows, experts.gate_up.transpose(1, 2), counts.int()).chunk(2, dim=-1)[0]
    return combined(torch.cat([out, out], -1)[..., : x.shape[-1]][order.argsort()], x, weights)


def summed_positions(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Running totals of positions are no positions."""
    out, order, _ = listed(experts, x, index)
    return combined(out[order.argsort().cumsum(0) % len(out)], x, weights)


def by_number(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Every row by its own number: packed rows have others."""
    numbers = torch.arange(x.shape[0])
    x = x * (numbers >= 0).unsqueeze(-1)
    return experts.dense(x[numbers], index, weights)


REFUSED = [
    (ends_left_out, "mixes tokens outside attention"),
    (summed_positions, "mixes tokens outside attention"),
    (by_number, "mixes tokens outside attention"),
    (never_put_back, "the token, batch or key axis meets another axis"),
    (in_another_order, "the token, batch or key axis meets another axis"),
    (running_sum, "this operator fails on other sizes"),
    (normed_over_rows, "mixes tokens outside attention"),
    (by_load, "the number of tokens per expert is used for something else"),
    (counts_of_all, "mixes tokens outside attention"),
]


@pytest.mark.parametrize(("way", "reason"), REFUSED)
def test_refused(way: Way, reason: str) -> None:
    subject = Subject(changed(way))
    with pytest.raises(BackendCompilerFailed, match=reason):
        subject.focus(draw_call(subject.dialect, 0))


def changed(way: Way) -> Dialect:
    """The dialect with another way of computing its experts."""

    def build() -> LLaDA2:
        model = LLaDA2(layers=3, way="sorted")
        for layer in model.layers[1:]:
            experts = layer.mlp.experts
            experts.ordered = types.MethodType(way, experts)
        return model

    plain = DIALECTS["llada2-sorted"]
    return Dialect(build, plain.arguments, plain.logits)
