"""Triton kernels that move rows: the join of history and block, queries to lines and back.

One launch each, where the eager functions of :mod:`focus_compile.ops.packing` and
:mod:`focus_compile.ops.attention` take several. Values are copied bit by bit; whatever is not
copied is not read. Strides are in elements; the innermost one is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["fold_queries", "join_history", "join_rows", "unfold_lines"]


@triton.jit
def join_history(
    past, stale, written, out, history, length, outer, inner, past_b, past_o, past_t, stale_b,
    stale_o, stale_t, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """History and block as they were: ``past``, then ``stale`` where written, else 0.

    past: ``[B, O, S, I]``; stale: ``[B, O, S + T, I]``, only its block is read; written: bool
    ``[B, T]`` -> out ``[B, O, S + T, I]``, contiguous. S is ``history``, T ``length``, O ``outer``,
    I ``inner``. One program per row and outer index, tile of tokens, tile of columns.
    """
    line = tl.program_id(0).to(tl.int64)
    row, which = line // outer, line % outer
    at = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < inner)[None, :]
    old, block = at < history, (at >= history) & (at < history + length)
    holds = tl.load(written + row * length + at - history, mask=block, other=0) != 0
    from_past = row * past_b + which * past_o + at[:, None] * past_t + column[None, :]
    from_stale = row * stale_b + which * stale_o + at[:, None] * stale_t + column[None, :]
    kept = tl.load(past + from_past, mask=old[:, None] & inside, other=0.0)
    held = tl.load(stale + from_stale, mask=(block & holds)[:, None] & inside, other=0.0)
    to = (line * (history + length) + at[:, None]) * inner + column[None, :]
    there = (old | block)[:, None] & inside
    tl.store(out + to, tl.where(old[:, None], kept, held), mask=there)


@triton.jit
def join_rows(
    new, tokens, out, history, length, inner, new_o, new_n, out_b, out_o, out_t,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Packed rows to their places in the block; one program per row, outer index, tile of columns.

    new: ``[O, N, I]``; tokens: int64 ``[N]``, flat places on the canvas ``[B, T]`` -> out
    ``[B, O, S + T, I]``.
    """
    n, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < inner
    token = tl.load(tokens + n)
    row, at = token // length, history + token % length
    value = tl.load(new + which * new_o + n * new_n + column, mask=inside, other=0.0)
    tl.store(out + row * out_b + which * out_o + at * out_t + column, value, mask=inside)


@triton.jit
def fold_queries(query, index, out, most, heads, size, query_h, query_n, COLUMNS: tl.constexpr):
    """Packed queries to one line per row, heads that share a key head below one another.

    query: ``[H, N, D]``; index: int64 ``[B, R]`` -> out ``[B, H / share, share * R, D]``,
    contiguous. R is ``most``. One program per line of a row, and head.
    """
    line, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, place = line // most, line % most
    column = tl.arange(0, COLUMNS)
    inside = column < size
    n = tl.load(index + line)
    value = tl.load(query + head * query_h + n * query_n + column, mask=inside, other=0.0)
    to = ((row * heads + head) * most + place) * size  # head = group * share + one of its heads
    tl.store(out + to + column, value, mask=inside)


@triton.jit
def unfold_lines(
    lines, index, out, most, heads, share, size, line_b, line_g, line_r, COLUMNS: tl.constexpr
):
    """What :func:`fold_queries` folded, packed again.

    lines: ``[B, H / share, share * R, D]``; index: int64 ``[N]``, line of each token among those
    of all rows -> out ``[N, H, D]``, contiguous. One program per token, and head.
    """
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < size
    line = tl.load(index + n)
    row, place = line // most, line % most
    source = row * line_b + (head // share) * line_g + ((head % share) * most + place) * line_r
    value = tl.load(lines + source + column, mask=inside, other=0.0)
    tl.store(out + (n * heads + head) * size + column, value, mask=inside)
