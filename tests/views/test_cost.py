"""The cost model against FLOPs counted on what runs: eager models, and prefix and suffix."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeForCausalLM

import focus_compile
from focus_compile.ops.attention import attend
from focus_compile.ops.importance import importance
from focus_compile.views.cost import BATCH, FED, HISTORY, RETAINED, TOKENS
from focus_compile.views.cost import cost_of as formulas
from tests.support.dialects import DIALECTS, Dialect, Draw, Subject, sdar_moe
from tests.support.harness import MASK
from tests.support.models.dream import Dream
from tests.support.models.llada import LLaDA

ROWS, BLOCK = 3, 13
NAMES = (
    "llada",
    "llada-canvas",
    "dream",
    "gemma",
    "sdar-static",
    "llada2-dense",
    "llada2-sorted",
    "sdar-moe-grouped",
    "sdar-moe-batched",
)
aten, focus = torch.ops.aten, torch.ops.focus


def _grouped(rows: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Every row meets the weights of one expert."""
    return 2 * rows[0] * weights[-2] * weights[-1]


INSIDE = {focus.attend.default: attend, focus.importance.default: importance}
FORMULAS = {torch.ops.transformers.grouped_mm_fallback: _grouped, aten._grouped_mm: _grouped}


def counted(function: Callable[[], Any]) -> int:
    """FLOPs of eager operators; attention by the kernel that the counter knows."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


class _Open(Interpreter):
    """Runs what is behind the operators, so that its matrix products are counted."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(INSIDE.get(target, target), args, kwargs)


class Counting:
    """An inner compiler whose programs count their FLOPs."""

    def __init__(self) -> None:
        self.flops: list[int] = []

    def __call__(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            made: list[Any] = []
            self.flops.append(counted(lambda: made.append(_Open(graph).run(*values))))
            return made[0]

        return run


def draw_of(dialect: Dialect, history: int) -> Draw:
    """Rows whose masks stand at the same places, so that none is padded to the longest one."""
    generator = torch.Generator().manual_seed(1)
    masked = (torch.rand(1, BLOCK, generator=generator) < 0.8).expand(ROWS, -1)
    ids = torch.randint(0, MASK, (ROWS, BLOCK), generator=generator).masked_fill(masked, MASK)
    history = history if dialect.history else 0
    visible = torch.ones(ROWS, BLOCK, history + BLOCK, dtype=torch.bool)
    return Draw(ids, masked, visible, history, 1)


def cost_of(subject: Subject, draw: Draw) -> focus_compile.Cost:
    """As ``explain`` tells it: of the one graph that is captured."""
    story = focus_compile.explain(subject.model, **subject.dialect.arguments(subject.model, draw))
    (graph,) = story.graphs
    assert graph.cost is not None
    return graph.cost


@dataclass
class Counted:
    """A compiled dialect whose programs count their FLOPs, and what the formulas say."""

    inner: Counting
    subject: Subject
    cost: focus_compile.Cost


@pytest.fixture(scope="module")
def counted_of() -> Callable[[str], Counted]:
    """A dialect, compiled once; its formulas are for every history."""

    def make(name: str) -> Counted:
        inner = Counting()
        subject = Subject(DIALECTS[name], inner=inner)
        subject.focus(draw_of(subject.dialect, 7))
        (analysis,) = subject.analyses
        return Counted(inner, subject, formulas(analysis.canonical, analysis.plan))

    return functools.cache(make)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "history"),
    [(name, 7) for name in NAMES] + [("llada", 90), ("sdar-static", 90), ("sdar-moe-grouped", 90)],
)
def test_flops_are_those_that_run(
    name: str, history: int, counted_of: Callable[[str], Counted]
) -> None:
    """Dense and focus to 1 %, over steps that feed and retain ever fewer tokens."""
    known = counted_of(name)
    inner, subject, cost, dialect = known.inner, known.subject, known.cost, known.subject.dialect
    inner.flops.clear()
    draw = draw_of(dialect, history)
    slots = history + BLOCK + 5 if name == "sdar-static" else draw.history
    arguments = dialect.arguments(subject.model, draw)
    bias = -torch.arange(float(BLOCK)).expand(ROWS, -1)  # the leftmost are retained
    hook = focus_compile.Signal((0.0, 0.0), bias)
    dense = counted(lambda: subject.model(**arguments))
    expected, _ = cost.flops(ROWS, BLOCK, slots, 0, 0)
    assert dense == pytest.approx(expected, rel=0.01)
    fed = []
    with focus_compile.session(alpha=2.0, signal=hook) as session:
        for _ in range(6):
            before = len(inner.flops)
            subject.focus(draw)
            ran = sum(inner.flops[before:])
            counts = session.stats.fed_per_step[-1], session.stats.retained_per_step[-1]
            _, expected = cost.flops(ROWS, BLOCK, slots, *counts)
            assert ran == pytest.approx(expected, rel=0.01)
            fed.append(counts[0])
            assert session.retain_mask is not None
            assert counts[1] < counts[0] and session.retain_mask.sum(1).unique().numel() == 1
            decoded = session.retain_mask & (draw.ids == MASK)
            decoded &= decoded.long().cumsum(1) == 1
            draw = Draw(
                draw.ids.masked_fill(decoded, 5), draw.masked, draw.visible, draw.history, 1
            )
    assert len(inner.flops) == 12
    assert fed[0] == ROWS * BLOCK > fed[-1]


