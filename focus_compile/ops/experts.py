"""A mixture of experts in one operator, each expert a gated or plain perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "experts"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """Each token's sum over its experts: ``[N, H]``, ids int64 ``[N, K]`` -> ``[N, H]``.

    ``weights`` ``[N, K]`` times ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where there
    is no gate; ``up``, ``gate`` ``[I, H]`` and ``down`` ``[H, I]`` of every expert. Rows of an
    expert lie together; the host waits for how many it has, as in the loop that this stands for.
    Sums are in the wider dtype of ``x`` and ``weights``, the result in that of ``x``.
    """
    act = ACTIVATIONS[activation]
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    tokens = order // ids.shape[1]
    share = weights.reshape(-1, 1)
    total = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, weights.dtype))
    start = 0
    for expert, count in enumerate(torch.bincount(flat, minlength=len(up)).tolist()):
        if count:
            choices, rows = order[start : start + count], tokens[start : start + count]
            part = x[rows]
            hidden = F.linear(part, up[expert])
            hidden = act(F.linear(part, gate[expert])) * hidden if gate else act(hidden)
            made = F.linear(hidden, down[expert]) * share[choices]
            total.index_add_(0, rows, made.to(total.dtype))
        start += count
    return total.to(x.dtype)
