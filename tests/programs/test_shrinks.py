"""The later layers really compute fewer rows: sizes are read out of the suffix as it runs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from unittest.mock import patch

import networkx as nx
import pytest
import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.nn.functional import scaled_dot_product_attention

from focus_compile.analysis import Analysis, analyze
from focus_compile.graph.nodes import data_flow
from focus_compile.runtime.executable import Executable
from tests.support.harness import VOCAB, Call, Run, Sizes, build_model, random_call, retained

aten = torch.ops.aten
LAYERS, BATCH, TOKENS, HISTORY = 4, 3, 11, 7
LINEARS_PER_LAYER = 7  # q, k, v, o, gate, up, down


class Rows(Interpreter):
    """Runs a graph and records the shapes of what its operators return.

    ``attention``: query, key and value that each call of an attention kernel gets.
    """

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.shapes: dict[Any, list[tuple[int, ...]]] = defaultdict(list)
        self.attention: list[tuple[tuple[int, ...], ...]] = []

    def run_node(self, n: Node) -> Any:
        with patch("focus_compile.ops.attention.scaled_dot_product_attention", self._attention):
            value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            self.shapes[n.target].append(tuple(value.shape))
        return value

    def _attention(self, *operands: Tensor, **rest: Any) -> Tensor:
        self.attention.append(tuple(tuple(operand.shape) for operand in operands))
        return scaled_dot_product_attention(*operands, **rest)


def recorded(program: Executable, run: Run, call: Call) -> tuple[Tensor, Rows, Rows]:
    """Logits of a call, and what its prefix and suffix computed."""
    prefix, suffix = Rows(program.prefix.half.gm), Rows(program.suffix.half.gm)
    program.prefix.compiled, program.suffix.compiled = prefix.run, suffix.run
    return run.logits(call), prefix, suffix


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def run(request: pytest.FixtureRequest) -> Run:
    return Run(build_model(Sizes(layers=LAYERS), request.param))


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_the_suffix(run: Run, seed: int) -> None:
    call = random_call(seed, run.model, BATCH, TOKENS, HISTORY, "float")
    kept = retained(run.logits(call))
    (program,) = run.executables
    logits, prefix, suffix = recorded(program, run, call)
    assert torch.equal(retained(logits), kept)
    count, most, fed = int(kept.sum()), int(kept.sum(1).max()), BATCH * TOKENS
    assert 0 < count < fed and BATCH * most > count  # rows differ: padding would show

    # q, k, v of layer 1 are the prefix's; everything after is the suffix's, and the head is too
    before = LINEARS_PER_LAYER + 3
    assert [shape[:-1] for shape in prefix.shapes[aten.linear.default]] == [(1, fed)] * before
    later = suffix.shapes[aten.linear.default]
    assert len(later) == LAYERS * LINEARS_PER_LAYER + 1 - before
    assert {shape[:-1] for shape in later} == {(1, count)}
    assert later[-1] == (1, count, VOCAB)
    for target in (aten.silu.default, aten.rsqrt.default):  # MLPs and norms
        assert len(suffix.shapes[target]) >= LAYERS - 1
        assert all(count in shape and fed not in shape for shape in suffix.shapes[target])


@pytest.mark.parametrize("seed", range(6))
def test_queries_of_the_suffix(run: Run, seed: int) -> None:
    """Attention after the cut: as many query rows as the longest row retains, all keys."""
    call = random_call(seed, run.model, BATCH, TOKENS, HISTORY, "float")
    kept = retained(run.logits(call))
    (program,) = run.executables
    _, prefix, suffix = recorded(program, run, call)
    most = int(kept.sum(1).max())
    assert most < TOKENS or seed > 0
    config = run.model.config
    heads, groups, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    share, keys = heads // groups, (BATCH, groups, HISTORY + TOKENS, size)
    assert share > 1  # grouped heads are folded into the queries, not expanded

    def site(queries: int) -> tuple[tuple[int, ...], ...]:
        return ((BATCH, groups, share * queries, size), keys, keys)

    assert prefix.attention == [site(TOKENS)]
    assert suffix.attention == [site(most)] * (LAYERS - 1)


def test_nothing_is_as_large_as_the_canvas_but_the_logits(run: Run) -> None:
    """The hidden size appears with the retained rows only."""
    call = random_call(1, run.model, BATCH, TOKENS, HISTORY, "float")
    kept = retained(run.logits(call))
    (program,) = run.executables
    _, _, suffix = recorded(program, run, call)
    hidden = run.model.config.hidden_size
    rows = {
        int(torch.tensor(shape[:-1]).prod())
        for shapes in suffix.shapes.values()
        for shape in shapes
        if shape and shape[-1] == hidden
    }
    assert rows == {int(kept.sum())}


LINES = torch.ops.focus.line_index.default


def test_every_path_to_the_logits_gathers_retained_tokens(run: Run) -> None:
    """Without the nodes that gather by what is retained, the embedding does not reach them."""
    call = random_call(1, run.model, BATCH, TOKENS, HISTORY, "float")
    with torch.no_grad():
        (analysis,) = analyses(run, call)
    gm = analysis.stages[-1][1]
    nodes = {node.name: node for node in gm.graph.nodes}
    flow = data_flow(gm)
    assert analysis.halves.logits is not None
    embedding, logits = nodes[analysis.plan.embedding], nodes[analysis.halves.logits.name]
    index = {nodes["tokens"], *gm.graph.find_nodes(op="call_function", target=LINES)}
    gathers = [node for node in gm.graph.nodes if index & set(node.all_input_nodes)]
    assert nx.has_path(flow, embedding, logits)
    flow.remove_nodes_from(gathers)
    assert not nx.has_path(flow, embedding, logits)


def analyses(run: Run, call: Call) -> list[Analysis]:
    seen: list[Analysis] = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(analyze(gm))
        return gm

    torch.compile(run.model.forward, backend=backend)(**call.kwargs(run.model))
    return seen
