"""Keys and values of a generation, where they stay: memory for its longest text, written in place.

``DynamicCache`` copies the history whenever a call adds to it: once for every block that is stored,
and, with FOCUS, once for the first step of every block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from focus_compile.torch_private import is_traceable_wrapper_subclass

__all__ = ["HeldLayer", "hold"]

_STEP = 8
"""Slots are a multiple of this. There is one more than needed, at least: Dynamo sees views of a
longer tensor in every block, the last one included, and captures one graph."""


class HeldLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values ``[B, G, S + T, D]``, of history and block: what a call attends to.

    A call writes those of its T tokens into the last places. So the block is opened before the call
    (:meth:`open`), and may be written any number of times.

    Attributes:
        key_slots, value_slots: ``[B, G, M, D]``, the memory of ``keys`` and ``values``.
        block: empty, ``[T, 0]``: how many places are of the block, as a size. A number would be a
            constant to Dynamo.
    """

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        """Takes over what a layer holds; ``room``: tokens of the longest text."""
        super().__init__()  # type: ignore[no-untyped-call]
        keys: Any = layer.keys
        values: Any = layer.values
        self.lazy_initialization(keys, values)
        self.key_slots, self.value_slots = _slots(keys, room), _slots(values, room)
        self.block = keys.new_empty((0, 0))
        self.open(0, keys.shape[2])

    def open(self, history: int, tokens: int) -> None:
        """The next call gets ``tokens`` after ``history`` others."""
        self.keys = self.key_slots.narrow(2, 0, history + tokens)
        self.values = self.value_slots.narrow(2, 0, history + tokens)
        self.block = self.block.new_empty((tokens, 0))

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a block's ``[B, G, T, D]``; keys and values of history and block."""
        assert self.keys is not None and self.values is not None
        history = self.keys.shape[2] - key_states.shape[2]
        self.keys[:, :, history:] = key_states
        self.values[:, :, history:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before the block."""
        assert self.keys is not None
        length: int = self.keys.shape[2] - self.block.shape[0]
        return length


def hold(layers: list[Any], room: int) -> bool:
    """Move what plain layers of a ``DynamicCache`` hold into :class:`HeldLayer` s, one by one.

    Returns:
        whether it was done: not where a layer is of another kind, or has no plain tensors.
    """
    if not all(_is_plain(layer) for layer in layers):
        return False
    for at, layer in enumerate(layers):
        layers[at] = HeldLayer(layer, room)
    return True


def _is_plain(layer: Any) -> bool:
    return type(layer) is DynamicLayer and all(
        isinstance(value, Tensor) and value.dim() == 4 and not is_traceable_wrapper_subclass(value)
        for value in (layer.keys, layer.values)
    )


def _slots(stored: Tensor, room: int) -> Tensor:
    batch, heads, length, size = stored.shape
    made = stored.new_empty((batch, heads, (room // _STEP + 1) * _STEP, size))
    made[:, :, :length] = stored
    return made
