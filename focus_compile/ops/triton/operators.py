"""Importance and selection on a GPU, as operators that a compiler sees into.

``focus_fused::importance`` and ``focus_fused::choose`` launch the kernels of
:mod:`focus_compile.ops.triton.kernels`; on another device they call the operators of
:mod:`focus_compile.ops.library`, which specify them. :mod:`focus_compile.programs.lower` puts them
into the prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from focus_compile.ops.library import focus
from focus_compile.ops.triton.kernels import (
    attend_columns,
    attend_rows,
    list_masked,
    number_kept,
    select,
)
from focus_compile.torch_private import launchable

__all__ = ["ROW", "SELECT", "choose", "importance", "launch_choose", "launch_importance", "tile"]

ROW = {"BLOCK": 256}
"""Tokens of a row that a program looks at at once."""
SELECT = {**ROW, "OTHERS": 16}
"""Likewise, and how many others each of these is compared with at once, to rank it."""


def tile(size: int) -> dict[str, int]:
    """Scores are computed in tiles of 32 queries and 32 keys, ``size`` dims of a head by chunks.

    Chunks as large as need next to no registers spilled (``tests/fused``).
    """
    chunk = 32 if size > 64 or size <= 32 else 64
    return {"SIZE": size, "CHUNK": chunk, "BLOCK": 32}


def launch_importance(query_BHTD: Tensor, key_BGTD: Tensor, masked: Tensor, scale: float) -> Tensor:
    """:func:`focus_compile.ops.importance.importance` by three kernels.

    Scores are computed twice, for the statistics of queries and for the sums over columns: the
    largest tensor is ``[B, H, T]``. fp16 and bf16 products are exact and summed in fp32, fp32 ones
    are not rounded to TF32. The sum over heads is PyTorch's.
    """
    batch, heads, tokens, size = query_BHTD.shape
    groups = key_BGTD.shape[1]
    query, key, masked = query_BHTD.contiguous(), key_BGTD.contiguous(), masked.contiguous()
    order = torch.empty((batch, tokens), dtype=torch.int32, device=masked.device)
    rank, count = torch.empty_like(order), order.new_empty((batch,))
    launchable(list_masked)[(batch,)](masked, order, rank, count, tokens, **ROW)
    top = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    mass, columns = torch.empty_like(top), torch.empty_like(top)
    tiles = tile(size)
    grid = (batch, heads, (tokens + tiles["BLOCK"] - 1) // tiles["BLOCK"])
    given = (query, key, order, count, top, mass)
    sizes = (tokens, heads, groups, scale)
    launchable(attend_rows)[grid](*given, *sizes, **tiles)
    launchable(attend_columns)[grid](*given, columns, *sizes, **tiles)
    return torch.where(masked, columns.sum(1).gather(1, rank.long()), 0.0)


def launch_choose(
    importance0: Tensor, importance1: Tensor, weights: Tensor, bias: Tensor, masked: Tensor,
    fed: Tensor, progress: Tensor, average: Tensor, alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``focus::signal``, ``focus::retain`` and ``focus::tables`` by two kernels.

    Returns:
        delta fp32 ``[B, T]``, retain mask bool ``[B, T]``, and the four of
        :func:`focus_compile.ops.tables.tables`.
    """
    batch, tokens = masked.shape
    lines = [value.contiguous() for value in (importance0, importance1, bias, masked, fed)]
    importance0, importance1, bias, masked, fed = lines
    delta, retained = torch.empty_like(importance0), torch.empty_like(masked)
    chosen = torch.empty_like(masked, dtype=torch.int8)
    count = progress.new_empty((batch,))
    launchable(select)[(batch,)](
        importance0, importance1, weights, bias, masked, fed, progress, average, alpha,
        delta, chosen, retained, count, tokens, **SELECT,
    )  # fmt: skip
    ends = count.cumsum(0)
    order = progress.new_empty((batch * tokens,))
    inverse = progress.new_empty((batch, tokens))
    places = torch.empty_like(inverse)
    launchable(number_kept)[(batch,)](retained, ends, order, inverse, places, tokens, batch, **ROW)
    return delta, retained, order, inverse, places, torch.stack([ends[-1], count.amax()])


@triton_op("focus_fused::importance", mutates_args={})
def importance(query: Tensor, key: Tensor, masked: Tensor, scale: float) -> Tensor:
    """``focus::importance``: ``[B, H, T, D]``, ``[B, G, T, D]``, bool ``[B, T]`` -> ``[B, T]``."""
    if query.device.type != "cuda":
        made: Tensor = focus.importance(query, key, masked, scale)
        return made
    return launch_importance(query, key, masked, scale)


@triton_op("focus_fused::choose", mutates_args={})
def choose(
    importance0: Tensor, importance1: Tensor, weights: Tensor, bias: Tensor, masked: Tensor,
    fed: Tensor, progress: Tensor, average: Tensor, alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``focus::signal``, ``focus::retain``, ``focus::tables``: delta, retain mask, four tables."""
    given = (importance0, importance1, weights, bias, masked, fed, progress, average, alpha)
    if masked.device.type != "cuda":
        delta = focus.signal(*given[:4])
        mask = focus.retain(delta, *given[4:])
        return delta, mask, *focus.tables(mask)
    return launch_choose(*given)
