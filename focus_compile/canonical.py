"""Pre-dispatch ATen -> its canonical form: sizes by name, no size inputs, no copies.

Dynamo captures one model several times in a denoising loop (cropped or contiguous cache, static or
symbolic past). All of these have the same canonical form, so that it is compiled once: every axis
with a label has a name (batch unless it is 1, token, one history for each group of layers whose
histories are equal), sizes in ``view`` and ``expand`` are re-derived from labels and read off the
inputs, past K/V may have any strides. What layers compute alike (a slice of the mask, a view of
the rotary tables) is computed once, so that the passes pack it once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from focus_compile.axes import (
    Axis,
    AxisMap,
    Dim,
    Role,
    expr_of,
    graph_inputs,
    graph_outputs,
    tensor_of,
)
from focus_compile.errors import Unsupported
from focus_compile.inputs import Extent, Input, generic, static_tensor
from focus_compile.labels import propagate
from focus_compile.replay import Replay
from focus_compile.rules import ARANGES, RESHAPES, argument

__all__ = ["Canonical", "canonicalize"]

aten = torch.ops.aten
_NAMES = {Role.BATCH: "batch", Role.TOKEN: "token"}


@dataclass(frozen=True)
class Canonical:
    """A canonical graph.

    ``axes``: its labels. ``inputs``: what each of its inputs is. ``arguments``: for each of them,
    the index of the captured graph's input.
    """

    gm: GraphModule
    axes: AxisMap
    inputs: tuple[Input, ...]
    arguments: tuple[int, ...]


@dataclass
class _Canon:
    """The state of one canonicalisation."""

    axes: AxisMap
    replay: Replay
    names: dict[Axis, Extent] = field(default_factory=dict)
    meaning: dict[sympy.Symbol, Extent | None] = field(default_factory=dict)
    reads: dict[str, tuple[Node, int]] = field(default_factory=dict)
    histories: dict[sympy.Expr, Extent] = field(default_factory=dict)

    def name(self, axis: Axis) -> Extent:
        """The extent of an axis that is not a sum."""
        if axis not in self.names:
            size = self.axes.expr(axis.size)
            if axis.role is not None:
                self.names[axis] = _NAMES[axis.role]
            elif size.is_Integer:
                self.names[axis] = int(size)
            else:
                self.names[axis] = f"extra{len(self.names)}"
        return self.names[axis]

    def extent(self, dim: Dim) -> Extent:
        """The extent of a dim of an input."""
        number, named = 1, list[Extent]()
        for axis in self.axes.resolve(dim):
            extent = self.name(axis) if axis.sum is None else self._total(axis.sum)
            if isinstance(extent, int):
                number *= extent
            else:
                named.append(extent)
        if not named:
            return number
        if number != 1 or len(named) != 1:
            raise Unsupported("an input folds two axes into one dimension", self.axes.current)
        return named[0]

    def _total(self, parts: tuple[Dim, ...]) -> Extent:
        extents = tuple(self.extent(part) for part in parts)
        return sum(extents) if all(isinstance(part, int) for part in extents) else extents  # type: ignore

    def argument(self, extent: Extent) -> Node | int:
        """An extent as a graph argument: read off an input."""
        if isinstance(extent, int):
            return extent
        if isinstance(extent, tuple):
            return self.replay.total(*(self.argument(part) for part in extent))
        if extent not in self.reads:
            raise Unsupported(f"no input has the size {extent}", self.axes.current)
        return self.replay.size(*self.reads[extent])

    def size(self, dim: Dim) -> Node | int:
        """The size of a dim as a graph argument."""
        return self.replay.product(*(self._size(axis) for axis in self.axes.resolve(dim)))

    def _size(self, axis: Axis) -> Node | int:
        if axis.order is not None:
            return self.size(axis.order)
        if axis.sum is not None:
            return self.replay.total(*(self.size(part) for part in axis.sum))
        return self.argument(self.name(axis))

    def number(self, dim: Dim) -> int:
        """The generic number for the size of a dim."""
        out = 1
        for axis in self.axes.resolve(dim):
            if axis.order is not None:
                out *= self.number(axis.order)
            elif axis.sum is not None:
                out *= sum(self.number(part) for part in axis.sum)
            else:
                out *= generic(self.name(axis))
        return out

    def position(self, expr: sympy.Expr, node: Node) -> Node | int:
        """Where something starts, as a graph argument.

        A number that is the length of a history when the graph is captured is that length: the
        graph runs only where its guards hold, and there the two are the same.
        """
        expr = self.axes.expr(expr)
        if expr in self.histories:
            return self.argument(self.histories[expr])
        return self.expression(expr, node)

    def expression(self, expr: sympy.Expr, node: Node) -> Node | int:
        """A size computed by the captured graph, as a graph argument."""
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            extent = self.meaning.get(expr)
            if extent is None:
                raise Unsupported(f"the meaning of the size {expr} is unknown", node)
            return self.argument(extent)
        parts = [self.expression(part, node) for part in expr.args]
        if expr.is_Add:
            return self.replay.total(*parts)
        if expr.is_Mul:
            return self.replay.product(*parts)
        raise Unsupported(f"the size {expr} is neither a sum nor a product", node)


def canonicalize(gm: GraphModule) -> Canonical:
    """Replay a captured graph with sizes by name.

    Args:
        gm: from :func:`focus_compile.capture.capture`.

    Raises:
        Unsupported: a size cannot be told from the labels.
    """
    axes = propagate(gm)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    canon = _Canon(axes, Replay(gm, mode, keep_names=False))
    histories = _name_histories(gm, canon)
    env: dict[Node, Any] = {}
    inputs: list[Input] = []
    arguments: list[int] = []
    for position, node in enumerate(graph_inputs(gm)):
        axes.current = node
        if isinstance(node.meta["val"], torch.Tensor):
            given = _input(node, f"input{len(inputs)}", canon, histories)
            env[node] = canon.replay.placeholder(given.name, static_tensor(mode, given), node)
            for dim, extent in enumerate(given.shape):
                if isinstance(extent, str):
                    canon.reads.setdefault(extent, (env[node], dim))
            inputs.append(given)
            arguments.append(position)
    for node in gm.graph.nodes:
        axes.current = node
        if node.op == "get_attr":
            env[node] = canon.replay.attribute(node)
        elif node.op == "call_function":
            _emit(node, env, canon)
    outputs = fx.map_arg(graph_outputs(gm), lambda node: _returned(node, env))
    canonical = canon.replay.finish(outputs)
    return Canonical(canonical, propagate(canonical), tuple(inputs), tuple(arguments))


def _returned(node: Node, env: dict[Node, Any]) -> Any:
    if node not in env:
        raise Unsupported("the graph returns a size", node)
    return env[node]


def _name_histories(gm: GraphModule, canon: _Canon) -> set[Axis]:
    """Give history axes of one captured size one name; a static 0 or 1 stays a constant.

    Dynamo's guards hold the equality: it is the same symbol, or the same constant, there.
    """
    axes = canon.axes
    groups = canon.histories
    found: set[Axis] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is not aten.cat.default:
            continue
        for dim in axes.of(node):
            history = axes.history(dim)
            for axis in axes.resolve(history) if history else ():
                size = axes.expr(axis.size)
                if size not in groups:
                    name = f"history{len(groups) or ''}"
                    groups[size] = int(size) if size in (0, 1) else name
                canon.names[axis] = groups[size]
                found.add(axis)
    return found


def _input(node: Node, name: str, canon: _Canon, histories: set[Axis]) -> Input:
    axes, value = canon.axes, tensor_of(node)
    dims = axes.of(node)
    shape = tuple(canon.extent(dim) for dim in dims)
    for old, new in zip(value.shape, shape, strict=True):
        if isinstance(old, torch.SymInt) and expr_of(old).is_Symbol:
            known = canon.meaning.setdefault(expr_of(old), new)
            if known != new:
                canon.meaning[expr_of(old)] = None  # two labels share a symbol
    symbolic = not all(isinstance(extent, int) for extent in shape)
    return Input(
        name=name,
        shape=shape,
        dtype=value.dtype,
        device=value.device,
        stride=None if symbolic else tuple(int(step) for step in value.stride()),
        strided=symbolic and any(axis in histories for dim in dims for axis in dim),
        parameter=isinstance(value, torch.nn.Parameter),
    )


def _emit(node: Node, env: dict[Node, Any], canon: _Canon) -> None:
    """Re-emit one node; sizes come from labels."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor | list | tuple):
        return  # a size computation: rebuilt where it is used
    args: Any = node.args
    kwargs: Any = node.kwargs
    if _is_copy(node):
        env[node] = env[args[0]]
        return
    if node.target in RESHAPES or node.target is aten.expand.default:
        sizes = [canon.size(dim) for dim in canon.axes.of(node)]
        args = (env[args[0]], sizes)
    else:

        def argument(arg: Node) -> Any:
            if arg in env:
                return env[arg]
            size = arg.meta["val"]
            if isinstance(size, torch.SymFloat):
                return float(size)  # a constant of the module: Dynamo guards that it stays so
            return canon.expression(expr_of(size), node) if isinstance(size, torch.SymInt) else size

        if node.target in ARANGES:
            start, step = (fx.map_arg(part, argument) for part in _progression(args))
            env[node] = _arange(node, start, step, canon)
            return
        if node.target is aten.slice.Tensor and _is_window(node, canon):
            env[node] = _window(node, env[args[0]], canon)
            return
        args, kwargs = fx.map_arg((args, kwargs), argument)
    env[node] = canon.replay.once(node.target, args, kwargs, like=node)
    _check_sizes(node, env[node].meta["val"], canon)