@torch.no_grad()
def test_attention_is_counted() -> None:
    """Its share of all FLOPs by hand: more than a third, in eager and in the formula."""
    subject = Subject(DIALECTS["sdar-moe-grouped"])
    draw = draw_of(subject.dialect, 90)
    config = subject.model.config
    heads = config.num_attention_heads * config.head_dim
    attention = 4 * ROWS * BLOCK * (90 + BLOCK) * heads * config.num_hidden_layers
    dense = counted(lambda: subject.model(**subject.dialect.arguments(subject.model, draw)))
    assert attention / dense > 0.3
    cost = cost_of(subject, draw)
    per_key = cost.dense.coeff(HISTORY) * HISTORY
    found = int(per_key.subs({BATCH: ROWS, TOKENS: BLOCK, HISTORY: 90}))
    assert found == attention * 90 // (90 + BLOCK)


class Bytes(TorchDispatchMode):
    """Operands and results of matrix products and attention, as eager runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (aten.mm.default, aten.bmm.default):
            self._add(*args[:2], made)
        elif func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            self._add(*args[:3], made[0])
        return made

    def _add(self, *values: Tensor) -> None:
        self.total += sum(value.numel() * value.element_size() for value in values)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_operands(dtype: torch.dtype) -> None:
    subject = Subject(DIALECTS["llada-canvas"], dtype=dtype)
    draw = draw_of(subject.dialect, 0)
    moved = Bytes()
    with moved:
        subject.model(**subject.dialect.arguments(subject.model, draw))
    dense, focus = cost_of(subject, draw).bytes(ROWS, BLOCK, 0, ROWS * BLOCK, 2 * ROWS)
    assert moved.total == pytest.approx(dense, rel=0.01)
    assert 0.3 * dense < focus < dense  # weights and keys are read as before


def test_limits() -> None:
    """Long blocks: L / (fed + (L - 1) retained + 1); a budget: what is retained in its place."""
    subject = Subject(DIALECTS["llada-canvas"])
    cost = cost_of(subject, draw_of(subject.dialect, 0))
    fed, retained = sympy.symbols("fed retained", positive=True)
    layers = subject.model.layers
    found = cost.limit_of_long_blocks(fed, retained)
    assert sympy.simplify(found - layers / (fed + (layers - 1) * retained + 1)) == 0
    near = cost.speedup(ROWS, 10**9, 0, ROWS * 10**9, ROWS * 10**8)
    assert near == pytest.approx(float(found.subs({fed: 1, retained: 0.1})), rel=1e-3)
    budget = cost.limit_of_budget(sympy.Rational(3, 2), sympy.Integer(2))
    assert budget.free_symbols == {BATCH, TOKENS, FED} and RETAINED not in budget.free_symbols
    sizes = {BATCH: ROWS, TOKENS: BLOCK, FED: ROWS * BLOCK}
    expected = cost.speedup(ROWS, BLOCK, 0, ROWS * BLOCK, 3 * ROWS)
    assert float(budget.subs(sizes)) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["llada", "dream", "sdar-moe-grouped"])
def test_more_layers(name: str) -> None:
    """A model of three layers tells what five would cost."""
    found = []
    for layers in (3, 5):
        dialect = DIALECTS[name]
        subject = Subject(dialect)
        subject.model = with_layers(name, layers)
        found.append(cost_of(subject, draw_of(dialect, 7)))
    few, many = found
    count = sympy.Symbol("L")
    for made in (few.of_layers(5), few.of_layers(count)):
        for part in ("dense", "focus", "dense_bytes", "focus_bytes"):
            formula = getattr(made, part).subs(count, 5)
            assert sympy.expand(formula - getattr(many, part)) == 0
    assert (few.layers, many.layers) == (3, 5)


def with_layers(name: str, layers: int) -> torch.nn.Module:
    if name == "llada":
        return LLaDA(groups=2, layers=layers).eval()
    if name == "dream":
        return Dream(layers=layers).eval()
    config = copy.deepcopy(sdar_moe("grouped_mm").config)
    config.num_hidden_layers = layers
    return Qwen3MoeForCausalLM(config).eval()


def test_two_layers_do_not_tell() -> None:
    subject = Subject(DIALECTS["llada"])
    subject.model = with_layers("llada", 2)
    with pytest.raises(ValueError, match="no layer after layer 1"):
        cost_of(subject, draw_of(subject.dialect, 7)).of_layers(5)


def test_speedup_of_arrays() -> None:
    subject = Subject(DIALECTS["dream"])
    cost = cost_of(subject, draw_of(subject.dialect, 7))
    kept = np.array([3.0, 9.0, 39.0])
    ratios = cost.speedup(ROWS, BLOCK, 7, 39, kept)
    for ratio, count in zip(ratios, kept, strict=True):
        dense, focus = cost.flops(ROWS, BLOCK, 7, 39, int(count))
        assert ratio == pytest.approx(dense / focus)
    assert ratios[0] > ratios[1] > ratios[2]
