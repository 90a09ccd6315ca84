"""Attention of packed queries: what stands at an attention site after the passes.

Queries are the kept tokens of every row, packed; keys and values are the history and all slots of
the block, per row; slots that hold nothing, or that the visibility rule hides, are masked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from focus_compile.selection import last_position

__all__ = ["attend", "site_mask", "visible"]


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


def site_mask(mask: Tensor | None, rows: Tensor, visible: Tensor, history: int) -> Tensor:
    """The mask of an attention site, restricted to its retained queries and visible slots.

    Args:
        mask: the model's own ``[B or 1, H or 1, T, S + T]``, bool (True: visible), additive, or
            None.
        rows: int64 ``[B, R]``; visible: bool ``[B, T]``; history: S, the keys before the block.

    Returns:
        ``[B, H or 1, R, S + T]``, of the kind of ``mask``; bool ``[B, 1, R, S + T]`` without one.
    """
    batch, most = rows.shape
    past = visible.new_ones((batch, history))
    slots = torch.cat([past, visible], dim=1)[:, None, None, :]
    if mask is None:
        return slots.expand(-1, -1, most, -1).contiguous()
    if mask.shape[2] == 1:
        lines = mask.expand(batch, -1, most, -1)
    elif mask.shape[0] == 1:
        lines = mask[0].movedim(1, 0)[rows].movedim(2, 1)
    else:
        row = torch.arange(batch, device=rows.device).unsqueeze(1)
        lines = mask.movedim(2, 1)[row, rows].movedim(2, 1)
    if mask.dtype == torch.bool:
        return (lines & slots).contiguous()
    return lines.masked_fill(~slots, torch.finfo(mask.dtype).min).contiguous()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    index: Tensor,
    tokens: Tensor,
    inverse: Tensor,
    rows: Tensor,
    scale: float,
) -> Tensor:
    """Attention of the kept tokens of every row.

    Query heads that share a key head are folded into the query axis, so that keys and values are
    read as they are stored: no grouped head is ever expanded.

    Args:
        query: packed ``[1, H, N', D]``; key, value: ``[B, G, S + T, D]``, G divides H, query head h
            reads key head ``h // (H / G)``.
        mask: ``[B, H or 1, R, S + T]``, bool (True: visible) or additive.
        index: int64 ``[B, R]``, packed row in ``query`` of each row's r-th kept token; entries
            beyond a row's kept tokens may name any row: nobody reads what they give.
        tokens, inverse, rows: tables of the kept tokens (:func:`focus_compile.packing.tables`).
        scale: of the scores.

    Returns:
        packed ``[1, N, H, D]``: as the output projection reads it.
    """
    heads, groups = query.shape[1], key.shape[1]
    batch, most = rows.shape
    share = heads // groups
    lines = query[0].transpose(0, 1)[index]  # [B, R, H, D]
    lines = lines.view(batch, most, groups, share, -1).permute(0, 2, 3, 1, 4)
    folded = lines.reshape(batch, groups, share * most, -1)
    if mask.shape[1] != 1:
        mask = mask.reshape(batch, groups, share * most, -1)
    elif share > 1:
        mask = mask.unsqueeze(2).expand(-1, -1, share, -1, -1).flatten(2, 3)
    if mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    out = out.view(batch, groups, share, most, -1).permute(0, 3, 1, 2, 4)  # [B, R, G, H / G, D]
    row = tokens // inverse.shape[1]
    flat = inverse.reshape(-1)
    # a token's rank among its row's kept ones: its packed row minus that of the row's first
    rank = flat[tokens] - flat[row * inverse.shape[1] + rows[:, 0][row]]
    return out[row, rank].reshape(1, tokens.shape[0], heads, -1)
