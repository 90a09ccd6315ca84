"""Without eviction and delayed cache a focus model generates what an eager one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import focus_compile
from focus_compile import Generated
from tests.support.harness import MASK, Run, Sizes, build_model

OFF = {"alpha": 1e9, "delayed_cache": False}
STRATEGIES: dict[str, dict[str, Any]] = {
    "threshold": {"confidence_threshold": 0.05},
    "fixed": {"tokens_per_step": 2},
    "sequential": {"denoising_steps": 4},
    "sampling": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "confidence_threshold": 0.3},
}


def generate(model: nn.Module, strategy: str) -> Generated:
    """Three prompts of different lengths, two blocks."""
    seeded = torch.Generator().manual_seed(7)
    ids = torch.randint(0, MASK, (3, 7), generator=seeded)
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5, [0] * 6 + [1]])
    out = focus_compile.generate(
        model,
        ids,
        mask,
        max_new_tokens=18,
        block_length=9,
        mask_token_id=MASK,
        remasking_strategy="threshold" if strategy == "sampling" else strategy,
        generator=seeded,
        return_dict=True,
        **STRATEGIES[strategy],
    )
    return out


def steps(out: Generated) -> Tensor:
    return torch.stack(out.steps_per_block)


def assert_same(actual: Generated, expected: Generated) -> None:
    """Tokens and steps, which are not trivial."""
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(steps(actual), steps(expected))
    assert actual.forwards == expected.forwards
    assert len(actual.sequences[:, 7:].unique()) > 5


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(build_model(Sizes(layers=4)), OFF, dynamic=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_eager(run: Run, strategy: str) -> None:
    actual, expected = generate(run.compiled, strategy), generate(run.model, strategy)
    assert_same(actual, expected)
    assert actual.focus_steps == actual.forwards > 0
    assert expected.focus_steps == 0
    idle = sum(
        int((steps(actual).max(1, keepdim=True).values - steps(actual)).sum(1)[b]) for b in (0, 1)
    )
    assert actual.fed_fraction == actual.retained_fraction
    assert actual.retained_fraction == pytest.approx(1 - idle / (3 * actual.forwards))


def test_with_eviction_the_tokens_differ(run: Run) -> None:
    """Eviction is what was switched off: with it the same prompts end in other tokens."""
    with focus_compile.session(alpha=1.0):
        evicting = generate(run.compiled, "fixed")
    assert not torch.equal(evicting.sequences, generate(run.model, "fixed").sequences)
    assert evicting.retained_fraction < 1


@pytest.mark.usefixtures("dense_without_inductor")
def test_inductor_equals_eager() -> None:
    """Prefix and suffix compiled by Inductor; that dense is plain Inductor's: the cache trap."""
    model = build_model(Sizes(layers=3, heads=4, head_dim=8, hidden=24, intermediate=20))
    expected = generate(model, "fixed")
    focus = Run(model, OFF, inner=None, dynamic=True)
    assert_same(generate(focus.compiled, "fixed"), expected)
    assert focus.counts()[1] == expected.forwards
