"""Prefix and suffix: graphs with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule

from focus_compile.plan.controls import Selection
from focus_compile.plan.plan import Domain

__all__ = ["Half", "Halves", "Returned"]


@dataclass(frozen=True)
class Half:
    """One of the two programs: its graph, and the names of its inputs and outputs, in order."""

    gm: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Returned:
    """A value that the model returns, by its name in the programs.

    ``domain`` is None where it is returned as it is; else it is packed, and restored with the
    tables of that domain along ``batch_dim`` and ``token_dim`` (:func:`~.packing.restore`).
    ``last``: the model returns that many last tokens only, or None: all.
    """

    name: str
    domain: Domain | None = None
    batch_dim: int | None = None
    token_dim: int = 0
    last: int | None = None


@dataclass(frozen=True)
class Halves:
    """Prefix and suffix.

    ``own`` are the values that the model returns, in its order; ``tails`` make them, where they
    come of the last layer's values of history and block, of these and of others that the programs
    are given or return, a cache of fixed length for one; elsewhere None. ``logits`` is the
    packed one that is computed last, or None if it returns none; ``vocabulary`` are, by position,
    the packed ones with a number for each token that can be embedded; ``slots``: the name of the
    value, history and block, that each slot takes over; ``selection`` names what the host reads.
    """

    prefix: Half
    suffix: Half
    own: tuple[Returned | None, ...]
    tails: tuple[Half | None, ...]
    logits: Returned | None
    vocabulary: tuple[int, ...]
    slots: Mapping[str, str]
    selection: Selection[str]
