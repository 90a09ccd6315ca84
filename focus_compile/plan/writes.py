"""What attention reads as history: writes of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Dim, Role
from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import argument, aten, cat_parts, operands, tensor_of
from focus_compile.ops.library import focus
from focus_compile.refusals import CACHE_WRITE, KEYS_MIXED, NEW_KEY_AXES, PAST_CHANGED

__all__ = ["Write", "find_write"]


@dataclass(frozen=True)
class Write:
    """A K/V write, by node name.

    ``new`` computes the block's keys or values. ``cat`` joins them to ``history``: to ``past``, the
    input that holds it, or to what is left of it where the block replaces the slots ``index`` of a
    cache of fixed length. All are None where there is no history.
    """

    new: str
    cat: str | None
    past: str | None
    history: str | None
    index: str | None
    batch_dim: int | None
    token_dim: int

    @property
    def joined(self) -> str:
        """Keys or values of history and block, as the cache holds them."""
        return self.cat or self.new


def find_write(attended: Node, axes: AxisMap, site: Node, flow: nx.DiGraph) -> Write:
    """The K/V write whose result, as it is or token by token changed, a site attends to."""
    if not _holds_history(attended, axes):
        dims = axes.of(attended)
        batch_dim = axes.position(dims, Role.BATCH)
        return Write(attended.name, None, None, None, None, batch_dim, 2)
    cats: dict[Node, None] = {}
    queue, visited = [attended], {attended}
    while queue:
        node = queue.pop()
        if node.target is aten.cat.default and _joins(node, axes):
            cats[node] = None
            continue
        for source in operands(node):
            if source not in visited and _holds_history(source, axes):
                visited.add(source)
                queue.append(source)
    if len(cats) != 1:
        raise Unsupported(CACHE_WRITE, site)
    (cat,) = cats
    for node in nx.descendants(flow, cat) & (nx.ancestors(flow, attended) | {attended}):
        if node in axes.unruled or any(_is_key_axis(dim, axes) for dim in axes.mixed.get(node, ())):
            raise Unsupported(KEYS_MIXED, node)
    history, new = cat_parts(cat)
    past: Any = history
    index: str | None = None
    if history.target is focus.clear.default:
        past, slots, _ = history.args
        index = str(slots)
    if past.op != "placeholder":
        raise Unsupported(PAST_CHANGED, past)
    dims = axes.of(new)
    token_dim, batch_dim = axes.position(dims, Role.TOKEN), axes.position(dims, Role.BATCH)
    if token_dim in (0, None) or batch_dim not in (0, None):
        raise Unsupported(NEW_KEY_AXES, site)
    assert token_dim is not None
    return Write(new.name, cat.name, past.name, history.name, index, batch_dim, token_dim)


def _holds_history(node: Node, axes: AxisMap) -> bool:
    return any(_is_key_axis(dim, axes) for dim in axes.of(node))


def _is_key_axis(dim: Dim, axes: AxisMap) -> bool:
    return axes.history(dim) is not None


def _joins(cat: Node, axes: AxisMap) -> bool:
    """Whether a ``cat`` makes the axis of history and block."""
    at = argument(cat, 1, "dim", 0) % tensor_of(cat).dim()
    return axes.history(axes.of(cat)[at]) is not None and len(cat_parts(cat)) == 2
