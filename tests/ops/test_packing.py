"""Packing against loops over rows and positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focus_compile.ops.packing import join, pack, pack_rows, repack, restore, store, unpack
from focus_compile.ops.tables import feed, tables

BATCH, TOKENS, HEADS, SIZE = 3, 7, 2, 5
LAYOUTS = [(0, 1), (0, 2), (1, 0), (2, 1), (1, 3)]
"""(batch dim, token dim) of a 4-D value."""

keeps = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 8).flatmap(
        lambda tokens: st.lists(
            st.lists(st.booleans(), min_size=tokens, max_size=tokens),
            min_size=batch,
            max_size=batch,
        )
    )
)


def example_keep() -> Tensor:
    """One row keeps nothing, one everything, one some."""
    keep = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    keep[1] = True
    keep[2, [0, 3, 4]] = True
    return keep


def cut_tables(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, inverse and rows as the programs get them: narrowed by the host."""
    tokens, inverse, rows, sizes = tables(keep)
    count, most = sizes.tolist()
    return tokens[:count], inverse, rows[:, :most]


def canvas(layout: tuple[int, int], seed: int = 0) -> Tensor:
    shape = [HEADS, SIZE]
    for dim, size in sorted(zip(layout, (BATCH, TOKENS), strict=True)):
        shape.insert(dim, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(x: Tensor, layout: tuple[int, int], pairs: list[tuple[int, int]]) -> list[Tensor]:
    """Values at (row, position) pairs."""
    batch_dim, token_dim = layout
    return [x.movedim((batch_dim, token_dim), (0, 1))[b, t] for b, t in pairs]


@settings(max_examples=150, deadline=None)
@given(keeps)
def test_tables_equal_loops(rows: list[list[bool]]) -> None:
    keep = torch.tensor(rows)
    pairs = [(b, t) for b, row in enumerate(rows) for t, kept in enumerate(row) if kept]
    tokens, inverse, places, sizes = tables(keep)
    length = len(rows[0])
    assert sizes.tolist() == [len(pairs), max(map(sum, rows))]
    assert tokens[: len(pairs)].tolist() == [b * length + t for b, t in pairs]
    expected = torch.zeros_like(inverse)
    for n, (b, t) in enumerate(pairs):
        expected[b, t] = n
    assert torch.equal(inverse, expected)
    for b, row in enumerate(rows):
        kept = [t for t, flag in enumerate(row) if flag]
        assert places[b].tolist() == kept + [0] * (length - len(kept))
    assert 0 <= int(tokens.min()) and int(tokens.max()) < keep.numel()


@settings(max_examples=100, deadline=None)
@given(keeps.filter(lambda rows: any(map(any, rows))))
def test_host_tables_are_the_same(rows: list[list[bool]]) -> None:
    keep = torch.tensor(rows)
    tokens, inverse, places = cut_tables(keep)
    made = feed(keep)
    for mine, other in ((made.fed, keep), (made.tokens, tokens), (made.inverse, inverse)):
        assert torch.equal(mine, other)
    assert torch.equal(made.rows, places)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_and_restore(layout: tuple[int, int]) -> None:
    keep, x = example_keep(), canvas(layout)
    tokens, inverse, _ = cut_tables(keep)
    packed = pack(x, tokens, inverse, *layout)
    batch_dim, token_dim = layout
    assert packed.shape[batch_dim] == 1 and packed.shape[token_dim] == int(keep.sum())
    pairs = [tuple(pair) for pair in keep.nonzero().tolist()]
    one_row = packed.select(batch_dim, 0).movedim(token_dim - (batch_dim < token_dim), 0)
    for n, expected in enumerate(rows_of(x, layout, pairs)):
        assert torch.equal(one_row[n], expected)

    back = restore(packed, tokens, keep, *layout)
    flags = torch.zeros_like(x, dtype=torch.bool)
    moved = flags.movedim(layout, (0, 1))
    moved[keep] = True
    assert torch.equal(back, torch.where(flags, x, 0.0))


def test_pack_what_rows_share_and_what_tokens_share() -> None:
    """A rotary table without a batch axis is gathered by position, one value per row by row."""
    keep = example_keep()
    tokens, inverse, _ = cut_tables(keep)
    pairs = keep.nonzero().tolist()
    table = torch.randn(1, TOKENS, SIZE)
    packed = pack(table, tokens, inverse, None, 1)
    assert torch.equal(packed, torch.stack([table[0, t] for _, t in pairs])[None])
    per_row = torch.randn(BATCH, 1, SIZE)
    packed = pack_rows(per_row, tokens, inverse, 0, 1)
    assert torch.equal(packed, torch.stack([per_row[b, 0] for b, _ in pairs])[None])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repack_is_packing_by_less(layout: tuple[int, int]) -> None:
    outer = example_keep()
    keep = outer.clone()
    keep[1, ::2] = False
    keep[2, 0] = False
    assert keep.any() and not torch.equal(keep, outer)
    x = canvas(layout)
    outer_tokens, outer_inverse, _ = cut_tables(outer)
    tokens, inverse, _ = cut_tables(keep)
    packed = pack(x, outer_tokens, outer_inverse, *layout)
    again = repack(packed, outer_inverse, tokens, layout[1])
    assert torch.equal(again, pack(x, tokens, inverse, *layout))


def test_unpack_to_rows() -> None:
    """One line per row, as long as the longest."""
    keep, x = example_keep(), canvas((0, 2))
    tokens, inverse, rows = cut_tables(keep)
    packed = pack(x, tokens, inverse, 0, 2)
    lines = unpack(packed, inverse.gather(1, rows), 0, 2)
    assert lines.shape == (BATCH, HEADS, int(keep.sum(1).max()), SIZE)
    for b in range(BATCH):
        for r, t in enumerate(keep[b].nonzero().flatten().tolist()):
            assert torch.equal(lines[b, :, r], x[b, :, t])


@pytest.mark.parametrize("history", [None, 0, 4])
def test_join(history: int | None) -> None:
    """New where kept, stale where written, zero elsewhere - also where the slot holds NaN."""
    keep, x = example_keep(), canvas((0, 2))
    written = torch.zeros_like(keep)
    written[:, 2:5] = True
    length = history or 0
    stale = torch.randn(BATCH, HEADS, length + TOKENS, SIZE)
    stale[:, :, length:].movedim((0, 2), (0, 1))[~written] = float("nan")
    tokens, inverse, _ = cut_tables(keep)
    new = pack(x, tokens, inverse, 0, 2)
    past = None if history is None else torch.randn(BATCH, HEADS, history, SIZE)
    before = stale.clone()
    joined = join(past, new, tokens, stale, written, torch.tensor(False), 2)
    assert torch.equal(stale.nan_to_num(0), before.nan_to_num(0))
    if past is not None:
        assert torch.equal(joined[:, :, :length], past)
    for b in range(BATCH):
        for t in range(TOKENS):
            now, old = x[b, :, t], stale[b, :, length + t]
            expected = now if keep[b, t] else old if written[b, t] else torch.zeros_like(old)
            assert torch.equal(joined[b, :, length + t], expected)
    # the next step, when nobody else needs what this one gave: only new rows are written
    more = keep & written
    again, more_inverse, _ = cut_tables(more)
    rows = pack(-x, again, more_inverse, 0, 2)
    copied = join(past, rows, again, joined, written | keep, torch.tensor(False), 2)
    assert not torch.equal(copied, joined)
    reused = join(past, rows, again, joined, written | keep, torch.tensor(True), 2)
    assert reused is joined and torch.equal(reused, copied)
    # the same where the slots are a part of a longer cache, of which nothing else is touched
    longer = torch.randn(BATCH, HEADS, length + TOKENS + 2, SIZE)
    slots, rest = longer.split([length + TOKENS, 2], 2)
    before = rest.clone()
    slots.copy_(join(past, new, tokens, stale, written, None, 2))
    stored = store(slots, rows, again, TOKENS, 2)
    assert stored is slots and torch.equal(stored, copied) and torch.equal(rest, before)


def test_join_of_keys_with_folded_heads() -> None:
    """``[B, S, G * D]``, as some models cache them: the same numbers."""
    keep, x = example_keep(), canvas((0, 2))
    written = ~keep
    stale, past = torch.randn(BATCH, HEADS, 4 + TOKENS, SIZE), torch.randn(BATCH, HEADS, 4, SIZE)
    tokens, inverse, _ = cut_tables(keep)
    new = pack(x, tokens, inverse, 0, 2)

    def fold(value: Tensor) -> Tensor:
        return value.transpose(1, 2).flatten(2)

    rest = (tokens, fold(stale), written, torch.tensor(False), 1)
    folded = join(fold(past), fold(new), *rest)
    expected = join(past, new, tokens, stale, written, torch.tensor(False), 2)
    assert torch.equal(folded, fold(expected))


def test_nan_in_one_row_stays_there() -> None:
    keep, x = example_keep(), canvas((0, 1))
    x[1] = float("nan")
    tokens, inverse, rows = cut_tables(keep)
    packed = pack(x, tokens, inverse, 0, 1)
    back = restore(packed, tokens, keep, 0, 1)
    assert back[1].isnan().all() and not back[[0, 2]].isnan().any()
    lines = unpack(packed, inverse.gather(1, rows), 0, 1)
    assert not lines[2, : int(keep[2].sum())].isnan().any()