def _progression(args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Start and step of an ``arange``."""
    return (0 if len(args) == 1 else args[0]), (args[2] if len(args) == 3 else 1)


def _arange(node: Node, start: Any, step: Any, canon: _Canon) -> Node:
    """``arange`` as long as its label says."""
    (dim,) = canon.axes.of(node)
    kwargs = dict(node.kwargs) | {"dtype": tensor_of(node).dtype}
    # every list of tokens is an axis of its own, even where two are as long
    make = canon.replay.call if canon.axes.listed(dim) else canon.replay.once
    out = make(aten.arange.default, (canon.size(dim),), kwargs, like=node)
    if step != 1:
        out = canon.replay.once(aten.mul.Tensor, (out, step), like=node)
    if start != 0:
        out = canon.replay.once(aten.add.Tensor, (out, start), like=node)
    _check_sizes(node, out.meta["val"], canon)
    return out


def _is_window(node: Node, canon: _Canon) -> bool:
    """Whether a slice is as long as an axis with a name: its bounds depend on sizes."""
    dim = canon.axes.of(node)[_sliced(node)]
    return any(axis.role is not None or axis.sum is not None for axis in canon.axes.resolve(dim))


def _sliced(node: Node) -> int:
    return int(argument(node, 1, "dim", 0)) % tensor_of(node).dim()


def _window(node: Node, source: Node, canon: _Canon) -> Node:
    """A slice as long as its label says: of a table by position, or of the keys' axis.

    Rows are picked instead of sliced: a table is as long as the model's longest text, which no
    generic number fits.
    """
    at = _sliced(node)
    start: Any = argument(node, 2, "start", 0) or 0
    start = expr_of(start.meta["val"] if isinstance(start, Node) else start)
    if start.is_negative:
        start += expr_of(tensor_of(_operand(node)).shape[at])
    size = canon.size(canon.axes.of(node)[at])
    kwargs = {"device": tensor_of(node).device}
    rows = canon.replay.once(aten.arange.default, (size,), kwargs, like=node)
    first = canon.position(start, node)
    if first != 0:
        rows = canon.replay.once(aten.add.Tensor, (rows, first), like=node)
    out = canon.replay.once(aten.index_select.default, (source, at, rows), like=node)
    _check_sizes(node, out.meta["val"], canon)
    return out


def _operand(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _check_sizes(node: Node, made: Any, canon: _Canon) -> None:
    """Refuse an operator whose result is not as long as its labels say."""
    results = [made] if isinstance(made, torch.Tensor) else made
    for dims, result in zip(canon.axes.dims[node], results, strict=True):
        if [canon.number(dim) for dim in dims] != list(result.shape):
            if node in canon.axes.unruled:
                raise Unsupported("no rule says how this operator treats the token axis", node)
            raise Unsupported("this operator changes the length of the token axis", node)


def _is_copy(node: Node) -> bool:
    """Whether a node returns its operand unchanged: a cast to the same dtype, a full slice."""
    source = node.args[0] if node.args else None
    values = [part.meta.get("val") for part in (source, node) if isinstance(part, Node)]
    if not isinstance(source, Node) or not all(isinstance(v, torch.Tensor) for v in values):
        return False
    old, new = tensor_of(source), tensor_of(node)
    if node.target in (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default):
        return old.dtype == new.dtype and old.device == new.device
    if node.target is aten.slice.Tensor:
        return tuple(map(expr_of, old.shape)) == tuple(map(expr_of, new.shape))
    return node.target is aten.dropout.default and not node.args[2]
