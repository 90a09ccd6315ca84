"""What runs between the ranks of a tensor-parallel model; process groups go by name.

transformers' ``tp_plan`` gives every rank some heads, some features of MLPs and some rows of the
vocabulary. What a rank sees of the importance is that of its own heads: the sum over all heads
(docs/algorithm.md section 1) is the sum over ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["embedding_shard", "gather_ranks", "sum_ranks"]


def embedding_shard(weight: Tensor, ids: Tensor, start: int) -> Tensor:
    """One rank's term of an embedding whose vocabulary is sharded.

    weight: rows ``start``, ``start + 1``, ... of the table, ``[V / ranks, E]``; ids: int64 ``[B,
    T]``. Returns ``[B, T, E]``, 0 where a token's row is another rank's.
    """
    if not len(weight):  # more ranks than parts
        return weight.new_zeros((*ids.shape, weight.shape[1]))
    is_local = (ids >= start) & (ids < start + weight.shape[0])
    rows = torch.nn.functional.embedding(torch.where(is_local, ids - start, 0), weight)
    return rows.masked_fill(~is_local.unsqueeze(-1), 0)


def gather_ranks(x: Tensor, size: int, ranks: int, group: str) -> Tensor:
    """The parts of all ranks, side by side along the last dim, ``[..., size]``.

    Each rank has ``ceil(size / ranks)``, the last ones what is left, as ``torch.chunk`` does it.
    """
    width = -(-size // ranks)
    padded = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return torch.cat(_gathered(padded, ranks, group), -1)[..., :size]


def sum_ranks(
    importance0: Tensor, importance1: Tensor, ranks: int, group: str
) -> tuple[Tensor, Tensor]:
    """Both importances, of the heads of all ranks; fp32 ``[B, T]`` each.

    They are gathered and added in the order of ranks, so that every rank gets the same bits and
    retains the same tokens; in one go, so that the collectives of all ranks stand in one order: the
    second importance needs what layer 0 has joined.
    """
    total = torch.stack(_gathered(torch.stack([importance0, importance1]), ranks, group)).sum(0)
    return total[0].clone(), total[1].clone()


def _gathered(x: Tensor, ranks: int, group: str) -> list[Tensor]:
    """What every rank holds, in the order of ranks."""
    collectives = torch.ops._c10d_functional
    gathered = collectives.all_gather_into_tensor(x.contiguous(), ranks, group)
    return list(collectives.wait_tensor(gathered).chunk(ranks))
