"""Arguments in one layout: Dynamo captures a model anew for each layout of a tensor in memory.

A loop makes one mask for its whole text and calls the model with slices of it, most of which have
gaps between their rows. What is an argument itself, and of up to four dims, is copied where it has
gaps: masks, ids, positions, embeddings. Caches, in a list or an object or of more dims, are not.
Strides of dims of one element, which mean nothing, are made what they are elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["contiguous"]

_DIMS = 4


@contextmanager
def contiguous(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of a call, with contiguous copies of tensors that have gaps.

    What the call writes into a copy is written into the tensor after it. Tensors that need a
    gradient, that know no version (those of inference mode) or that share memory with another
    argument are left as they are.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    memory = [_memory(value) for value in tensors]
    alone = [
        value
        for value, start in zip(tensors, memory, strict=True)
        if memory.count(start) == 1 and _is_plain(value)
    ]
    copies = [(value, value.contiguous()) for value in alone if not value.is_contiguous()]
    versions = [copy._version for _, copy in copies]
    shown = {id(value): copy for value, copy in copies}
    shown |= {id(value): _regular(value) for value in alone if id(value) not in shown}
    yield (
        tuple(shown.get(id(value), value) for value in args),
        {name: shown.get(id(value), value) for name, value in kwargs.items()},
    )
    for (value, copy), version in zip(copies, versions, strict=True):
        if copy._version != version:
            value.copy_(copy)


def _is_plain(value: Tensor) -> bool:
    plain = type(value) is Tensor and value.layout is torch.strided and value.dim() <= _DIMS
    return plain and not value.requires_grad and not value.is_inference()


def _regular(value: Tensor) -> Tensor:
    """The same memory with the strides of a new tensor of these sizes."""
    strides = [math.prod(value.shape[dim + 1 :]) for dim in range(value.dim())]
    if not value.numel() or strides == [*value.stride()]:
        return value
    return value.as_strided(value.shape, strides)


def _memory(value: Tensor) -> Any:
    """What tensors that may overlap have in common."""
    plain = type(value) is Tensor and value.layout is torch.strided
    return value.untyped_storage().data_ptr() if plain else id(value)
