"""Attention of packed queries: what stands at an attention site after the passes.

Queries are the kept tokens of every row, packed; keys and values are the history and all slots of
the block, per row; slots that hold nothing, or that the visibility rule hides, are masked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from focus_compile.ops.tables import last_position

__all__ = ["attend", "block", "causal", "line_index", "site_index", "site_mask", "visible"]


def site_index(inverse: Tensor, rows: Tensor) -> Tensor:
    """Packed row of the r-th kept token of each row: ``[B, T]``, ``[B, R]`` -> ``[B, R]``."""
    return inverse.gather(1, rows)


def block(key: Tensor, masked: Tensor) -> Tensor:
    """The block's part of the keys of history and block, ``[B, G, S + T, D]``."""
    length = masked.shape[1]
    return key.narrow(2, key.shape[2] - length, length)


def visible(written: Tensor, stored: Tensor, bound: Tensor, prefix: Tensor) -> Tensor:
    """Block slots that a query may see in one layer (docs/algorithm.md section 5.4).

    Args:
        written, stored, bound: bool ``[B, T]``: slots filled in earlier steps of this block, slots
            filled now, tokens whose rightmost one bounds ``visibility="prefix"``.
        prefix: bool scalar, whether that bound holds.

    Returns:
        bool ``[B, T]``.
    """
    index = torch.arange(written.shape[1], device=written.device)
    inside = index.unsqueeze(0) <= last_position(bound).unsqueeze(1)
    return (written | stored) & (inside | ~prefix)


def site_mask(
    mask: Tensor | None,
    rows: Tensor,
    visible: Tensor,
    history: int,
    share: int,
    dtype: torch.dtype,
) -> Tensor:
    """The mask of an attention site, restricted to its retained queries and visible slots.

    Args:
        mask: the model's own ``[B or 1, H or 1, T, S + T]``, bool (True: visible), additive, or
            None.
        rows: int64 ``[B, R]``; visible: bool ``[B, T]``; history: S, the keys before the block.
        share: query heads that read one key head; dtype: of the queries.

    Returns:
        additive ``[B, H / share or 1, share * R, S + T]`` of ``dtype``: for queries whose heads
        are folded as :func:`attend` folds them.
    """
    batch, most = rows.shape
    past = visible.new_ones((batch, history))
    slots = torch.cat([past, visible], dim=1)[:, None, None, :]
    if mask is None:
        lines = slots.expand(-1, -1, most, -1)
    elif mask.shape[2] == 1:
        lines = mask.expand(batch, -1, most, -1)
    elif mask.shape[0] == 1:
        lines = mask[0].movedim(1, 0)[rows].movedim(2, 1)
    else:
        row = torch.arange(batch, device=rows.device).unsqueeze(1)
        lines = mask.movedim(2, 1)[row, rows].movedim(2, 1)
    if lines.dtype == torch.bool:
        nothing = torch.zeros((), dtype=dtype, device=rows.device)
        lines = torch.where(lines & slots, nothing, -torch.inf)
    else:
        lines = lines.masked_fill(~slots, torch.finfo(lines.dtype).min).to(dtype)
    if lines.shape[1] == 1:
        lines = lines.unsqueeze(2).expand(-1, -1, share, -1, -1)
    return lines.reshape(batch, -1, share * most, history + visible.shape[1])


def causal(masked: Tensor, key: Tensor) -> Tensor:
    """The mask that ``is_causal`` stands for: query i sees keys j <= i, from the top left.

    masked: ``[B, T]``; key: ``[B, G, S + T, D]``. Returns bool ``[1, 1, T, S + T]``.
    """
    query = torch.arange(masked.shape[1], device=key.device).unsqueeze(1)
    return (torch.arange(key.shape[2], device=key.device) <= query).view(1, 1, *query.shape[:1], -1)


def line_index(tokens: Tensor, inverse: Tensor, rows: Tensor) -> Tensor:
    """Where each kept token stands in the lines ``[B, R]`` of all rows, flattened: int64 ``[N]``.

    tokens, inverse, rows: tables of the kept tokens (:func:`focus_compile.ops.tables.tables`).
    """
    row = tokens // inverse.shape[1]
    flat = inverse.reshape(-1)
    # a token's rank among its row's kept ones: its packed row minus that of the row's first
    rank = flat[tokens] - flat[row * inverse.shape[1] + rows[:, 0][row]]
    return row * rows.shape[1] + rank


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    index: Tensor,
    lines: Tensor,
    scale: float,
) -> Tensor:
    """Attention of the kept tokens of every row.

    Query heads that share a key head are folded into the query axis, so that keys and values are
    read as they are stored: no grouped head is ever expanded.

    Args:
        query: packed ``[1, H, N', D]``; key, value: ``[B, G, S + T, D]``, G divides H, query head h
            reads key head ``h // (H / G)``.
        mask: additive ``[B, G or 1, H / G * R, S + T]``, from :func:`site_mask`; more columns are
            not read.
        index: int64 ``[B, R]``, packed row in ``query`` of each row's r-th kept token; entries
            beyond a row's kept tokens may name any row: nobody reads what they give.
        lines: int64 ``[N]``, from :func:`line_index`: the way back. scale: of the scores.

    Returns:
        packed ``[1, N, H, D]``: as the output projection reads it.
    """
    heads, groups = query.shape[1], key.shape[1]
    batch, most = index.shape
    share = heads // groups
    flat = query[0].transpose(0, 1).reshape(query.shape[2], -1)
    folded = flat.index_select(0, index.reshape(-1)).view(batch, most, groups, share, -1)
    folded = folded.permute(0, 2, 3, 1, 4).reshape(batch, groups, share * most, -1)
    mask = mask.narrow(3, 0, key.shape[2])
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    out = out.view(batch, groups, share, most, -1).permute(0, 3, 1, 2, 4)
    out = out.reshape(batch * most, -1).index_select(0, lines)
    return out.view(1, lines.shape[0], heads, -1)
