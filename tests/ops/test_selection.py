"""Target, selection and enforcement of batches against the reference's loops over one row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.ops.selection import enforce, retain, select, target
from focus_compile.ops.tables import last_position
from tests.reference import algorithm

TOKENS = 12
flags = st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS)
coarse = st.lists(st.integers(-3, 3), min_size=TOKENS, max_size=TOKENS)
"""Deltas with many ties; sums of such small numbers are exact in any order."""
budgets = st.tuples(st.floats(1, 40, width=32), st.floats(1, 4, width=32))


def on_threshold(values: list[float]) -> bool:
    """Whether rounding decides if some value reaches mean + std; ties in rank are exact."""
    if not values:
        return False
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return min(abs(value - mean - spread) for value in values) < 1e-5


def positions(keep_T: Tensor) -> list[int]:
    return keep_T.nonzero().flatten().tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), budgets), min_size=1, max_size=7), st.data())
def test_target(rows: list[tuple[int, tuple[float, float]]], data: st.DataObject) -> None:
    alpha = data.draw(st.floats(1, 1e9, width=32))
    counts = torch.tensor([count for count, _ in rows])
    averages = torch.tensor([budget[0] for _, budget in rows])
    actual = target(counts, averages, torch.tensor(alpha, dtype=torch.float32)).tolist()
    assert actual == [
        algorithm.target(count, float(average), alpha)
        for count, average in zip(counts.tolist(), averages.tolist(), strict=True)
    ]


@pytest.mark.parametrize("alpha", [1e9, 3e38, math.inf])
def test_a_huge_budget_keeps_everything(alpha: float) -> None:
    counts = torch.tensor([0, 1, 7, 100_000])
    average = torch.tensor([1.0, 40.0, 1.0, 7.0])
    assert torch.equal(target(counts, average, torch.tensor(alpha)), counts)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(coarse, flags, st.integers(1, TOKENS)), min_size=1, max_size=4))
def test_select(rows: list[tuple[list[int], list[bool], int]]) -> None:
    """Against the loop, wherever the row leaves a choice."""
    delta = torch.tensor([row[0] for row in rows], dtype=torch.float32)
    masked = torch.tensor([row[1] for row in rows])
    count = torch.tensor([row[2] for row in rows])
    actual = select(delta, masked, count)
    assert not (actual & ~masked).any()
    for row, (values, _, k) in enumerate(rows):
        listed = positions(masked[row])
        if len(listed) <= k:
            continue
        chosen = algorithm.select(torch.tensor([float(values[p]) for p in listed]), k)
        if on_threshold([values[p] for p in listed]):
            continue
        assert positions(actual[row]) == [listed[j] for j in chosen.indices]


@pytest.mark.parametrize(
    ("delta", "count", "kept"),
    [
        ([0.0, 0.0, 10.0, 10.0], 1, [2, 3]),  # mean + std is exactly 10: both pass
        ([5.0, 1.0, 5.0, 5.0], 2, [0, 2]),  # nobody passes with room to spare: leftmost of a tie
        ([1.0, 1.0, 1.0, 1.0], 3, [0, 1, 2, 3]),  # std 0: all pass
    ],
)
def test_ties(delta: list[float], count: int, kept: list[int]) -> None:
    masked = torch.ones(1, 4, dtype=torch.bool)
    assert positions(select(torch.tensor([delta]), masked, torch.tensor([count]))[0]) == kept


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(flags, flags, st.integers(-1, TOKENS)), min_size=1, max_size=4))
def test_enforce(rows: list[tuple[list[bool], list[bool], int]]) -> None:
    masked = torch.tensor([row[0] for row in rows])
    kept = torch.tensor([row[1] for row in rows]) & masked
    progress = torch.tensor([row[2] for row in rows])
    actual = enforce(kept, masked, progress)
    for row, (_, _, reached) in enumerate(rows):
        listed, chosen = positions(masked[row]), set(positions(kept[row]))
        assert positions(actual[row]) == algorithm.enforce(listed, chosen, reached)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(coarse, flags, flags, st.integers(-1, TOKENS)), min_size=1, max_size=4),
    budgets,
)
def test_retain(
    rows: list[tuple[list[int], list[bool], list[bool], int]], budget: tuple[float, float]
) -> None:
    """Sections 2-4 in one, for the tokens that are fed: all masked ones, and some decoded."""
    delta = torch.tensor([row[0] for row in rows], dtype=torch.float32)
    masked = torch.tensor([row[1] for row in rows])
    fed = masked | torch.tensor([row[2] for row in rows])
    progress = torch.tensor([row[3] for row in rows])
    average = torch.full((len(rows),), budget[0])
    actual = retain(delta, masked, fed, progress, average, torch.tensor(budget[1]))
    assert not (actual & ~fed).any()
    for row, (values, _, _, reached) in enumerate(rows):
        listed = positions(fed[row])
        if not listed:
            assert not actual[row].any()
            continue
        signal = torch.tensor([float(values[p]) for p in positions(masked[row])])
        expected = algorithm.evict(
            listed, masked[row, listed].tolist(), signal, budget[0], budget[1], reached
        )
        if on_threshold(signal.tolist()):
            continue
        assert positions(actual[row]) == expected.kept
        assert int(last_position(actual)[row]) == expected.rightmost


def test_nan_in_one_row_stays_there() -> None:
    """A row whose deltas are NaN is retained whole; its neighbours do not notice."""
    delta = torch.randn(3, TOKENS, generator=torch.Generator().manual_seed(1))
    masked = torch.ones(3, TOKENS, dtype=torch.bool)
    progress, average = torch.full((3,), TOKENS), torch.ones(3)
    alpha = torch.tensor(1.5)
    expected = retain(delta, masked, masked, progress, average, alpha)
    assert not expected.all(1).any()
    delta[1] = float("nan")
    actual = retain(delta, masked, masked, progress, average, alpha)
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert actual[1].all()


def test_nothing_masked_keeps_what_is_fed() -> None:
    masked = torch.zeros(2, TOKENS, dtype=torch.bool)
    fed = masked.clone()
    fed[0, 3:7] = True
    kept = retain(
        torch.zeros(2, TOKENS), masked, fed, torch.full((2,), -1), torch.ones(2), torch.tensor(1.5)
    )
    assert torch.equal(kept, fed)
    assert last_position(kept).tolist() == [6, -1]
