"""Writes in place become pure operators where nobody else can see them, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from focus_compile.capture.functional import functionalize


def writes(gm: GraphModule) -> list[str]:
    return [
        str(node.target)
        for node in gm.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]


def router(x: Tensor) -> Tensor:
    """A mask scattered in place, weights normed in place."""
    weights, index = x.topk(2, dim=-1)
    chosen = torch.zeros_like(x)
    chosen.scatter_(1, index, 1)
    weights /= weights.sum(-1, keepdim=True)
    return (x * chosen).sum(-1, keepdim=True) * weights


def through_a_view(x: Tensor) -> Tensor:
    """Written through a view, and only the view is read."""
    made = (x + 1).view(-1)
    made.mul_(2)
    return made.view(x.shape) + x


def twice(x: Tensor) -> Tensor:
    made = x * 2
    made.add_(1)
    before = made.sum()
    made.masked_fill_(made > 3, 0)
    return made + before


def narrower(x: Tensor) -> Tensor:
    """What is written takes the dtype of where it goes."""
    made = (x * 2).to(torch.bfloat16)
    made.mul_(x)
    return made


def under_a_view(x: Tensor) -> Tensor:
    """Views were taken before, and are read after: they are taken anew."""
    made = x * 2
    row = made[0]
    part = row.unsqueeze(-1)
    before = row + 1
    made.add_(1)
    return made + row + part.sum() + before


def of_booleans(x: Tensor) -> Tensor:
    """LLaDA's additive mask: a conversion to another dtype is a copy, and written in place."""
    bias = (x > 0).to(dtype=torch.float)
    bias.masked_fill_(bias == 0.0, -5.0)
    return x + bias


def converted(x: Tensor) -> Tensor:
    """An input under another dtype is another tensor; both are read after."""
    wide = x.double()
    wide.add_(1)
    return x + wide


def typed_as(x: Tensor) -> Tensor:
    wide = x.type_as(x.new_zeros(1, dtype=torch.float64))
    row = wide[0]
    row.mul_(3)
    return x + row


@pytest.mark.parametrize(
    "model",
    [
        router, through_a_view, twice, narrower, under_a_view, of_booleans, converted, typed_as,
    ],
)  # fmt: skip
def test_replaced(model: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    gm = make_fx(model, pre_dispatch=True)(x)
    assert writes(gm)
    functionalize(gm)
    gm.graph.lint()
    assert not writes(gm)
    made, expected = gm(x), model(x)
    assert made.dtype == expected.dtype and torch.equal(made, expected)


def into_a_row(x: Tensor) -> Tensor:
    """A view of an input is written."""
    x[0].add_(1)
    return x * 2


def then_a_row(x: Tensor) -> Tensor:
    """An input is written, and then a view of it."""
    made = x * 2
    x.add_(1)
    x[0].mul_(2)
    return made


def under_a_copy(x: Tensor) -> Tensor:
    """``reshape`` may have copied what is written later."""
    made = x * 2
    row = made.reshape(-1)
    made.add_(1)
    return made.sum() + row


def base_of_a_view(x: Tensor) -> Tensor:
    """The view is written, and what it is a view of is read after."""
    made = x * 2
    made[0].add_(1)
    return made


def itself(x: Tensor) -> Tensor:
    """What dropout and ``type_as`` return may be their operand."""
    made = x * 2
    same = torch.nn.functional.dropout(made, training=False).type_as(x)
    same.add_(1)
    return made


def at_least(x: Tensor) -> Tensor:
    """An input under another name; the operator's schema does not say so."""
    same = torch.atleast_2d(x)
    same.add_(1)
    return x * 2


def broadcast(x: Tensor) -> Tensor:
    same, _ = torch.broadcast_tensors(x, x + 1)
    same.add_(1)
    return x * 2


@pytest.mark.parametrize("model", [into_a_row, base_of_a_view, at_least, broadcast, under_a_copy])
def test_left_alone(model: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    gm = make_fx(model, pre_dispatch=True)(x.clone())
    before = writes(gm)
    functionalize(gm)
    assert writes(gm) == before
    assert torch.equal(gm(x.clone()), model(x.clone()))


def test_an_operand_that_comes_back() -> None:
    """The write stays where the graph reads the operand; traces of 2.14 read the write instead."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    gm = make_fx(itself, pre_dispatch=True)(x.clone())
    reads_operand = gm.graph.output_node().args[0].target is torch.ops.aten.mul.Tensor
    functionalize(gm)
    assert bool(writes(gm)) == reads_operand
    assert torch.equal(gm(x.clone()), itself(x.clone()))


def whole_input(x: Tensor, rows: Tensor) -> Tensor:
    x.add_(1)
    made = x * 2
    x.index_copy_(0, rows, made[:2])
    return made + x


def slots_of_an_input(x: Tensor, rows: Tensor) -> Tensor:
    x[:, rows] = x.new_ones(5, 2)
    return x * 2


def read_by_a_view(x: Tensor, rows: Tensor) -> Tensor:
    """An input is written, and a view of it is read after."""
    row = x[0]
    x.add_(1)
    return x * row + rows.sum()


@pytest.mark.parametrize("model", [whole_input, slots_of_an_input, read_by_a_view])
def test_inputs_that_are_written(model: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The graph leaves its input alone, and says what its value would be."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([2, 0])
    gm = make_fx(model, tracing_mode="symbolic", pre_dispatch=True)(x.clone(), rows)
    assert writes(gm)
    ((given, value),) = functionalize(gm).items()
    assert given.op == "placeholder" and not writes(gm)
    gm.graph.output_node().args = ((*gm.graph.output_node().args, value),)
    gm.graph.lint()
    gm.recompile()
    left, written = x.clone(), x.clone()
    result, last = gm(left, rows)
    assert torch.equal(result, model(written, rows))
    assert torch.equal(left, x) and torch.equal(last, written)


def test_a_row_of_an_input_that_is_written() -> None:
    """The second write is left alone: a graph that has one is refused."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    gm = make_fx(then_a_row, pre_dispatch=True)(x.clone())
    functionalize(gm)
    assert writes(gm) == ["aten.mul_.Tensor"]
