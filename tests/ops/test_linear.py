"""The matrix product that prefix and suffix call on a CPU, and where it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.nn.functional import linear

from focus_compile import backend
from focus_compile.programs.lower import lower
from tests.support.harness import Run, Sizes, build_model, random_call

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (1, 7), (2, 3, 5), (1, 130)])
def test_equals_linear(rows: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(*rows, 33, generator=generator), torch.randn(50, 33)
    offset = torch.randn(50) if bias else None
    out = torch.ops.focus.linear(x, weight, offset)
    exact = linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert out.shape == exact.shape and out.is_contiguous()
    assert (out - exact).abs().max().item() <= 1e-5 * exact.abs().max().item()


def test_weights_are_read_when_called() -> None:
    """Nothing of a weight is kept: it may be trained, or loaded anew, between two calls."""
    x, weight = torch.randn(1, 4, 8), torch.randn(6, 8)
    torch.ops.focus.linear(x, weight, None)
    weight.zero_()
    assert not torch.ops.focus.linear(x, weight, None).any()


@pytest.mark.parametrize(
    ("dtype", "target"),
    [(torch.float32, "focus.linear.default"), (torch.bfloat16, "aten.linear.default")],
    ids=["fp32", "bf16"],
)
def test_only_fp32_is_replaced(dtype: torch.dtype, target: str) -> None:
    graph = Graph()
    nodes = [graph.placeholder(name) for name in ("x", "weight")]
    for node, shape in zip(nodes, ((1, 3, 4), (5, 4)), strict=True):
        node.meta["val"] = torch.zeros(shape, dtype=dtype)
    graph.output(graph.call_function(torch.ops.aten.linear.default, tuple(nodes)))
    given = GraphModule({}, graph)
    targets = [str(node.target) for node in lower(given).graph.nodes if "linear" in node.name]
    assert targets == [target]
    assert any(node.target is torch.ops.aten.linear.default for node in given.graph.nodes)


def test_inductor_gets_it_in_prefix_and_suffix_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def compile_nothing(graph: GraphModule, _: Any, **__: Any) -> GraphModule:
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph

    monkeypatch.setattr(backend, "compile_fx", compile_nothing)
    run = Run(build_model(Sizes(layers=3)), inner=None)
    run.logits(random_call(1, run.model, 2, 6, 4))
    dense, *halves = seen
    assert len(halves) == 2 and not any("focus" in target for target in dense)
    for targets in halves:
        assert "focus.linear.default" in targets and "aten.linear.default" not in targets
