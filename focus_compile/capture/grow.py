"""Caches whose slots are replaced -> caches that grow: one form for all passes.

past.index_copy(2, index, k)   ->  cat([focus.clear(past, index), k])    what attention reads
                                   focus.replace(past, joined, index)    what the model keeps
mask [B, 1, T, M]              ->  focus.extend_mask(mask, past, index)  [B, 1, T, M + T]
table [..., M, D]              ->  focus.extend(table, index)            [..., M + T, D]

That is what transformers' ``StaticCache`` does, and Fast-dLLM's dual cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from focus_compile.axes.axes import AxisMap, Dim, Role
from focus_compile.axes.propagate import Labelled, label
from focus_compile.axes.rules.makers import FILLS
from focus_compile.axes.rules.pointwise import POINTWISE
from focus_compile.axes.rules.table import RESHAPES
from focus_compile.capture.functional import VIEWS
from focus_compile.capture.put import Put, put_of
from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import (
    argument,
    aten,
    expr_of,
    fake_mode_of,
    graph_outputs,
    operands,
    reachable,
    tensor_of,
)
from focus_compile.graph.replay import Replay
from focus_compile.ops.library import focus
from focus_compile.refusals import (
    CACHE_CUT,
    CAUSAL_SLOTS,
    DIFFERENT_SLOTS,
    FIXED_SLOTS,
    FOLDED_SLOTS,
    KEYS_MIXED,
    RETURNS_CACHE,
    SLOTS_WITHOUT_MASK,
    UNKNOWN_ON_SLOTS,
)

__all__ = ["grow"]

_SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_OVER_KEYS = (_SDPA, *_SOFTMAX, aten.matmul.default)
"""Operators that mix slots, and leave out what is hidden."""
_RETURNED = (*VIEWS, aten.to.dtype, aten.to.device, aten.contiguous.default, aten.clone.default)
"""Operators through which a cache may be returned."""


def grow(captured: Labelled) -> Labelled:
    """Join new keys and values behind the cache where the model puts them into it.

    Raises:
        Unsupported: something else is done with the slots of such a cache.
    """
    gm, axes = captured.gm, captured.axes
    if axes.entry is None:
        return captured
    tokens = reachable(axes.entry.embedding, lambda node: node.users)
    puts = {node: put for node in gm.graph.nodes if (put := put_of(node)) is not None}
    writes = {
        node: put for node, put in puts.items() if put.source in tokens and _replaces(put, axes)
    }
    return label(_Growth(gm, axes, writes).run()) if writes else captured


def _replaces(put: Put, axes: AxisMap) -> bool:
    """Whether it is the block's keys or values that are put into a cache."""
    if put.x.op != "placeholder" or put.row not in (None, 0):
        return False
    return axes.position(axes.of(put.source), Role.TOKEN) == put.dim


def _said(value: Any) -> Any:
    """What a value is, so that two nodes that compute the same are equal."""
    if isinstance(value, list | tuple):
        return tuple(map(_said, value))
    if not isinstance(value, Node):
        return type(value), value
    made = value.meta["val"]
    if not isinstance(made, Tensor):
        return expr_of(made) if isinstance(made, torch.SymInt) else made
    if value.op != "call_function":
        return value
    return value.target, _said(value.args), _said(tuple(value.kwargs.items()))


