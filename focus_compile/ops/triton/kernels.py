"""Triton kernels for importance and selection: what runs on a GPU.

The specification is in :mod:`focus_compile.ops.importance`, :mod:`focus_compile.ops.selection` and
:mod:`focus_compile.ops.packing`; :mod:`focus_compile.ops.triton.operators` launches these. Nothing
is as large as a block squared, sums are taken in a fixed order, and no size is a constant but the
head's: blocks of any length are walked in tiles of ``BLOCK`` tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_columns", "attend_rows", "list_masked", "number_kept", "select"]


@triton.jit
def list_masked(masked, order, rank, count, tokens, BLOCK: tl.constexpr):
    """List the masked tokens of a row; one program per row.

    masked: bool ``[B, T]`` -> order int32 ``[B, T]``, positions, ascending, the first ``count``
    valid; rank int32 ``[B, T]``, place of a masked token in that list; count int32 ``[B]``.
    """
    row = tl.program_id(0).to(tl.int64)
    found = 0
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tokens
        is_masked = tl.load(masked + row * tokens + at, mask=inside, other=0).to(tl.int32)
        place = found + tl.cumsum(is_masked, 0) - is_masked
        tl.store(rank + row * tokens + at, place, mask=inside)
        tl.store(order + row * tokens + place, at, mask=is_masked != 0)
        found += tl.sum(is_masked, 0)
    tl.store(count + row, found)


@triton.jit
def _listed(order, first, number, BLOCK: tl.constexpr):
    """Positions of tokens ``first`` to ``first + BLOCK`` of a row's list, and which of them are."""
    index = first + tl.arange(0, BLOCK)
    there = (index >= 0) & (index < number)
    return tl.load(order + index, mask=there, other=0), there


