"""A few attention layers as one function: what the tests of passes trace, run and compare with.

No Dynamo, no module, no library: a call is a dictionary of tensors, and attention is an argument,
so that the same lines are the dense model and, with :class:`~tests.passes.step.Step`, the
reference. All sizes differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F

BATCH, TOKENS, PAST, HEADS, GROUPS, SIZE, HIDDEN, VOCAB, LAYERS = 4, 7, 5, 6, 2, 16, 10, 23, 3

Values = dict[str, Tensor]
Attend = Callable[[int, Tensor, Tensor, Tensor, Values], tuple[Tensor, ...]]
Between = Callable[[Tensor, Values], Tensor]
Model = Callable[[Values], tuple[Tensor, ...]]
Symbolic = Mapping[str, Sequence[int]]
NUMBERS: Symbolic = MappingProxyType({})


def call(
    batch: int = BATCH, tokens: int = TOKENS, past: int = PAST, layers: int = LAYERS
) -> Values:
    """The inputs of one call, weights included, by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values = {
        "ids": torch.randint(0, VOCAB, (batch, tokens), generator=generator),
        "mask": torch.rand((batch, 1, tokens, past + tokens), generator=generator) < 0.8,
        "table": draw(tokens, SIZE),
        "style": draw(batch, 1, HIDDEN),
        "embed": draw(VOCAB, HIDDEN),
        "head": draw(VOCAB, HIDDEN),
    }
    values["mask"][..., 0] = True
    for layer in range(layers):
        values[f"past{layer}_k"] = draw(batch, GROUPS, past, SIZE)
        values[f"past{layer}_v"] = draw(batch, GROUPS, past, SIZE)
        values[f"q{layer}"] = draw(HEADS * SIZE, HIDDEN)
        values[f"k{layer}"] = draw(GROUPS * SIZE, HIDDEN)
        values[f"v{layer}"] = draw(GROUPS * SIZE, HIDDEN)
        values[f"o{layer}"] = draw(HIDDEN, HEADS * SIZE) / 10
    return values


def dense(
    layer: int, query: Tensor, key: Tensor, value: Tensor, values: Values
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a layer to history and block, and what is cached."""
    key = torch.cat([values[f"past{layer}_k"], key], 2)
    value = torch.cat([values[f"past{layer}_v"], value], 2)
    mask = values["mask"]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out, key, value


def same(x: Tensor, values: Values) -> Tensor:
    return x


def model(values: Values, attend: Attend = dense, between: Between = same) -> tuple[Tensor, ...]:
    """Logits ``[B, T, V]``, then keys and values of every layer, history first.

    ``between`` changes the residual after each layer.
    """
    x = F.embedding(values["ids"], values["embed"]) + values["style"]
    batch, tokens = values["ids"].shape
    cache: list[Tensor] = []

    def heads(name: str) -> Tensor:
        return F.linear(x, values[name]).view(batch, tokens, -1, SIZE).transpose(1, 2)

    layer = 0
    while f"q{layer}" in values:
        query, key = heads(f"q{layer}") * values["table"], heads(f"k{layer}") * values["table"]
        out, *kv = attend(layer, query, key, heads(f"v{layer}"), values)
        cache += kv
        out = out.transpose(1, 2).reshape(batch, tokens, HEADS * SIZE)
        x = between(x + torch.tanh(F.linear(out, values[f"o{layer}"])), values)
        layer += 1
    return (F.linear(x, values["head"]), *cache)


def captured(values: Values, function: Model = model, symbolic: Symbolic = NUMBERS) -> GraphModule:
    """Pre-dispatch ATen of a call, as the backend captures it: under fake tensors.

    ``symbolic``: dims whose size is a symbol, by input.
    """
    names = list(values)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for name, value in values.items():
        dims = [DimDynamic.STATIC] * value.dim()
        for dim in symbolic.get(name, ()):
            dims[dim] = DimDynamic.DYNAMIC
        context = StatelessSymbolicContext(dynamic_sizes=dims)
        fakes.append(mode.from_tensor(value, symbolic_context=context))
    with mode, torch.no_grad():
        graph = make_fx(
            lambda *given: function(dict(zip(names, given, strict=True))), pre_dispatch=True
        )(*fakes)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
