"""Dynamo's graph -> pre-dispatch ATen, and pre-dispatch ATen -> its canonical form.

The canonical form lives in a shape environment of its own, with one symbol per axis label: the
batch (unless it is 1), the block, and the history of each group of layers whose histories are
equal, and free strides for past K/V. Dynamo captures one model several times in a denoising loop
(cropped or contiguous cache, static or symbolic past): all of these have the same canonical form,
so that Inductor compiles it once and finds it in its cache afterwards.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from focus_compile.axes import Axis, AxisMap, Dim, expr_of, graph_inputs, tensor_of
from focus_compile.errors import Unsupported
from focus_compile.replay import Replay
from focus_compile.rules import RESHAPES, propagate
from focus_compile.symbols import HINTS, Symbols

__all__ = ["analyzed", "canonicalize", "capture"]

aten = torch.ops.aten


def capture(gm: GraphModule) -> GraphModule:
    """Dynamo's graph -> pre-dispatch ATen under the same fake mode, sizes kept symbolic."""
    values = [node.meta["example_value"] for node in graph_inputs(gm)]
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    if not modes:
        raise Unsupported("the graph has no tensor input")
    with modes[0], preserve_node_meta():
        graph = make_fx(fx.Interpreter(gm).run, pre_dispatch=True)(*values)
    for node, inner in zip(graph_inputs(gm), graph_inputs(graph), strict=True):
        for key in ("tensor_dict", "_dynamo_source"):
            if key in node.meta:
                inner.meta[key] = node.meta[key]
        if hasattr(node, "_dynamo_source"):
            inner.meta["_dynamo_source"] = node._dynamo_source
    graph.graph.eliminate_dead_code()
    return graph


@dataclass
class _Canon:
    """The state of one canonicalisation."""

    axes: AxisMap
    symbols: Symbols
    replay: Replay
    sizes: dict[Axis, Any]
    meaning: dict[sympy.Symbol, Any]

    def size(self, dim: Dim) -> Any:
        """The size of a dim as a canonical SymInt or int."""
        out: Any = 1
        for axis in self.axes.resolve(dim):
            out = out * self._axis(axis)
        return out

    def _axis(self, axis: Axis) -> Any:
        if axis.sum is not None:
            total: Any = 0
            for part in axis.sum:
                total = total + self.size(part)
            return total
        if axis not in self.sizes:
            if axis.role is not None:
                self.sizes[axis] = self.symbols.make(axis.role.value, HINTS[axis.role.value])
            elif self.axes.expr(axis.size).is_Integer:
                self.sizes[axis] = int(self.axes.expr(axis.size))
            else:
                name = f"size{len(self.sizes)}"
                self.sizes[axis] = self.symbols.make(name, 100 + 7 * len(self.sizes))
        return self.sizes[axis]


def canonicalize(gm: GraphModule, axes: AxisMap) -> tuple[GraphModule, tuple[int, ...]]:
    """Replay a captured graph with one symbol per label; drop SymInt inputs and no-op copies.

    Args:
        gm: from :func:`capture`; axes: its labels.

    Returns:
        The canonical graph, and for each of its inputs the index of the captured input.
    """
    symbols = Symbols.new()
    canon = _Canon(axes, symbols, Replay(gm, symbols.fake_mode, keep_names=False), {}, {})
    histories = _share_histories(gm, axes, canon)
    env: dict[Node, Any] = {}
    index: list[int] = []
    for position, node in enumerate(graph_inputs(gm)):
        if isinstance(node.meta["val"], torch.Tensor):
            name = f"input{len(index)}"
            value = _input(node, name, canon, histories)
            env[node] = canon.replay.placeholder(name, value, node)
            index.append(position)
    bases = _size_bases(env, canon)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            env[node] = canon.replay.attribute(node)
            env[node].meta["val"] = symbols.fake_mode.from_tensor(
                canon.replay.attributes[str(node.target)]
            )
        elif node.op == "call_function":
            _emit(node, env, canon, bases)
    output = next(iter(reversed(gm.graph.nodes)))
    outputs = fx.map_arg(output.args[0], lambda node: env[node])
    return canon.replay.finish(outputs), tuple(index)


def _share_histories(gm: GraphModule, axes: AxisMap, canon: _Canon) -> set[Axis]:
    """Give history axes of one Dynamo size one symbol; a static 0 or 1 stays a constant.

    Dynamo's guards hold the equality: it is the same symbol, or the same constant, there.
    """
    groups: dict[sympy.Expr, Any] = {}
    found: set[Axis] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is not aten.cat.default:
            continue
        for dim in axes.of(node):
            history = axes.history(dim)
            for axis in axes.resolve(history) if history else ():
                found.add(axis)
                size = axes.expr(axis.size)
                if size in (0, 1):
                    canon.sizes[axis] = int(size)
                    continue
                if size not in groups:
                    name = f"history{len(groups) or ''}"
                    groups[size] = canon.symbols.make(name, HINTS["history"] + 16 * len(groups))
                canon.sizes[axis] = groups[size]
    return found


