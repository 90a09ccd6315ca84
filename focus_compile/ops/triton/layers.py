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
from torch.library import triton_op
from torch.nn.functional import scaled_dot_product_attention

from focus_compile.ops.library import focus
from focus_compile.ops.triton.moves import (
    fold_queries,
    join_history,
    join_rows,
    unfold_lines,
)
from focus_compile.torch_private import launchable

__all__ = ["COLUMNS", "ROWS", "launch_attend", "launch_join", "launch_store", "store"]

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
    if copies:
        batch, outer, every, inner = _shape(out, token_dim)
        held = _lines(stale, token_dim)
        old = held if past is None else _lines(past, token_dim)
        grid = (batch * outer, -(-every // ROWS), -(-inner // COLUMNS))
        join_history[grid](
            old, held, written.contiguous(), out, history, length, outer, inner,
            *old.stride()[:3], *held.stride()[:3], ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    _write(join_rows, out, new, tokens, length, token_dim)
    return out


def launch_store(slots: Tensor, new: Tensor, tokens: Tensor, length: int, token_dim: int) -> None:
    """:func:`focus_compile.ops.packing.store`, in a way that a compiler sees into."""
    _write(launchable(join_rows), slots, new, tokens, length, token_dim)


@triton_op("focus_fused::store", mutates_args={"slots"})
def store(slots: Tensor, new: Tensor, tokens: Tensor, length: int, token_dim: int) -> None:
    """``focus::store``, declared: slots ``[B, G, S + T, D]`` <- new packed ``[1, G, N, D]``."""
    if slots.device.type == "cuda":
        launch_store(slots, new, tokens, length, token_dim)
    else:
        focus.store(slots, new, tokens, length, token_dim)


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
    mask = mask.narrow(3, 0, key.shape[2])
    found = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    found = found if found.stride(-1) == 1 else found.contiguous()
    out = query.new_empty((1, lines.shape[0], heads, found.shape[-1]))
    unfold_lines[(lines.shape[0], heads)](
        found, lines.contiguous(), out, most, heads, share, found.shape[-1], *found.stride()[:3],
        COLUMNS=_power(found.shape[-1]),
    )  # fmt: skip
    return out


def _write(
    kernel: Any, slots: Tensor, new: Tensor, tokens: Tensor, length: int, token_dim: int
) -> None:
    """Packed rows into the block's part of slots; ``kernel``: :func:`.moves.join_rows`."""
    rows = _lines(new, token_dim)[0]
    shape = _shape(slots, token_dim)
    _, outer, every, inner = shape
    steps, columns = slots.view(shape).stride(), min(1024, _power(inner))
    kernel[(tokens.shape[0], outer, -(-inner // columns))](
        rows, tokens, slots, every - length, length, inner, *rows.stride()[:2], *steps[:3],
        COLUMNS=columns,
    )  # fmt: skip


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
