"""Prefix and suffix: graphs with named inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

__all__ = ["Half", "Halves", "Returned"]


@dataclass(frozen=True)
class Half:
    """One of the two programs: its graph, and the names of its inputs and outputs, in order."""

    gm: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Returned:
    """A value that the model returns, by the names of the programs' values.

    ``tokens`` and ``keep`` are None where it is returned as it is; else it is packed, and restored
    with these tables along ``batch_dim`` and ``token_dim`` (:func:`~.packing.restore`). ``last``:
    the model returns that many last tokens only, or None: all.
    """

    name: str
    tokens: str | None = None
    keep: str | None = None
    batch_dim: int | None = None
    token_dim: int = 0
    last: int | None = None


@dataclass(frozen=True)
class Halves:
    """Prefix and suffix.

    ``own`` are the values that the model returns, in its order; ``logits`` is the packed one that
    is computed last, or None if it returns none; ``vocabulary`` are, by position, the packed ones
    with a number for each token that can be embedded; ``kv`` names those that hold each layer's
    keys and values, history first; ``control`` what the host reads.
    """

    prefix: Half
    suffix: Half
    own: tuple[Returned | None, ...]
    logits: Returned | None
    vocabulary: tuple[int, ...]
    kv: tuple[tuple[str, str], ...]
    control: dict[str, str]
