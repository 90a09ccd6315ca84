"""A cache that holds room for the block becomes one that grows; other writes stay as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from focus_compile.capture.held import hold
from focus_compile.graph.nodes import aten, graph_inputs, tensor_of

BATCH, HEADS, HISTORY, TOKENS, SIZE = 3, 2, 5, 4, 6
KEYS = HISTORY + TOKENS


def captured(model: Callable[..., Tensor], new: int = TOKENS) -> GraphModule:
    past, block = torch.randn(BATCH, HEADS, KEYS, SIZE), torch.randn(BATCH, HEADS, new, SIZE)
    gm = make_fx(model, pre_dispatch=True, tracing_mode="fake")(past, block)
    gm.graph.eliminate_dead_code()
    return gm


def by_start(past: Tensor, new: Tensor) -> Tensor:
    past[:, :, past.shape[2] - new.shape[2] :] = new
    return past.sum(-1) * 2


def from_the_end(past: Tensor, new: Tensor) -> Tensor:
    past[:, :, -new.shape[2] :] = new
    return past.sum(-1) * 2


@pytest.mark.parametrize("model", [by_start, from_the_end])
def test_held(model: Callable[..., Tensor]) -> None:
    """Same numbers of a history that is shorter; nothing is written."""
    gm = captured(model)
    past, new = graph_inputs(gm)
    assert hold(gm) == {past: 2}
    assert not any(node.target is aten.copy_.default for node in gm.graph.nodes)
    assert len(gm.graph.find_nodes(op="call_function", target=aten.cat.default)) == 1
    assert tensor_of(past).shape[2] + tensor_of(new).shape[2] == KEYS
    keys, block = torch.randn(BATCH, HEADS, KEYS, SIZE), torch.randn(BATCH, HEADS, TOKENS, SIZE)
    history = keys[:, :, :HISTORY].clone()
    expected = model(keys, block)
    assert torch.equal(gm(history, block), expected)


def read_before(past: Tensor, new: Tensor) -> Tensor:
    before = past.sum(-1)
    past[:, :, past.shape[2] - new.shape[2] :] = new
    return past.sum(-1) + before


def elsewhere(past: Tensor, new: Tensor) -> Tensor:
    past[:, :, : new.shape[2]] = new
    return past.sum(-1)


def twice(past: Tensor, new: Tensor) -> Tensor:
    past[:, :, past.shape[2] - new.shape[2] :] = new
    past[:, :, past.shape[2] - new.shape[2] :] = 2 * new
    return past.sum(-1)


def another_dtype(past: Tensor, new: Tensor) -> Tensor:
    past[:, :, past.shape[2] - new.shape[2] :] = new.double()
    return past.sum(-1)


def stepped(past: Tensor, new: Tensor) -> Tensor:
    past[:, :, 1::2] = new
    return past.sum(-1)


def view_is_read(past: Tensor, new: Tensor) -> Tensor:
    block = past[:, :, past.shape[2] - new.shape[2] :]
    block.copy_(new)
    return past.sum(-1) + block.sum()


@pytest.mark.parametrize(
    "model", [read_before, elsewhere, twice, another_dtype, stepped, view_is_read]
)
def test_left_alone(model: Callable[..., Tensor]) -> None:
    """The backend refuses these: an operator writes into its input."""
    gm = captured(model)
    before = gm.code
    assert any(node.target is aten.copy_.default for node in gm.graph.nodes)
    assert hold(gm) == {}
    assert gm.code.count("copy_") == before.count("copy_")
