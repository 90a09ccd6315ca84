"""CUDA graphs with buckets: the same numbers, and nothing recorded anew once all sizes were seen.

On a CPU, where nothing is recorded, the same code runs the programs as they were captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import focus_compile
from tests.gpu.test_calls import SUBJECTS
from tests.gpu.where import Where
from tests.support.dialects import Draw, draw_call
from tests.support.harness import MASK, Run, Sizes, bound, build_model, eager_inner, retained

BUCKETS = [8, 16, 33, 66]
GRAPHS = {"mode": "reduce-overhead", "buckets": BUCKETS}


@dataclass
class Recordings:
    """How many CUDA graphs were recorded so far."""

    number: int = 0


@pytest.fixture
def recordings() -> Iterator[Recordings]:
    """Counts what enters ``torch.cuda.graph``, as Inductor does to record."""
    seen, enter = Recordings(), torch.cuda.graph.__enter__

    def counted(self: Any) -> Any:
        seen.number += 1
        return enter(self)

    with mock.patch.object(torch.cuda.graph, "__enter__", counted):
        yield seen


def generated(run: Run, where: Where, tokens: int) -> Tensor:
    ids = torch.randint(0, MASK, (3, 7), generator=torch.Generator().manual_seed(5))
    out = focus_compile.generate(
        run.compiled, ids.to(where.device), max_new_tokens=tokens, block_length=11,
        mask_token_id=MASK, confidence_threshold=0.2,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.clone()


@pytest.mark.parametrize("tokens", [11, 22], ids=["one-block", "two-blocks"])
@pytest.mark.parametrize(
    "options", [{}, {"buckets": BUCKETS}, GRAPHS], ids=["default", "buckets", "captured"]
)
def test_generates_the_same(
    where: Where, options: dict[str, Any], tokens: int, recordings: Recordings
) -> None:
    """Inductor's programs with the fused kernels, and the same graphs run as they are."""
    if not where.gpu and options != GRAPHS:
        pytest.skip("on a CPU one will do: tests/programs/test_buckets.py has them")
    model = build_model(Sizes(layers=3)).to(where.device)
    expected = generated(Run(model, {}, eager_inner, dynamic=True), where, tokens)
    run = Run(model, options, where.inner, dynamic=True)
    warm = 4 if where.gpu else 1
    for _ in range(warm):
        assert torch.equal(generated(run, where, tokens), expected)
    before = recordings.number
    assert (before > 0) == (where.gpu and options == GRAPHS)
    assert torch.equal(generated(run, where, tokens), expected)
    assert recordings.number == before, "recorded anew after warm-up"
    assert run.counts()[1] > 4


@pytest.mark.parametrize("name", ["qwen3", "static-cache", "llada-canvas"])
def test_calls(where: Where, name: str, recordings: Recordings) -> None:
    """Single evicting calls of a few sizes, thrice: logits of the captured graphs' own programs."""
    if not where.gpu and name != "qwen3":
        pytest.skip("on a CPU one will do")
    dialect = SUBJECTS[name]
    torch.manual_seed(0)
    model: Any = dialect.build().eval().to(where.device)
    wanted_draws = where.draws(4, 2)

    def logits(run: Run, draw: Draw) -> Tensor:
        with torch.no_grad(), focus_compile.session(alpha=1.2):
            out = dialect.logits(run.compiled(**dialect.arguments(model, draw)))
        return out.clone()

    plain = Run(model, {}, eager_inner, dynamic=True)
    draws, expected = [], []
    for seed in range(20):
        draw = draw_call(dialect, seed).to(where.device, torch.float32)
        found = logits(plain, draw)
        if len(draws) < wanted_draws and not bool(retained(found).all()):  # it evicts
            draws.append(draw)
            expected.append(found)
    assert len(draws) == wanted_draws
    run = Run(model, GRAPHS, where.inner, dynamic=True)
    before = 0
    for turn in range(4):
        for draw, wanted in zip(draws, expected, strict=True):
            actual = logits(run, draw)
            assert retained(actual).equal(retained(wanted))
            torch.testing.assert_close(actual, wanted, atol=10 * bound(wanted), rtol=0)
        if turn == 2:
            before = recordings.number
    assert recordings.number == before and (before > 0) == where.gpu
