"""What a masked call returns: the programs' packed values, back on the canvas or as they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from focus_compile.ops.packing import canvas_shape, restore
from focus_compile.programs.halves import Halves, Returned
from focus_compile.runtime.session import PackedLogits

__all__ = ["packed_logits", "returned", "trimmed"]


def trimmed(halves: Halves, values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The ``count`` retained tokens and their values, without what they were padded with."""
    out = {"tokens": values["tokens"][:count]}
    for own in halves.own:
        if own is not None and own.tokens == "tokens":
            out[own.name] = values[own.name].narrow(own.token_dim, 0, count)
    return out


def returned(
    halves: Halves, values: Mapping[str, Tensor], packed: int | None
) -> tuple[Tensor | None, ...]:
    """The model's outputs, in its order; ``packed``: the one that is an expanded zero instead."""
    out: list[Tensor | None] = []
    for index, own in enumerate(halves.own):
        if own is None or own.tokens is None or own.keep is None:
            out.append(None if own is None else values[own.name])
            continue
        value, keep, dims = values[own.name], values[own.keep], (own.batch_dim, own.token_dim)
        if index == packed:
            canvas = value.new_zeros(()).expand(canvas_shape(value, keep, *dims))
        else:
            canvas = restore(value, values[own.tokens], keep, *dims)
        if own.last is not None:
            first = max(0, keep.shape[1] - own.last)
            canvas = canvas.narrow(own.token_dim, first, keep.shape[1] - first)
        out.append(canvas)
    return tuple(out)


def packed_logits(logits: Returned, values: Mapping[str, Tensor]) -> PackedLogits:
    """Logits of the retained tokens."""
    length = values["masked"].shape[1]
    assert logits.tokens is not None
    tokens = values[logits.tokens]
    rows = values[logits.name].movedim(logits.token_dim, 0).reshape(len(tokens), -1)
    return PackedLogits(rows, tokens // length, tokens % length)
