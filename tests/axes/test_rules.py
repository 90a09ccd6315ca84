"""The law of the rule table: gathering along an axis that is not mixed commutes with the operator.

For every operator that has a rule: label one call of it, and for every axis that the rule says is
kept, gather along it before and after. Data are float64, so that only a wrong rule can differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from focus_compile.axes.axes import Axis, AxisMap, Dims
from focus_compile.axes.propagate import propagate
from focus_compile.axes.rules.table import NAMED, RULES, named, transfer
from focus_compile.graph.nodes import graph_inputs
from tests.axes.rule_examples import EXAMPLES, ON_CUDA, Example


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    """Collectives of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


RESIZED = {
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.expand.default,
}
"""Operators that are told the shape of their result; passes re-derive it from labels, as here."""


def graph_of(example: Example) -> tuple[GraphModule, Node, list[Tensor]]:
    """One call as a graph; tensors among the arguments become inputs."""
    graph, values = Graph(), list[Tensor]()

    def lift(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            node = graph.placeholder(f"input{len(values)}")
            node.meta["val"] = arg
            values.append(arg)
            return node
        return [lift(item) for item in arg] if isinstance(arg, list) else arg

    args = tuple(lift(arg) for arg in example.args)
    kwargs = {key: lift(arg) for key, arg in example.kwargs.items()}
    call = graph.call_function(example.op, args, kwargs)
    result = example.op(*example.args, **example.kwargs)
    call.meta["val"] = result
    graph.output(call)
    return GraphModule({}, graph), call, values


def results(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def gathered(x: Tensor, dims: Dims, axis: Axis, index: Tensor) -> Tensor:
    """``x`` gathered along an axis, which may be a factor of a dim."""
    sizes = [[int(factor.size) for factor in dim] for dim in dims]
    factors = [factor for dim in dims for factor in dim]
    if axis not in factors:
        return x
    split = x.reshape([size for dim in sizes for size in dim])
    picked = split.index_select(factors.index(axis), index)
    shape = []
    for dim in dims:
        size = 1
        for factor in dim:
            size *= len(index) if factor is axis else int(factor.size)
        shape.append(size)
    return picked.reshape(shape)


def resolved(axes: AxisMap, dims: Dims) -> Dims:
    return tuple(axes.resolve(dim) for dim in dims)


def kept_axes(axes: AxisMap, gm: GraphModule, call: Node) -> list[Axis]:
    """Axes of the inputs that the result has too, and that the rule does not call mixed."""
    mixed = {axis for dim in axes.mixed[call] for axis in axes.resolve(dim)}
    given = {axis for node in graph_inputs(gm) for dim in axes.of(node) for axis in dim}
    out = [axis for dims in axes.dims[call] for dim in resolved(axes, dims) for axis in dim]
    return [axis for axis in dict.fromkeys(out) if axis in given - mixed]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_gathering_commutes(example: Example) -> None:
    gm, call, values = graph_of(example)
    axes = propagate(gm)
    assert not axes.unruled and not axes.conflicts
    claimed = axes.dims[call]
    expected = results(call.meta["val"])
    for dims, value in zip(claimed, expected, strict=True):
        assert [int(axes.size(dim)) for dim in dims] == list(value.shape)
    kept = kept_axes(axes, gm, call)
    assert len(kept) >= example.kept
    for axis in kept:
        length = int(axis.size)
        index = torch.tensor([length - 1, 0])  # out of order, and fewer or as many
        inputs = {
            node: gathered(value, axes.of(node), axis, index).clone()
            for node, value in zip(graph_inputs(gm), values, strict=True)
        }
        wanted = [
            gathered(value, resolved(axes, dims), axis, index)
            for dims, value in zip(claimed, expected, strict=True)
        ]
        args, kwargs = map_arg((call.args, call.kwargs), inputs.__getitem__)
        if example.op in RESIZED:
            args = (*args[:1], list(wanted[0].shape), *args[2:])
        if example.op is torch.ops.aten.unflatten.int:
            dim, sizes = args[1:]
            args = (*args[:2], wanted[0].shape[dim : dim + len(sizes)])
        actual = results(example.op(*args, **kwargs))
        for one, two in zip(actual, wanted, strict=True):
            if example.op is torch.ops.aten.empty_like.default:
                assert one.shape == two.shape  # it has no values
                continue
            torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


def test_every_rule_has_an_example() -> None:
    """Those that run on CUDA alone share the rule of one that runs here."""
    assert {example.op for example in EXAMPLES} == set(RULES) - ON_CUDA
    here = RULES[torch.ops.aten._weight_int4pack_mm_for_cpu.default]
    assert {RULES[op] for op in ON_CUDA} == {here}


def test_rules_by_name() -> None:
    """bitsandbytes' linears of 4 bits, as an operator of that name and form is labelled."""
    library = torch.library.Library("bitsandbytes", "FRAGMENT")
    try:
        library.define("gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax) -> Tensor")
        library.impl("gemv_4bit", lambda x, codes, shape, _: x @ codes.view(shape).t(), "CPU")
        codes, scales = torch.rand(11 * 7, dtype=torch.float64), torch.rand(3)
        op = torch.ops.bitsandbytes.gemv_4bit.default
        x = torch.rand(3, 5, 7, dtype=torch.float64)
        test_gathering_commutes(Example(op, (x, codes, [11, 7], scales), kept=2))
    finally:
        library._destroy()
    (name, *_) = NAMED
    with pytest.raises(ValueError, match=f"{name} has a rule already"):
        named(name)(RULES[torch.ops.aten.t.default])


@pytest.mark.parametrize("op", [torch.ops.aten.sin.default, torch.ops.aten.to.other], ids=str)
def test_an_overload_has_one_rule(op: OpOverload) -> None:
    rule = RULES[op]
    with pytest.raises(ValueError, match=f"{op} has a rule already: {rule.__name__}"):
        transfer(op)(RULES[torch.ops.aten.t.default])
    assert RULES[op] is rule


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (torch.ops.aten.cumsum.default, (1,)),
        (torch.ops.aten.softmax.int, (1,)),
        (torch.ops.aten.mean.dim, ([1], True)),
        (torch.ops.aten.select.int, (1, 0)),
        (torch.ops.aten.slice.Tensor, (1, 1)),
    ],
    ids=str,
)
def test_mixing_is_seen(op: Any, args: tuple[Any, ...]) -> None:
    """The negative of the law: what is done along dim 1 is mixed along dim 1, and only there."""
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    gm, call, _ = graph_of(Example(op, (x, *args)))
    axes = propagate(gm)
    (node,) = graph_inputs(gm)
    assert {axis for dim in axes.mixed[call] for axis in axes.resolve(dim)} == set(axes.of(node)[1])


def test_an_operator_without_a_rule_has_fresh_axes() -> None:
    x = torch.randn(3, 5, 7)
    gm, call, _ = graph_of(Example(torch.ops.aten.flip.default, (x, [1])))
    axes = propagate(gm)
    (node,) = graph_inputs(gm)
    assert axes.unruled == {call}
    assert not {a for dim in axes.of(call) for a in dim} & {a for dim in axes.of(node) for a in dim}