class _Growth:
    """One replay. ``grown``: nodes that hold M + T slots instead of M, with the index of these."""

    def __init__(self, gm: GraphModule, axes: AxisMap, writes: dict[Node, Put]) -> None:
        self.gm, self.axes, self.writes = gm, axes, writes
        self.indices: dict[Any, Node] = {}
        self.replay = Replay(gm, fake_mode_of(gm))
        self.env: dict[Node, Node] = {}
        self.grown: dict[Node, Node] = {}
        self.past: dict[Node, tuple[Node, int]] = {}
        self.hidden: set[Node] = set()
        self.slots = {axes.of(node)[put.dim] for node, put in writes.items()}

    def run(self) -> GraphModule:
        for node in self.gm.graph.nodes:
            if node.op == "output":
                continue
            if node in self.writes:
                self._write(node)
            elif any(source in self.grown for source in node.all_input_nodes):
                self._emit(node)
            else:
                self.env[node] = self.replay.graph.node_copy(node, lambda arg: self.env[arg])
                if node.op == "get_attr":
                    name = str(node.target)
                    self.replay.attributes[name] = getattr(self.gm, name)
        return self.replay.finish(map_arg(graph_outputs(self.gm), self._output))

    def _write(self, node: Node) -> None:
        put = self.writes[node]
        index = self.indices.setdefault(_said(put.index), put.index)
        left = self.replay.call(focus.clear.default, (*self._env(put.x, index), put.dim))
        parts = [left, self.env[put.source]]
        self.env[node] = self.replay.call(aten.cat.default, (parts, put.dim), like=node)
        self.grown[node] = index
        self.past[index] = (put.x, put.dim)

    def _env(self, *nodes: Node) -> list[Node]:
        return [self.env[node] for node in nodes]

    def _output(self, node: Node) -> Node:
        """The cache as the model would leave it, or a view of it."""
        if node in self.writes:
            put = self.writes[node]
            args = (*self._env(put.x, node, self.grown[node]), put.dim)
            return self.replay.once(focus.replace.default, args, like=node)
        if node not in self.grown:
            return self.env[node]
        if node.target not in _RETURNED:
            raise Unsupported(RETURNS_CACHE, node)
        return self.replay.once(node.target, map_arg(node.args, self._output), like=node)

    def _emit(self, node: Node) -> None:
        """A node with an operand that has grown: all others that hold slots grow, too."""
        found = {self.grown[source] for source in node.all_input_nodes if source in self.grown}
        if len(found) > 1:
            raise Unsupported(DIFFERENT_SLOTS, node)
        (index,) = found
        if node not in self.axes.dims or node in self.axes.unruled:
            raise Unsupported(UNKNOWN_ON_SLOTS, node)
        if any(axis in self.slots for axis in map(self._resolved, self.axes.mixed[node])):
            self._check_hidden(node)
        args, kwargs = self._arguments(node, index)
        made = self.env[node] = self.replay.call(node.target, args, kwargs, like=node)
        at = self._along(node)
        if node.target not in FILLS and self.hidden.intersection(node.all_input_nodes):
            self.hidden.add(node)
        if at is not None:
            past, dim = self.past[index]
            longer = tensor_of(past).shape[dim] + tensor_of(index).shape[-1]
            results = made.meta["val"]
            results = [results] if isinstance(results, Tensor) else results
            if any(result.shape[at] != longer for result in results):
                raise Unsupported(FIXED_SLOTS, node)
            self.grown[node] = index

    def _check_hidden(self, node: Node) -> None:
        if node.target is aten.slice.Tensor:
            raise Unsupported(CACHE_CUT, node)
        if node.target not in _OVER_KEYS:
            raise Unsupported(KEYS_MIXED, node)
        if node.target is _SDPA and argument(node, 5, "is_causal", False):
            raise Unsupported(CAUSAL_SLOTS, node)
        if node.target in _SOFTMAX and node.args[0] not in self.hidden:
            raise Unsupported(SLOTS_WITHOUT_MASK, node)

    def _arguments(self, node: Node, index: Node) -> tuple[Any, Any]:
        if node.target is _SDPA:
            query, key, value = map_arg(node.args[:3], lambda arg: self._operand(arg, index, node))
            mask = self._mask(argument(node, 3, "attn_mask"), index)
            kwargs = {
                "scale": argument(node, 6, "scale"),
                "enable_gqa": argument(node, 7, "enable_gqa", False),
            }
            dropout = argument(node, 4, "dropout_p", 0.0)
            return (query, key, value, mask, dropout, False), kwargs
        if node.target in RESHAPES or node.target is aten.expand.default:
            source, sizes = node.args
            assert isinstance(source, Node)
            if (at := self._along(node)) is not None and (old := self._along(source)) is not None:
                longer = self.replay.size(self.env[source], old)
                sizes = [longer if i == at else s for i, s in enumerate(sizes)]  # type: ignore
            return map_arg((self.env[source], sizes), lambda arg: self.env.get(arg, arg)), {}
        if node.target is aten.add.Tensor and self._is_scores(node):
            masks = [
                a for a in operands(node) if a not in self.grown and self._along(a) is not None
            ]
            if masks:
                self.hidden.add(node)
            env = {arg: self._mask(arg, index) for arg in masks}
            return map_arg((node.args, node.kwargs), lambda arg: env.get(arg) or self.env[arg])
        return map_arg((node.args, node.kwargs), lambda arg: self._operand(arg, index, node))

    def _is_scores(self, node: Node) -> bool:
        """Whether a value has a row per token and a column per slot."""
        *_, rows, columns = ((), (), *self.axes.of(node))
        return columns in self.slots and self.axes.holds(rows, Role.TOKEN)

    def _mask(self, mask: Node | None, index: Node) -> Node:
        past, dim = self.past[index]
        old = None if mask is None else self.env[mask]
        args = (old, self.env[past], self.env[index], dim)
        return self.replay.once(focus.extend_mask.default, args)

    def _operand(self, arg: Node, index: Node, node: Node) -> Node:
        grows = arg not in self.grown and arg in self.axes.dims
        if not grows or (at := self._along(arg)) is None:
            return self.env[arg]
        value, dims = self.env[arg], self.axes.of(arg)
        if tensor_of(index).dim() > 1:  # rows of their own: they stand in the first dim
            while node.target in POINTWISE and len(dims) < tensor_of(node).dim():
                value = self.replay.once(aten.unsqueeze.default, (value, 0))
                at, dims = at + 1, ((), *dims)
            if at == 0 or (dims[0] and self.axes.position(dims, Role.BATCH) != 0):
                raise Unsupported(UNKNOWN_ON_SLOTS, node)
        return self.replay.once(focus.extend.default, (value, self.env[index], at))

    def _resolved(self, dim: Dim) -> Dim:
        return self.axes.resolve(dim)

    def _along(self, node: Node) -> int | None:
        """Index of the dim that is the slots of a cache, of a value or of each part of one."""
        for at, dim in enumerate(self.axes.of(node)):
            if dim in self.slots:
                return at
            if any((axis,) in self.slots for axis in dim):
                raise Unsupported(FOLDED_SLOTS, node)
        return None
