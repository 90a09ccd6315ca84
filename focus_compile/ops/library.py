"""The ``focus::`` operators: what the passes put into graphs.

Each is one eager function behind one operator: a graph shows it as a single readable node, and the
compiler calls it as it is. Nothing of it is inlined: fused into their neighbours, gathers and
selections made the compiler repeat norms and rotary embeddings for every slot of the canvas, and
took longer to compile than the model (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from focus_compile.ops.attention import (
    attend,
    block,
    causal,
    line_index,
    site_index,
    site_mask,
    visible,
)
from focus_compile.ops.experts import experts
from focus_compile.ops.fixed_cache import clear, extend, extend_mask, replace
from focus_compile.ops.importance import importance
from focus_compile.ops.linear import linear
from focus_compile.ops.packing import join, pack, pack_rows, repack, restore, store, unpack
from focus_compile.ops.ranks import embedding_shard, gather_ranks, sum_ranks
from focus_compile.ops.selection import retain, signal
from focus_compile.ops.shapes import SHAPES
from focus_compile.ops.tables import tables

__all__ = ["focus"]

_DIMS = "int? batch_dim, int token_dim"
_DEFINITIONS: dict[str, Callable[..., Any]] = {
    "block(Tensor key, Tensor masked) -> Tensor": block,
    "importance(Tensor query, Tensor key, Tensor masked, float scale) -> Tensor": importance,
    "embedding_shard(Tensor weight, Tensor ids, int start) -> Tensor": embedding_shard,
    "gather_ranks(Tensor x, int size, int ranks, str group) -> Tensor": gather_ranks,
    "sum_ranks(Tensor importance0, Tensor importance1, int ranks, str group) -> (Tensor, Tensor)": (
        sum_ranks
    ),
    "signal(Tensor importance0, Tensor importance1, Tensor weights, Tensor bias) -> Tensor": signal,
    "retain(Tensor delta, Tensor masked, Tensor fed, Tensor progress, Tensor average, "
    "Tensor alpha) -> Tensor": retain,
    "tables(Tensor keep) -> (Tensor, Tensor, Tensor, Tensor)": tables,
    f"pack(Tensor x, Tensor tokens, Tensor inverse, {_DIMS}) -> Tensor": pack,
    "pack_rows(Tensor x, Tensor tokens, Tensor inverse, int batch_dim, int token_dim) -> Tensor": (
        pack_rows
    ),
    "repack(Tensor x, Tensor outer_inverse, Tensor tokens, int token_dim) -> Tensor": repack,
    f"unpack(Tensor x, Tensor index, {_DIMS}) -> Tensor": unpack,
    "join(Tensor? past, Tensor new, Tensor tokens, Tensor stale, Tensor written, Tensor? reuse, "
    "int token_dim) -> Tensor": join,
    "store(Tensor slots, Tensor new, Tensor tokens, SymInt length, int token_dim) -> Tensor": store,
    f"restore(Tensor x, Tensor tokens, Tensor keep, {_DIMS}) -> Tensor": restore,
    "visible(Tensor written, Tensor stored, Tensor bound, Tensor prefix) -> Tensor": visible,
    "causal(Tensor masked, Tensor key) -> Tensor": causal,
    "site_index(Tensor inverse, Tensor rows) -> Tensor": site_index,
    "site_mask(Tensor? mask, Tensor rows, Tensor visible, SymInt history, int share, "
    "ScalarType dtype) -> Tensor": site_mask,
    "line_index(Tensor tokens, Tensor inverse, Tensor rows) -> Tensor": line_index,
    "attend(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor index, Tensor lines, "
    "float scale) -> Tensor": attend,
    "clear(Tensor past, Tensor index, int token_dim) -> Tensor": clear,
    "extend(Tensor x, Tensor index, int dim) -> Tensor": extend,
    "extend_mask(Tensor? mask, Tensor past, Tensor index, int token_dim) -> Tensor": extend_mask,
    "replace(Tensor past, Tensor joined, Tensor index, int token_dim) -> Tensor": replace,
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor": linear,
    "experts(Tensor x, Tensor ids, Tensor weights, Tensor[] up, Tensor[] down, Tensor[] gate, "
    "str activation) -> Tensor": experts,
}


def _contiguous(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with contiguous results: their layout never depends on that of its operands."""

    def kernel(*args: Any) -> Any:
        result = function(*args)
        if isinstance(result, Tensor):
            return result.contiguous()
        return tuple(value.contiguous() for value in result)

    return kernel


_LIBRARY: Any = torch.library.Library("focus", "DEF")  # type: ignore[no-untyped-call]


_WAITS = {"experts": (torch.Tag.cudagraph_unsafe,)}
"""Operators in which the host waits for numbers: CUDA graphs are recorded without them."""

for _schema, _function in _DEFINITIONS.items():
    _name = _schema.split("(")[0]
    _kernel = _function if _function is store else _contiguous(_function)
    _tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout, *_WAITS.get(_name, ()))
    _LIBRARY.define(_schema, tags=_tags)
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"focus::{_name}", SHAPES[_name], lib=_LIBRARY)


def _store_in(slots: Tensor, new: Tensor, tokens: Tensor, length: int, token_dim: int) -> None:
    store(slots, new, tokens, length, token_dim)


_LIBRARY.define(
    "store_(Tensor(a!) slots, Tensor new, Tensor tokens, SymInt length, int token_dim) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
_LIBRARY.impl("store_", _store_in, "CompositeExplicitAutograd")
torch.library.register_fake("focus::store_", lambda *_: None, lib=_LIBRARY)

focus = torch.ops.focus
