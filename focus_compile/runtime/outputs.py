"""What a masked call returns: the programs' packed values, back on the canvas or as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from focus_compile.ops.packing import canvas_shape, restore
from focus_compile.plan.plan import Domain
from focus_compile.programs.halves import Halves, Returned
from focus_compile.runtime.session import PackedLogits

__all__ = ["Packed", "packed_logits", "returned"]


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
) -> tuple[Tensor | None, ...]:
    """The model's outputs, in its order; ``packed``: the one that is an expanded zero instead."""
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
        if own.last is not None:
            first = max(0, keep.shape[1] - own.last)
            canvas = canvas.narrow(own.token_dim, first, keep.shape[1] - first)
        out.append(canvas)
    return tuple(out)


def packed_logits(logits: Returned, values: Mapping[str, Tensor], retained: Packed) -> PackedLogits:
    """Logits of the retained tokens."""
    length, tokens = retained.keep.shape[1], retained.tokens
    value = retained.rows(values[logits.name], logits.token_dim)
    rows = value.movedim(logits.token_dim, 0).reshape(len(tokens), -1)
    return PackedLogits(rows, tokens // length, tokens % length)
