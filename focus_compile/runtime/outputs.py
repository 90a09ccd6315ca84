"""What a masked call returns: the programs' packed values, back on the canvas or as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from focus_compile.ops.packing import canvas_shape, restore
from focus_compile.plan.plan import Domain
from focus_compile.programs.halves import Halves, Returned
from focus_compile.runtime.session import PackedLogits

__all__ = ["ITSELF", "Packed", "packed_logits", "returned"]

ITSELF = 2.0**-5
"""The logit of its own id at a token that was not computed, where all others are 0."""


@dataclass(frozen=True)
class Packed:
    """Which tokens the packed values of a domain are of.

    ``tokens``: int64 ``[N]``, flat positions, without what the values may be padded with;
    ``keep``: bool ``[B, T]``, the same on the canvas.
    """

    tokens: Tensor
    keep: Tensor

    def rows(self, value: Tensor, dim: int) -> Tensor:
        """A packed value without its padding."""
        return value.narrow(dim, 0, len(self.tokens))


def returned(
    halves: Halves,
    values: Mapping[str, Tensor],
    domains: Mapping[Domain, Packed],
    packed: int | None,
    ids: Tensor,
) -> tuple[Tensor | None, ...]:
    """The model's outputs, in its order; ``packed``: the one that is an expanded zero instead.

    ``ids``: int64 ``[B, T]``, of this call. Where logits were not computed, a token predicts itself
    with the least confidence there is: a mask that was evicted stays one, whoever decodes it.
    """
    out: list[Tensor | None] = []
    for index, own in enumerate(halves.own):
        if own is None or own.domain is None:
            out.append(None if own is None else values[own.name])
            continue
        where, dims = domains[own.domain], (own.batch_dim, own.token_dim)
        value, keep = where.rows(values[own.name], own.token_dim), where.keep
        if index == packed:
            canvas = value.new_zeros(()).expand(canvas_shape(value, keep, *dims))
        else:
            canvas = restore(value, where.tokens, keep, *dims)
            if index in halves.vocabulary:
                whole, rows = (canvas, dims[0]) if dims[0] is not None else (canvas[None], 0)
                tokens = dims[1] + (dims[0] is None)
                _predict(ids, whole.movedim((rows, tokens), (0, 1)), ~keep)
        if own.last is not None:
            first = max(0, keep.shape[1] - own.last)
            canvas = canvas.narrow(own.token_dim, first, keep.shape[1] - first)
        out.append(canvas)
    return tuple(out)


def _predict(ids: Tensor, logits: Tensor, where: Tensor) -> None:
    """Write :data:`ITSELF` at ids ``[B, T]`` of logits ``[B, T, ..., V]``, where flagged."""
    where = where & (ids < logits.shape[-1])
    index = torch.where(where, ids, 0).long().view(*ids.shape, *(1,) * (logits.dim() - 2))
    index = index.expand(*logits.shape[:-1], 1)
    old = logits.gather(-1, index)
    new = torch.where(where.view(index.shape[:2] + (1,) * (logits.dim() - 2)), ITSELF, old)
    logits.scatter_(-1, index, new.to(logits.dtype))


def packed_logits(logits: Returned, values: Mapping[str, Tensor], retained: Packed) -> PackedLogits:
    """Logits of the retained tokens."""
    length, tokens = retained.keep.shape[1], retained.tokens
    value = retained.rows(values[logits.name], logits.token_dim)
    rows = value.movedim(logits.token_dim, 0).reshape(len(tokens), -1)
    return PackedLogits(rows, tokens // length, tokens % length)
