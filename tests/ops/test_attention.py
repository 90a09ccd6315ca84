"""Attention of packed queries, its masks and visible slots, against loops over single tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from focus_compile.ops.attention import attend, line_index, site_mask, visible
from focus_compile.ops.packing import pack
from focus_compile.ops.tables import tables

BATCH, TOKENS, HISTORY, GROUPS, SIZE, VALUE_SIZE = 3, 7, 4, 2, 5, 6
KEYS = HISTORY + TOKENS


def flags(seed: int, share: float) -> Tensor:
    return torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(seed)) < share


def model_mask(kind: str | None, heads: int, seed: int) -> Tensor | None:
    """A mask as models pass it: every query sees at least its own slot."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    shape = [BATCH, 1, TOKENS, KEYS]
    if "shared" in kind:
        shape[0] = 1
    if "heads" in kind:
        shape[1] = heads
    seen = torch.rand(shape, generator=generator) < 0.8
    seen |= torch.eye(TOKENS, KEYS, dtype=torch.bool).roll(HISTORY, 1)
    if "line" in kind:
        seen = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool)
        seen[0, ..., :2] = False
    if kind.startswith("bool"):
        return seen
    bias = torch.randn(seen.shape, generator=generator)
    return bias.masked_fill(~seen, torch.finfo(torch.float32).min)


def one_token(
    query_D: Tensor, key_SD: Tensor, value_SD: Tensor, bias_S: Tensor, scale: float
) -> Tensor:
    weights = [
        math.exp(float(scale * query_D @ k + b)) for k, b in zip(key_SD, bias_S, strict=True)
    ]
    total = sum(weights)
    return sum(w / total * v for w, v in zip(weights, value_SD, strict=True))  # type: ignore


KINDS = [None, "bool", "bool shared", "bool heads", "bool line", "float", "float shared heads"]


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_attend_equals_loops(kind: str | None, share: int) -> None:
    generator = torch.Generator().manual_seed(share)
    heads, scale = GROUPS * share, 0.3
    fed, keep = flags(1, 0.8), flags(1, 0.8) & flags(2, 0.5)
    assert 0 < int(keep.sum()) < int(fed.sum()) < BATCH * TOKENS
    assert len(set(keep.sum(1).tolist())) > 1  # some rows are padded
    seen = flags(3, 0.6) | keep
    query = torch.randn(BATCH, heads, TOKENS, SIZE, generator=generator)
    key = torch.randn(BATCH, GROUPS, KEYS, SIZE, generator=generator)
    value = torch.randn(BATCH, GROUPS, KEYS, VALUE_SIZE, generator=generator)
    mask = model_mask(kind, heads, 5)

    order, inverse, places, sizes = tables(keep)
    count, most = sizes.tolist()
    tokens, rows = order[:count], places[:, :most]
    fed_order, fed_inverse, _, fed_sizes = tables(fed)
    packed = pack(query, fed_order[: int(fed_sizes[0])], fed_inverse, 0, 2)
    line = site_mask(mask, rows, seen, HISTORY, share, query.dtype)
    out = attend(
        packed,
        key,
        value,
        line,
        fed_inverse.gather(1, rows),
        line_index(tokens, inverse, rows),
        scale,
    )
    assert out.shape == (1, count, heads, VALUE_SIZE)
    for n, (b, t) in enumerate(keep.nonzero().tolist()):
        for h in range(heads):
            bias = torch.zeros(KEYS)
            if mask is not None:
                given = mask.expand(BATCH, heads, TOKENS, KEYS)[b, h, t]
                bias = torch.where(given, 0.0, -math.inf) if given.dtype == torch.bool else given
            bias = bias.clone()
            bias[HISTORY:][~seen[b]] = -math.inf
            expected = one_token(
                query[b, h, t], key[b, h // share], value[b, h // share], bias, scale
            )
            assert torch.allclose(out[0, n, h], expected, atol=1e-5)


def test_a_row_that_keeps_nothing() -> None:
    """Its lines are padding that nobody reads, and the other rows do not notice."""
    keep = flags(1, 0.7)
    keep[1] = False
    order, inverse, places, sizes = tables(keep)
    count, most = sizes.tolist()
    tokens, rows = order[:count], places[:, :most]
    key = torch.randn(BATCH, GROUPS, KEYS, SIZE)
    query = torch.randn(1, GROUPS, count, SIZE)
    seen = torch.ones_like(keep)
    line = site_mask(None, rows, seen, HISTORY, 1, query.dtype)
    index, lines = inverse.gather(1, rows), line_index(tokens, inverse, rows)
    expected = attend(query, key, key, line, index, lines, 1.0)
    key[1] = math.nan
    actual = attend(query, key, key, line, index, lines, 1.0)
    assert torch.equal(actual, expected) and not actual.isnan().any()


@pytest.mark.parametrize("prefix", [False, True])
def test_visible_equals_loops(prefix: bool) -> None:
    written, stored, bound = flags(1, 0.5), flags(2, 0.5), flags(3, 0.3)
    bound[0] = False
    actual = visible(written, stored, bound, torch.tensor(prefix))
    for b in range(BATCH):
        last = max((t for t in range(TOKENS) if bound[b, t]), default=-1)
        for t in range(TOKENS):
            holds = bool(written[b, t]) or bool(stored[b, t])
            assert bool(actual[b, t]) == (holds and (not prefix or t <= last))
