"""What every layer calls on a GPU: ``focus::join`` and ``focus::attend`` with few launches.

Importing this module gives both operators implementations for CUDA; elsewhere they stay what
:mod:`focus_compile.ops.library` makes them, which is also what these must equal bit by bit. A join
is one launch where it may write into its slots, else two; attention is that of PyTorch between two.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from focus_compile.ops.triton.moves import (
    fold_queries,
    join_history,
    join_rows,
    unfold_lines,
)

__all__ = ["COLUMNS", "ROWS", "launch_attend", "launch_join"]

ROWS, COLUMNS = 16, 128
"""Tokens and columns of a tile of :func:`~focus_compile.ops.triton.moves.join_history`."""


def launch_join(
    past: Tensor | None,
    new: Tensor,
    tokens: Tensor,
    stale: Tensor,
    written: Tensor,
    reuse: Tensor | None,
    token_dim: int,
) -> Tensor:
    """:func:`focus_compile.ops.packing.join`; ``reuse`` lies on the CPU."""
    length = written.shape[1]
    history = stale.shape[token_dim] - length
    copies = reuse is None or not reuse
    out = torch.empty_like(stale, memory_format=torch.contiguous_format) if copies else stale
    made = out.view(_shape(out, token_dim))
    batch, outer, every, inner = made.shape
    if copies:
        held = _lines(stale, token_dim)
        old = held if past is None else _lines(past, token_dim)
        grid = (batch * outer, -(-every // ROWS), -(-inner // COLUMNS))
        join_history[grid](
            old, held, written.contiguous(), out, history, length, outer, inner,
            *old.stride()[:3], *held.stride()[:3], ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    rows, columns = _lines(new, token_dim)[0], min(1024, _power(inner))
    join_rows[(len(tokens), outer, -(-inner // columns))](
        rows, tokens, made, history, length, inner, *rows.stride()[:2], *made.stride()[:3],
        COLUMNS=columns,
    )  # fmt: skip
    return out


def launch_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    index: Tensor,
    lines: Tensor,
    scale: float,
) -> Tensor:
    """:func:`focus_compile.ops.attention.attend`."""
    (batch, most), groups = index.shape, key.shape[1]
    packed = query[0] if query.stride(-1) == 1 else query[0].contiguous()
    heads, _, size = packed.shape
    share, columns = heads // groups, _power(size)
    folded = query.new_empty((batch, groups, share * most, size))
    fold_queries[(batch * most, heads)](
        packed, index.contiguous(), folded, most, heads, size, *packed.stride()[:2],
        COLUMNS=columns,
    )  # fmt: skip
    found = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    found = found if found.stride(-1) == 1 else found.contiguous()
    out = query.new_empty((1, lines.shape[0], heads, found.shape[-1]))
    unfold_lines[(lines.shape[0], heads)](
        found, lines.contiguous(), out, most, heads, share, found.shape[-1], *found.stride()[:3],
        COLUMNS=_power(found.shape[-1]),
    )  # fmt: skip
    return out


def _lines(x: Tensor, dim: int) -> Tensor:
    """A value in that shape, its last stride 1."""
    made = x.reshape(_shape(x, dim))
    return made if made.stride(-1) == 1 or made.shape[-1] == 1 else made.contiguous()


def _shape(x: Tensor, dim: int) -> tuple[int, int, int, int]:
    """``[B, O, L, I]``: what stands before and behind a dim as one dim each."""
    return x.shape[0], prod(x.shape[1:dim]), x.shape[dim], prod(x.shape[dim + 1 :])


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


_LIBRARY: Any = torch.library.Library("focus", "IMPL")  # type: ignore[no-untyped-call]
_LIBRARY.impl("join", launch_join, "CUDA")
_LIBRARY.impl("attend", launch_attend, "CUDA")
