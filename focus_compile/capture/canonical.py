"""Pre-dispatch ATen -> its canonical form: sizes by name, no size inputs, no copies.

Dynamo captures one model several times in a denoising loop (cropped or contiguous cache, static or
symbolic past). All of these have the same canonical form, so that it is compiled once: every axis
with a label has a name (batch unless it is 1, token, one history for each group of layers whose
histories are equal), sizes in ``view`` and ``expand`` are re-derived from labels and read off the
inputs, past K/V may have any strides. What layers compute alike (a slice of the mask, a view of
the rotary tables) is computed once, so that the passes pack it once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx import GraphModule, Node

from focus_compile.axes.axes import Axis, AxisMap
from focus_compile.axes.propagate import Labelled, propagate
from focus_compile.axes.rules.pointwise import NUMERIC
from focus_compile.axes.rules.table import ARANGES
from focus_compile.capture.names import Sizes, is_tensor
from focus_compile.capture.positions import arange, is_window, progression, window
from focus_compile.capture.sized import is_sized, sized
from focus_compile.errors import Unsupported
from focus_compile.graph.inputs import Argument, Input, static_tensor
from focus_compile.graph.nodes import expr_of, graph_inputs, graph_outputs, tensor_of
from focus_compile.graph.replay import Replay
from focus_compile.refusals import NO_RULE, RETURNS_SIZE
from focus_compile.torch_private import FakeTensorMode

__all__ = ["Canonical", "canonicalize"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonical:
    """A canonical graph.

    ``axes``: its labels. ``inputs``: what each of its inputs is. ``arguments``: and which argument
    of Dynamo's graph.
    """

    gm: GraphModule
    axes: AxisMap
    inputs: tuple[Input, ...]
    arguments: tuple[Argument, ...]


def canonicalize(
    captured: Labelled, held: Collection[int] = (), given: Sequence[Argument] | None = None
) -> Canonical:
    """Replay a graph from :func:`focus_compile.capture.capture.capture` with sizes by name.

    ``held``: its inputs, by position, whose memory has room for the block. ``given``: what its
    inputs are among the arguments of Dynamo's graph; None: these themselves.

    Raises:
        Unsupported: a size cannot be told from the labels.
    """
    gm, axes = captured.gm, captured.axes
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    sizes = Sizes(axes, Replay(gm, mode, keep_names=False))
    histories = _name_histories(gm, sizes)
    env: dict[Node, Any] = {}
    inputs: list[Input] = []
    arguments: list[Argument] = []
    given = given or [Argument(at) for at in range(len(graph_inputs(gm)))]
    for position, node in enumerate(graph_inputs(gm)):
        axes.current = node
        if isinstance(node.meta["val"], torch.Tensor):
            spec = _input_spec(node, f"input{len(inputs)}", sizes, histories)
            spec = replace(spec, held=position in held)
            env[node] = sizes.replay.placeholder(spec.name, static_tensor(mode, spec), node)
            for dim, extent in enumerate(spec.shape):
                if isinstance(extent, str):
                    sizes.reads.setdefault(extent, (env[node], dim))
            inputs.append(spec)
            arguments.append(given[position])
    sizes.inputs_named = True
    device = torch.device("cpu") if axes.entry is None else tensor_of(axes.entry.ids).device
    for position, node in enumerate(graph_inputs(gm)):
        if node.users and _is_number(node, sizes):
            spec = Input(f"input{len(inputs)}", (), torch.int64, device)
            number = sizes.replay.placeholder(spec.name, static_tensor(mode, spec), node)
            sizes.numbers[expr_of(node.meta["val"])] = number
            inputs.append(spec)
            arguments.append(given[position])
    for node in gm.graph.nodes:
        axes.current = node
        if node.op == "get_attr":
            env[node] = sizes.replay.attribute(node)
        elif node.op == "call_function":
            _emit(node, env, sizes)
    outputs = fx.map_arg(graph_outputs(gm), lambda node: _returned(node, env))
    canonical = sizes.replay.finish(outputs)
    canonical.graph.eliminate_dead_code()  # values of which only the shape was read
    canonical.recompile()
    return Canonical(canonical, propagate(canonical), tuple(inputs), tuple(arguments))


def _is_number(node: Node, sizes: Sizes) -> bool:
    """Whether an input is a number that is no size: where a block begins, say."""
    value = node.meta["val"]
    return isinstance(value, torch.SymInt) and sizes.meaning.get(expr_of(value)) is None


def _returned(node: Node, env: dict[Node, Any]) -> Any:
    if node not in env:
        raise Unsupported(RETURNS_SIZE, node)
    return env[node]


def _name_histories(gm: GraphModule, sizes: Sizes) -> set[Axis]:
    """Give history axes of one captured size one name; a static 0 or 1 stays a constant.

    Dynamo's guards hold the equality: it is the same symbol, or the same constant, there.
    """
    axes = sizes.axes
    groups = sizes.histories
    history_axes: set[Axis] = set()
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
                sizes.names[axis] = groups[size]
                history_axes.add(axis)
    return history_axes


def _input_spec(node: Node, name: str, sizes: Sizes, histories: set[Axis]) -> Input:
    axes, value = sizes.axes, tensor_of(node)
    dims = axes.of(node)
    shape = tuple(sizes.extent(dim) for dim in dims)
    for size, extent in zip(value.shape, shape, strict=True):
        if isinstance(size, torch.SymInt) and expr_of(size).is_Symbol:
            recorded = sizes.meaning.setdefault(expr_of(size), extent)
            if recorded != extent:
                sizes.meaning[expr_of(size)] = None  # two labels share a symbol
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


def _emit(node: Node, env: dict[Node, Any], sizes: Sizes) -> None:
    """Re-emit one node; sizes come from labels."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor | list | tuple):
        return  # a size computation: rebuilt where it is used
    args: Any = node.args
    kwargs: Any = node.kwargs
    if (source := _copy_source(node)) is not None:
        env[node] = env[source]
        return
    target: Any = node.target

    def argument(arg: Node) -> Any:
        if arg in env:
            return env[arg]
        if target in (*NUMERIC, *ARANGES) and isinstance(arg.meta["val"], torch.SymInt):
            return sizes.value(expr_of(arg.meta["val"]), node)
        return sizes.number_of(arg, node)

    if target in ARANGES:
        start, step = (fx.map_arg(operand, argument) for operand in progression(args))
        env[node] = arange(node, start, step, sizes)
        return
    if is_window(node, sizes):
        env[node] = window(node, env[args[0]], sizes)
        return
    if is_sized(node):
        target, args, kwargs = sized(node, env, sizes)
    else:
        args, kwargs = fx.map_arg((args, kwargs), argument)
        if target in NUMERIC and is_tensor(args[1]):
            target = NUMERIC[target]
    try:
        env[node] = sizes.replay.once(target, args, kwargs, like=node)
    except Unsupported as error:
        if node in sizes.axes.unruled:
            raise Unsupported(NO_RULE, node) from error
        raise
    sizes.check(node, env[node].meta["val"])


def _copy_source(node: Node) -> Node | None:
    """The operand that a node returns unchanged: a cast to the same dtype, a full slice."""
    overwritten = node.target is aten.copy.default
    source = node.args[overwritten] if len(node.args) > overwritten else None
    values = [operand.meta.get("val") for operand in (source, node) if isinstance(operand, Node)]
    if not isinstance(source, Node) or not all(isinstance(v, torch.Tensor) for v in values):
        return None
    before, after = tensor_of(source), tensor_of(node)
    same_type = before.dtype == after.dtype and before.device == after.device
    if node.target in (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default):
        return source if same_type else None
    if node.target is aten.slice.Tensor or (overwritten and same_type):
        shapes = (tuple(map(expr_of, value.shape)) for value in (before, after))
        return source if len(set(shapes)) == 1 else None
    return source if node.target is aten.dropout.default and not node.args[2] else None
