"""Sanity of reference generation: dense without eviction, a prefix first, stable in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.reference.generation import Decoding, Strategy, generate_batch, generate_row
from tests.reference.state import Config
from tests.reference.tiny import HISTORY, MASK, TOKENS, block_causal, eager, tiny_model, tiny_prompt

DENSE = Config(alpha=1e9, delayed_cache=False)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return tiny_prompt()


@pytest.mark.parametrize("seed", range(3))
def test_first_step_of_a_block_keeps_a_prefix(model: Qwen3ForCausalLM, seed: int) -> None:
    prompt = torch.randint(0, MASK, (5 + seed,), generator=torch.Generator().manual_seed(seed))
    steps = generate_row(model, prompt, blocks=1, block_length=TOKENS, mask_id=MASK).steps
    assert steps[0].fed == list(range(TOKENS))
    assert steps[0].retained == list(range(len(steps[0].retained)))
    assert len(steps[0].retained) < TOKENS


def test_target_follows_the_block_average(model: Qwen3ForCausalLM, prompt: Tensor) -> None:
    """K of every step from the tokens decoded so far in its block; a commit starts anew."""
    decoding = Decoding("fixed", tokens_per_step=2)
    generated = generate_row(
        model, prompt, blocks=2, block_length=TOKENS, mask_id=MASK, decoding=decoding
    )
    for block in range(2):
        counts: list[int] = []
        for step in (s for s in generated.steps if s.block == block):
            left = TOKENS - sum(counts)
            average = sum(counts) / len(counts) if counts else 1.0
            assert step.k == min(left, math.ceil(max(average, 1.0) * 1.5))
            counts.append(len(step.decoded))
        assert sum(counts) == TOKENS
    assert {step.k for step in generated.steps} >= {2, 3}
    assert any(len(step.retained) < len(step.fed) for step in generated.steps)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["threshold", "fixed", "sequential"])
def test_generation_without_eviction_is_dense_decoding(
    model: Qwen3ForCausalLM, prompt: Tensor, strategy: Strategy
) -> None:
    """Against transformers on the whole sequence under a block-causal mask."""
    per_step, threshold, blocks = 2, 0.3, 2
    generated = generate_row(
        model,
        prompt,
        blocks=blocks,
        block_length=TOKENS,
        mask_id=MASK,
        config=DENSE,
        decoding=Decoding(strategy, threshold, per_step),
    )
    sequence, steps = prompt, []
    for _ in range(blocks):
        sequence = torch.cat([sequence, torch.full((TOKENS,), MASK)])
        start = len(sequence) - TOKENS
        masked, count = torch.ones(TOKENS, dtype=torch.bool), 0
        visible = block_causal(HISTORY, len(sequence))
        while masked.any():
            probability, token = eager(model, sequence, visible)[start:].softmax(-1).max(-1)
            probability = probability.masked_fill(~masked, -1)
            order = probability.argsort(descending=True)[: int(masked.sum())]
            passing = (probability >= threshold).nonzero().flatten()
            chosen = {
                "threshold": passing if len(passing) else order[:1],
                "fixed": order[:per_step],
                "sequential": masked.nonzero().flatten()[:per_step],
            }[strategy]
            sequence[start + chosen], masked[chosen] = token[chosen], False
            count += 1
        steps.append(count)
    assert generated.margin > 1e-4
    assert generated.tokens == sequence[HISTORY:].tolist()
    assert generated.steps_per_block == steps
    if strategy == "threshold":
        assert len({len(step.decoded) for step in generated.steps}) > 1


def test_float64_agrees_with_float32(model: Qwen3ForCausalLM, prompt: Tensor) -> None:
    """Same decisions along a whole generation, unless the margins say that one was a near tie."""
    double = Qwen3ForCausalLM(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    settings: dict[str, Any] = {"blocks": 1, "block_length": TOKENS, "mask_id": MASK}
    single, exact = (generate_row(m, prompt, **settings) for m in (model, double))
    assert 1e-4 < single.margin < math.inf
    assert single.tokens == exact.tokens
    assert [s.retained for s in single.steps] == [s.retained for s in exact.steps]
    assert exact.history[0][0].dtype == torch.float64
    for (key, value), (key64, value64) in zip(single.history, exact.history, strict=True):
        torch.testing.assert_close(key.double(), key64, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(value.double(), value64, atol=1e-4, rtol=1e-4)


def test_a_batch_is_its_rows(model: Qwen3ForCausalLM, prompt: Tensor) -> None:
    settings: dict[str, Any] = {"blocks": 1, "block_length": TOKENS, "mask_id": MASK}
    batch = generate_batch(model, [prompt, prompt[2:]], **settings)
    assert batch[1].tokens == generate_row(model, prompt[2:], **settings).tokens
    assert batch[0].tokens != batch[1].tokens
