"""The ranking signal decides: with the delta a trained model answers, with noise it does not.

On the aligned checkpoint of examples/tiny_dllm, whose delta points at decodable tokens, and its
strictly sequential task, where a signal that misses the one decodable token costs the answer.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

import focus_compile
from focus_compile import Signal, Step
from focus_compile.backend import focus_backend
from tests.support.harness import eager_inner
from tests.support.paths import TINY

FOLDER = TINY
COUNT = 40


@pytest.fixture(scope="module")
def examples() -> list[Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        from tasks import examples as draw
    finally:
        sys.path.remove(str(FOLDER))
    return draw("chain", COUNT, 1)


def noise(step: Step) -> Signal:
    generator = torch.Generator().manual_seed(step.index)
    return Signal((0.0, 0.0), torch.rand(step.masked.shape, generator=generator))


def test_exact_match_needs_the_delta(examples: list[Any]) -> None:
    """Dense and FOCUS agree within one answer, at few tokens; a random signal loses nearly all."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "aligned_checkpoint")
    model = Qwen3ForCausalLM.from_pretrained(FOLDER / "aligned_checkpoint").eval()

    def backend(gm: Any, inputs: Any) -> Any:
        return focus_backend(gm, inputs, options={"strict": True}, inner=eager_inner)

    compiled = torch.compile(model, backend=backend, dynamic=True)
    prompts = [example.prompt for example in examples]
    given = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")

    def answer(**settings: Any) -> tuple[int, int, focus_compile.Generated]:
        """Right answers, steps over all rows and blocks, and what generate returned."""
        with focus_compile.session(**settings):
            out = focus_compile.generate(
                compiled,
                given["input_ids"],
                given["attention_mask"],
                max_new_tokens=64,
                mask_token_id=tokenizer.mask_token_id,
                eos_token_id=tokenizer.eos_token_id,
                return_dict=True,
            )
        texts = tokenizer.batch_decode(
            out.sequences[:, given["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right = sum(a == b.answer for a, b in zip(texts, examples, strict=True))
        return right, sum(int(count.sum()) for count in out.steps_per_block), out

    dense, dense_steps, _ = answer(enabled=False)
    focus, focus_steps, out = answer(alpha=1.5)
    random, _, _ = answer(alpha=1.5, signal=noise)
    assert dense >= 0.95 * COUNT
    assert focus >= dense - 1
    assert focus_steps <= 1.15 * dense_steps
    assert out.focus_steps == out.forwards and out.retained_fraction < 0.3
    assert random <= 0.1 * COUNT
