"""Importance of batches of rows against the reference's loop over one row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.ops.importance import importance
from focus_compile.ops.tables import compact, rank_of
from tests.reference import algorithm

BATCH, TOKENS, HEADS, GROUPS, SIZE = 3, 11, 6, 2, 5
TOLERANCE = 1e-5


def random_qk(
    seed: int, batch: int = BATCH, tokens: int = TOKENS, heads: int = HEADS, groups: int = GROUPS
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, heads, tokens, SIZE, generator=generator) * 2,
        torch.randn(batch, groups, tokens, SIZE, generator=generator) * 2,
    )


def looped(query_BHTD: Tensor, key_BGTD: Tensor, masked: Tensor, scale: float) -> Tensor:
    """Row by row through the reference."""
    out = torch.zeros(masked.shape)
    for row, flags in enumerate(masked):
        if flags.any():
            query = query_BHTD[row][:, flags].transpose(0, 1)
            key = key_BGTD[row][:, flags].transpose(0, 1)
            out[row, flags] = algorithm.importance(query, key, scale)
    return out


masks = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 9).flatmap(
        lambda tokens: st.lists(
            st.lists(st.booleans(), min_size=tokens, max_size=tokens),
            min_size=batch,
            max_size=batch,
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(masks, st.sampled_from([(6, 2), (4, 4), (5, 1)]), st.integers(0, 10**6))
def test_equals_the_loop(rows: list[list[bool]], heads: tuple[int, int], seed: int) -> None:
    masked = torch.tensor(rows)
    query, key = random_qk(seed, *masked.shape, *heads)
    actual = importance(query, key, masked, 0.3)
    torch.testing.assert_close(actual, looped(query, key, masked, 0.3), atol=TOLERANCE, rtol=0)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_rank_and_compact_equal_loops(rows: list[list[bool]]) -> None:
    keep = torch.tensor(rows)
    ranks, lists = rank_of(keep), compact(keep)
    for row, flags in enumerate(rows):
        kept = [position for position, flag in enumerate(flags) if flag]
        assert ranks[row].tolist() == [sum(flags[:p]) for p in range(len(flags))]
        assert lists[row].tolist() == kept + [0] * (len(flags) - len(kept))


@pytest.mark.parametrize("seed", range(5))
def test_a_row_sums_to_masked_tokens_times_heads(seed: int) -> None:
    query, key = random_qk(seed)
    masked = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(seed)) < 0.6
    counts = masked.sum(1).float()
    assert counts.max() > counts.min()
    out = importance(query, key, masked, 1.0)
    torch.testing.assert_close(out.sum(1), counts * HEADS, atol=TOLERANCE, rtol=0)
    assert (out[~masked] == 0).all() and (out[masked] > 0).all()


def test_one_two_and_all_tokens() -> None:
    """m = 1 gives H; m = 2 pools both keys to the same value, so both get H; m = T has no gap."""
    query, key = random_qk(7)
    masked = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    masked[0, 4] = masked[1, 2] = masked[1, 9] = True
    masked[2] = True
    out = importance(query, key, masked, 0.5)
    assert out[0, 4] == HEADS
    torch.testing.assert_close(out[1, [2, 9]], torch.full((2,), float(HEADS)))
    torch.testing.assert_close(out, looped(query, key, masked, 0.5), atol=TOLERANCE, rtol=0)


def test_what_is_not_masked_is_not_read() -> None:
    """NaN and infinity at decoded positions, or anywhere in another row, change no bit."""
    query, key = random_qk(8)
    masked = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(8)) < 0.5
    masked[:2, 0] = False
    assert 2 < masked[:2].sum() < 2 * TOKENS - 2
    expected = importance(query, key, masked, 0.5)
    spoiled = ~masked
    spoiled[2] = True
    query = query.masked_fill(spoiled[:, None, :, None], float("nan"))
    key = key.masked_fill(spoiled[:, None, :, None], float("inf"))
    actual = importance(query, key, masked, 0.5)
    assert torch.equal(actual[:2], expected[:2])


def test_half_precision_scores_are_fp32() -> None:
    query, key = (x.bfloat16() for x in random_qk(9))
    masked = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    actual = importance(query, key, masked, 0.5)
    assert actual.dtype == torch.float32
    expected = importance(query.float(), key.float(), masked, 0.5)
    assert torch.equal(actual, expected)


def test_pooling_spans_gaps_of_the_canvas() -> None:
    """Neighbours are neighbours among the masked tokens, however far apart they stand."""
    query, key = random_qk(10, batch=1, tokens=9)
    near = torch.tensor([[True] * 4 + [False] * 5])
    far = torch.tensor([[True, False, False, True, False, True, False, False, True]])
    spread_query, spread_key = query.clone(), key.clone()
    spread_query[:, :, far[0]], spread_key[:, :, far[0]] = query[:, :, :4], key[:, :, :4]
    one = importance(query, key, near, 0.5)[near]
    two = importance(spread_query, spread_key, far, 0.5)[far]
    torch.testing.assert_close(one, two, atol=TOLERANCE, rtol=0)
