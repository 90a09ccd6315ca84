"""What the runtime gives to the programs and gets from them, declared once.

A class per giver, a field per value, named as in the graphs. The same class holds the declaration
of every value (``Controls[Input]``), its node in a graph (``Selection[Node]``), its name
(``Selection[str]``) and its tensor in a call (``Controls[Tensor]``), so that a value that somebody
forgot is an error of types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from focus_compile.graph.inputs import Input
from focus_compile.graph.sizes import Extent

__all__ = ["Controls", "Selection", "Tables", "declare", "slot_name"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Controls(Generic[T]):
    """The runtime fills these before the prefix runs; slots and the model's arguments come beside.

    Attributes:
        masked: tokens that are masked. Read by importance and selection.
        fed: tokens that are computed in this step. Read by selection and by what a query sees.
        progress: per row, the last position whose K/V every layer holds, -1: none; average: the
            tokens decoded per step so far. Read by selection.
        alpha: how many times that average is retained. Read by selection.
        signal_weights, signal_bias: the ranking signal is ``weights[0] * importance of the first
            scored layer + weights[1] * that of the second + bias``.
        fed_tokens, fed_inverse, fed_rows: index tables of the fed tokens
            (:class:`~focus_compile.ops.tables.Feed`). Read by whatever packs, joins or attends.
        written01: slots that have been written in layers up to the second scored one (0 and 1 in
            the paper); written: in later ones. Read by joins and by what a query sees.
        prefix_visibility: a query sees written slots up to the last retained token only.
        reuse: joins may write into their slots; the host reads it.
    """

    masked: T
    fed: T
    progress: T
    average: T
    alpha: T
    signal_weights: T
    signal_bias: T
    fed_tokens: T
    fed_inverse: T
    fed_rows: T
    written01: T
    written: T
    prefix_visibility: T
    reuse: T


@dataclass(frozen=True, eq=False)
class Selection(Generic[T]):
    """The pass ``retain`` adds these to a graph's outputs, in this order; the host reads them.

    Attributes:
        retain_mask: bool ``[B, T]``, tokens that later layers compute.
        order: int64 ``[B * T]``, flat indices of the retained tokens first; inverse ``[B, T]``: the
            place of each token among them; places ``[B, T]``: token indices of each row's retained
            tokens first (:func:`~focus_compile.ops.packing.tables`).
        sizes: int64 ``[2]``, how many tokens are retained, and the most of any row.
        delta: fp32 ``[B, T]``, the ranking signal.
    """

    retain_mask: T
    order: T
    inverse: T
    places: T
    sizes: T
    delta: T


@dataclass(frozen=True, eq=False)
class Tables(Generic[T]):
    """The host cuts these to size between prefix and suffix.

    Attributes:
        tokens: flat indices of the retained tokens; rows: per row, their token indices.
    """

    tokens: T
    rows: T


def declare(device: torch.device, batch: Extent) -> tuple[Controls[Input], Tables[Input]]:
    """Dtype and shape of every value that the programs are given; ``batch`` is 1 or its name."""
    boolean, integer, real = torch.bool, torch.int64, torch.float32
    declared = Controls[tuple[torch.dtype, tuple[Extent, ...]]](
        masked=(boolean, (batch, "token")),
        fed=(boolean, (batch, "token")),
        progress=(integer, (batch,)),
        average=(real, (batch,)),
        alpha=(real, ()),
        signal_weights=(real, (2,)),
        signal_bias=(real, (batch, "token")),
        fed_tokens=(integer, ("fed",)),
        fed_inverse=(integer, (batch, "token")),
        fed_rows=(integer, (batch, "fed_row")),
        written01=(boolean, (batch, "token")),
        written=(boolean, (batch, "token")),
        prefix_visibility=(boolean, ()),
        reuse=(boolean, ()),
    )
    host = torch.device("cpu")
    controls = Controls(
        **{
            name: Input(name, shape, dtype, host if name == "reuse" else device)
            for name, (dtype, shape) in vars(declared).items()
        }
    )
    tables = Tables(
        tokens=Input("tokens", ("retained",), integer, device),
        rows=Input("rows", (batch, "retained_row"), integer, device),
    )
    return controls, tables


def slot_name(layer: int, part: int) -> str:
    """Input that holds the stale keys (part 0) or values (part 1) of a layer."""
    return f"slots{layer}_{'kv'[part]}"