@triton.jit
def _pooled(
    query, key, order, at, asks, first, number, scale, SIZE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest score of each listed key and of its neighbours in the list, ``[BLOCK, BLOCK]``.

    Keys are ``first`` to ``first + BLOCK`` of the list. Neighbours of those on the edge lie in
    another tile: the products are computed for the keys, and for both tiles one token beside them.
    -inf where there is no key.
    """
    index = first + tl.arange(0, BLOCK)
    pooled = tl.full([BLOCK, BLOCK], float("-inf"), tl.float32)
    for step in range(-1, 2):
        there = (index + step >= 0) & (index + step < number)
        keys = tl.load(order + index + step, mask=there, other=0)
        scores = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, SIZE, CHUNK):
            dim = start + tl.arange(0, CHUNK)
            in_q = asks[:, None] & (dim < SIZE)[None, :]
            in_k = there[None, :] & (dim < SIZE)[:, None]
            q = tl.load(query + at[:, None] * SIZE + dim[None, :], mask=in_q, other=0.0)
            k = tl.load(key + keys[None, :] * SIZE + dim[:, None], mask=in_k, other=0.0)
            scores = tl.dot(q, k, scores, input_precision="ieee")
        scores = tl.where(there[None, :], scores * tl.cast(scale, tl.float32), float("-inf"))
        pooled = tl.maximum(pooled, scores, propagate_nan=tl.PropagateNan.ALL)
    return tl.where((index < number)[None, :], pooled, float("-inf"))


@triton.jit
def attend_rows(
    query, key, order, count, highest, total, tokens, heads, groups, scale, SIZE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Softmax statistics of each masked query; one program per row, head and tile of queries.

    query ``[B, H, T, D]``, key ``[B, G, T, D]`` -> highest and total fp32 ``[B, H, T]``, by place
    in the list: the largest pooled score, and the sum of ``exp(score - highest)``.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.program_id(2) * BLOCK
    number = tl.load(count + row)
    if first < number:
        listed = order + row * tokens
        at, asks = _listed(listed, first, number, BLOCK)
        query += (row * heads + head) * tokens * SIZE
        key += (row * groups + head // (heads // groups)) * tokens * SIZE
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK], tl.float32)
        for start in range(0, number, BLOCK):
            pooled = _pooled(query, key, listed, at, asks, start, number, scale, SIZE, CHUNK, BLOCK)
            higher = tl.maximum(top, tl.max(pooled, 1))
            weights = tl.exp(pooled - higher[:, None])
            mass = mass * tl.exp(top - higher) + tl.sum(weights, 1)
            top = higher
        place = (row * heads + head) * tokens + first + tl.arange(0, BLOCK)
        tl.store(highest + place, top, mask=asks)
        tl.store(total + place, mass, mask=asks)


@triton.jit
def attend_columns(
    query, key, order, count, highest, total, columns, tokens, heads, groups, scale,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention that each masked key gets in one head; one program per row, head and tile of keys.

    As :func:`attend_rows`, whose statistics it takes -> columns fp32 ``[B, H, T]``, by place in the
    list; what lies behind the list is not written.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.program_id(2) * BLOCK
    number = tl.load(count + row)
    if first < number:
        listed = order + row * tokens
        query += (row * heads + head) * tokens * SIZE
        key += (row * groups + head // (heads // groups)) * tokens * SIZE
        line = (row * heads + head) * tokens
        column = tl.zeros([BLOCK], tl.float32)
        for start in range(0, number, BLOCK):
            at, asks = _listed(listed, start, number, BLOCK)
            pooled = _pooled(query, key, listed, at, asks, first, number, scale, SIZE, CHUNK, BLOCK)
            place = line + start + tl.arange(0, BLOCK)
            top = tl.load(highest + place, mask=asks, other=0.0)
            mass = tl.load(total + place, mask=asks, other=1.0)
            attention = tl.exp(pooled - top[:, None]) / mass[:, None]
            column += tl.sum(tl.where(asks[:, None], attention, 0.0), 0)
        index = first + tl.arange(0, BLOCK)
        tl.store(columns + line + index, column, mask=index < number)


@triton.jit
def _before(left, right, at_left, at_right):
    """Whether ``left`` comes before ``right`` in descending order, NaN first, ties leftmost."""
    nan_left, nan_right = left != left, right != right  # noqa: PLR0124
    larger = (left > right) | (nan_left & (nan_right == 0))
    equal = (left == right) | (nan_left & nan_right)
    return larger | (equal & (at_left < at_right))


@triton.jit
def _load(values, row, tokens, at, other):
    """``values[row, at]``, ``other`` outside of the row."""
    return tl.load(values + row * tokens + at, mask=(at >= 0) & (at < tokens), other=other)


@triton.jit
def _flags(values, row, tokens, at):
    """Likewise of bools, False outside."""
    return _load(values, row, tokens, at, 0) != 0


@triton.jit
def _ahead(delta, masked, row, tokens, value, at, OTHERS: tl.constexpr):
    """How many masked tokens of the row come before each of these, whose signals are ``value``."""
    ahead = tl.zeros_like(at)
    for start in range(0, tokens, OTHERS):
        there = start + tl.arange(0, OTHERS)
        rival = _load(delta, row, tokens, there, 0.0)
        wins = _before(rival[:, None], value[None, :], there[:, None], at[None, :])
        wins &= _flags(masked, row, tokens, there)[:, None]
        ahead += tl.sum(wins.to(tl.int32), 0)
    return ahead


@triton.jit
def select(
    importance0, importance1, weights, bias, masked, fed, progress, average, alpha,
    delta, chosen, retained, count, tokens, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Signal, target, selection and enforcement; one program per row.

    importance0, importance1, bias: fp32 ``[B, T]``; weights fp32 ``[2]``; masked, fed: bool
    ``[B, T]``; progress int64, average fp32 ``[B]``; alpha fp32 ``[]`` -> delta fp32 ``[B, T]``;
    retained bool ``[B, T]``; count int64 ``[B]``, how many are retained. ``chosen``, int8
    ``[B, T]``, is what the selection says before it is enforced.

    The row is walked five times; a barrier stands where a walk reads what another thread wrote.
    """
    row = tl.program_id(0).to(tl.int64)
    weight0, weight1 = tl.load(weights), tl.load(weights + 1)

    number, mean = 0, 0.0
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_masked = _flags(masked, row, tokens, at)
        value = weight0 * _load(importance0, row, tokens, at, 0.0)
        value += weight1 * _load(importance1, row, tokens, at, 0.0)
        value += _load(bias, row, tokens, at, 0.0)
        tl.store(delta + row * tokens + at, value, mask=at < tokens)
        number += tl.sum(is_masked.to(tl.int32), 0)
        mean += tl.sum(tl.where(is_masked, value, 0.0), 0)
    divisor = tl.maximum(number, 1).to(tl.float32)
    mean = tl.div_rn(mean, divisor)
    tl.debug_barrier()

    spread = 0.0
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        off = _load(delta, row, tokens, at, 0.0) - mean
        off = tl.where(_flags(masked, row, tokens, at), off, 0.0)
        spread += tl.sum(off * off, 0)
    threshold = mean + tl.sqrt_rn(tl.div_rn(spread, divisor))

    above = 0
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        passes = _flags(masked, row, tokens, at) & (_load(delta, row, tokens, at, 0.0) >= threshold)
        above += tl.sum(passes.to(tl.int32), 0)
    wanted = tl.ceil(tl.maximum(tl.load(average + row), 1.0) * tl.load(alpha))
    target = tl.minimum(tl.maximum(tl.minimum(wanted, 2.0**30).to(tl.int32), 1), number)

    last = -1
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_masked = _flags(masked, row, tokens, at)
        value = _load(delta, row, tokens, at, 0.0)
        ahead = _ahead(delta, masked, row, tokens, value, at, OTHERS)
        largest = (ahead < target) | (value != value)  # noqa: PLR0124
        keep = is_masked & tl.where(above >= target, value >= threshold, largest)
        tl.store(chosen + row * tokens + at, keep.to(tl.int8), mask=at < tokens)
        last = tl.maximum(last, tl.max(tl.where(keep, at, -1), 0))
    evicts = (target > 0) & (number > target)
    none = last < 0
    tl.debug_barrier()

    seen = tl.load(progress + row)
    kept = 0
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_masked = _flags(masked, row, tokens, at)
        keep = _flags(chosen, row, tokens, at) | _flags(chosen, row, tokens, at + 1)
        keep = keep | ((at > seen) & (at < last)) | none | (evicts == 0)
        keep = (keep & is_masked) | (_flags(fed, row, tokens, at) & (is_masked == 0))
        tl.store(retained + row * tokens + at, keep, mask=at < tokens)
        kept += tl.sum(keep.to(tl.int32), 0)
    tl.store(count + row, kept.to(tl.int64))


@triton.jit
def number_kept(keep, ends, order, inverse, places, tokens, rows, BLOCK: tl.constexpr):
    """Index tables of the kept tokens (``packing.tables``); one program per row.

    keep: bool ``[B, T]``; ends: int64 ``[B]``, kept tokens up to and with each row -> order int64
    ``[B * T]``; inverse, places int64 ``[B, T]``.
    """
    row = tl.program_id(0).to(tl.int64)
    total = tl.load(ends + rows - 1)
    end = tl.load(ends + row)
    before = tl.load(ends + row - 1, mask=row > 0, other=0)
    found = 0
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tokens
        keeps = _flags(keep, row, tokens, at)
        place = found + tl.cumsum(keeps.to(tl.int32), 0) - keeps.to(tl.int32)
        packed = before + place
        flat = row * tokens + at
        tl.store(inverse + flat, tl.where(keeps, packed, 0), mask=inside)
        tl.store(order + tl.where(keeps, packed, total + flat - packed), flat, mask=inside)
        line = tl.where(keeps, place, end - before + at - place)
        tl.store(places + row * tokens + line, tl.where(keeps, at, 0).to(tl.int64), mask=inside)
        found += tl.sum(keeps.to(tl.int32), 0)
