"""The ``focus::`` operators: what the passes put into graphs.

Each is one eager function, registered as a composite operator: a graph shows it as one readable
node, and AOTAutograd inlines it, so that Inductor fuses its parts with their neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from focus_compile.importance import importance
from focus_compile.packing import (
    merge,
    pack,
    pack_attention,
    pack_rows,
    repack,
    restore,
    tables,
    unpack,
)
from focus_compile.selection import last_position, retain

__all__ = ["focus", "hide", "signal", "site_index", "site_mask", "visible"]


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


def site_index(inverse: Tensor, rows: Tensor) -> Tensor:
    """Packed row of the r-th kept token of each row: ``[B, T]``, ``[B, R]`` -> ``[B, R]``."""
    return inverse.gather(1, rows)


def _keys(visible: Tensor, history: int) -> Tensor:
    """bool ``[B, T]`` -> ``[B, 1, 1, S + T]``: the whole history is visible."""
    past = visible.new_ones((visible.shape[0], history))
    return torch.cat([past, visible], dim=1)[:, None, None, :]


def site_mask(mask: Tensor | None, rows: Tensor, visible: Tensor, history: int) -> Tensor:
    """The mask of an attention site, restricted to its retained queries and visible slots.

    Args:
        mask: the model's own ``[B or 1, H or 1, T, S + T]``, bool (True: visible), additive, or
            None.
        rows: int64 ``[B, R]``; visible: bool ``[B, T]``; history: S, the keys before the block.

    Returns:
        ``[B, H or 1, R, S + T]``, of the kind of ``mask``; bool ``[B, 1, 1, S + T]`` without one.
    """
    slots = _keys(visible, history)
    if mask is None:
        return slots
    batch = rows.shape[0]
    if mask.shape[2] == 1:
        lines = mask
    elif mask.shape[0] == 1:
        lines = mask[0].movedim(1, 0)[rows].movedim(2, 1)
    else:
        row = torch.arange(batch, device=rows.device).unsqueeze(1)
        lines = mask.movedim(2, 1)[row, rows].movedim(2, 1)
    if mask.dtype == torch.bool:
        return lines & slots
    return lines.masked_fill(~slots, torch.finfo(mask.dtype).min)


def signal(importance0: Tensor, importance1: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """The ranking signal: ``weights[0] * importance0 + weights[1] * importance1 + bias``.

    FOCUS ranks by ``importance1 - importance0`` (weights -1 and 1, bias 0); other values serve
    ablations and the replay of recorded traces. fp32 ``[B, T]``, weights ``[2]``.
    """
    return weights[0] * importance0 + weights[1] * importance1 + bias


def hide(scores: Tensor, visible: Tensor, history: int) -> Tensor:
    """Scores ``[B, H, R, S + T]`` of a site without a mask, hidden slots at the minimum."""
    slots = _keys(visible, history)
    return scores.masked_fill(~slots, torch.finfo(scores.dtype).min)


_DIMS = "int? batch_dim, int token_dim"
_DEFINITIONS: dict[str, Callable[..., Any]] = {
    "importance(Tensor query, Tensor key, Tensor masked, float scale) -> Tensor": importance,
    "signal(Tensor importance0, Tensor importance1, Tensor weights, Tensor bias) -> Tensor": signal,
    "retain(Tensor delta, Tensor masked, Tensor fed, Tensor progress, Tensor average, "
    "Tensor alpha) -> Tensor": retain,
    "tables(Tensor keep) -> (Tensor, Tensor, Tensor, Tensor)": tables,
    f"pack(Tensor x, Tensor tokens, Tensor inverse, {_DIMS}) -> Tensor": pack,
    "pack_rows(Tensor x, Tensor tokens, Tensor inverse, int batch_dim, int token_dim) -> Tensor": (
        pack_rows
    ),
    "pack_attention(Tensor x, Tensor tokens, Tensor inverse, Tensor rows) -> Tensor": (
        pack_attention
    ),
    "repack(Tensor x, Tensor outer_inverse, Tensor tokens, int token_dim) -> Tensor": repack,
    f"unpack(Tensor x, Tensor index, {_DIMS}) -> Tensor": unpack,
    f"merge(Tensor x, Tensor inverse, Tensor keep, Tensor slots, Tensor written, {_DIMS}) "
    "-> Tensor": merge,
    f"restore(Tensor x, Tensor inverse, Tensor keep, {_DIMS}) -> Tensor": restore,
    "visible(Tensor written, Tensor stored, Tensor bound, Tensor prefix) -> Tensor": visible,
    "site_index(Tensor inverse, Tensor rows) -> Tensor": site_index,
    "site_mask(Tensor? mask, Tensor rows, Tensor visible, SymInt history) -> Tensor": site_mask,
    "hide(Tensor scores, Tensor visible, SymInt history) -> Tensor": hide,
}

_LIBRARY: Any = torch.library.Library("focus", "DEF")  # type: ignore[no-untyped-call]
for _schema, _function in _DEFINITIONS.items():
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.split("(")[0], _function, "CompositeImplicitAutograd")

focus = torch.ops.focus