def _input(node: Node, name: str, canon: _Canon, histories: set[Axis]) -> torch.Tensor:
    """The canonical fake tensor of a graph input."""
    axes, value = canon.axes, tensor_of(node)
    dims = axes.of(node)
    shape = [canon.size(dim) for dim in dims]
    symbolic = any(isinstance(size, torch.SymInt) for size in shape)
    past = any(axis in histories for dim in dims for axis in dim)
    for old, new in zip(value.shape, shape, strict=True):
        if isinstance(old, torch.SymInt):
            expr = expr_of(old)
            if expr.is_Symbol:
                if canon.meaning.setdefault(expr, new) is not new:
                    canon.meaning[expr] = None  # two labels share a symbol: its meaning is unknown
    with canon.symbols.fake_mode:
        if past and symbolic and value.dim() == len(shape) > 1:
            like = torch.empty(shape, dtype=value.dtype, device=value.device)
            return canon.symbols.strided(like, name)
        if not symbolic:
            stride = [int(step) for step in value.stride()]
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return torch.empty(shape, dtype=value.dtype, device=value.device)


def _size_bases(env: dict[Node, Node], canon: _Canon) -> dict[sympy.Symbol, Node]:
    """For each canonical size symbol, a node that reads it off an input."""
    bases: dict[sympy.Symbol, Node] = {}
    for node in env.values():
        for dim, size in enumerate(tensor_of(node).shape):
            if isinstance(size, torch.SymInt) and expr_of(size).is_Symbol:
                if expr_of(size) not in bases:
                    read = canon.replay.size(node, dim)
                    assert isinstance(read, Node)
                    bases[expr_of(size)] = read
    return bases


def _size_node(size: Any, canon: _Canon, bases: dict[sympy.Symbol, Node]) -> Node | int:
    """A canonical size as a graph argument: sums and products of sizes of inputs."""
    if isinstance(size, int):
        return size

    def build(expr: sympy.Expr) -> Node | int:
        if expr.is_Integer:
            return int(expr)
        if expr in bases:
            return bases[expr]
        if expr.is_Add:
            return canon.replay.total(*(build(term) for term in expr.args))
        if expr.is_Mul:
            return canon.replay.product(*(build(term) for term in expr.args))
        raise Unsupported(f"a size is neither a sum nor a product of input sizes: {expr}")

    return build(expr_of(size))


def _emit(node: Node, env: dict[Node, Any], canon: _Canon, bases: dict[sympy.Symbol, Node]) -> None:
    """Re-emit one node with canonical sizes."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor | list | tuple):
        return  # a size computation: rebuilt where it is used
    if node.target is operator.getitem:
        env[node] = canon.replay.call(
            operator.getitem, (env[node.args[0]], node.args[1]), like=node
        )
        return
    if _is_copy(node):
        env[node] = env[node.args[0]]
        return
    if node.target in RESHAPES or node.target is aten.expand.default:
        sizes = [_size_node(canon.size(dim), canon, bases) for dim in canon.axes.of(node)]
        env[node] = canon.replay.call(node.target, (env[node.args[0]], sizes), like=node)
        return

    def argument(arg: Node) -> Any:
        if arg in env:
            return env[arg]
        size = arg.meta["val"]
        if not isinstance(size, torch.SymInt):
            return size
        expr = expr_of(size)
        known = {symbol: canon.meaning.get(symbol) for symbol in expr.free_symbols}
        if any(meaning is None for meaning in known.values()):
            raise Unsupported(f"the meaning of the size {expr} is unknown", node)
        swap = {symbol: expr_of(known[symbol]) for symbol in known}
        new = sympy.expand(expr.subs(swap, simultaneous=True))
        hint = int(canon.symbols.shape_env.size_hint(new))
        made = canon.symbols.shape_env.create_symintnode(new, hint=hint)
        return _size_node(made, canon, bases)

    args = fx.map_arg(node.args, argument)
    kwargs = fx.map_arg(node.kwargs, argument)
    env[node] = canon.replay.call(node.target, args, kwargs, like=node)


def _is_copy(node: Node) -> bool:
    """Whether a node returns its operand unchanged: a cast to the same dtype, a full slice."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return False
    same = tensor_of(source).dtype == tensor_of(node).dtype and (
        tensor_of(source).device == tensor_of(node).device
    )
    if node.target in (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default):
        return same
    if node.target is aten.slice.Tensor:
        return tuple(map(expr_of, tensor_of(source).shape)) == tuple(
            map(expr_of, tensor_of(node).shape)
        )
    return node.target is aten.dropout.default and not node.args[2]


def analyzed(gm: GraphModule) -> tuple[GraphModule, AxisMap, tuple[int, ...]]:
    """Canonical form of a captured graph with its labels: ``propagate`` before and after."""
    canonical, index = canonicalize(gm, propagate(gm))
    return canonical, propagate(canonical), index
