"""A signal that fails costs the answers, unless rows are rescued, as they are unless told not to.

On the strictly sequential task of examples/tiny_dllm, where a signal that misses the one decodable
token costs the answer. The delta points at it on the aligned checkpoint, and fails on the other.
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
from tests.support.harness import PAPER, eager_inner
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


@pytest.fixture(scope="module", params=["aligned_checkpoint", "checkpoint"])
def trained(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """Name, compiled model and tokenizer; every option but for Inductor is the default."""
    words = AutoTokenizer.from_pretrained(FOLDER / request.param)
    model = Qwen3ForCausalLM.from_pretrained(FOLDER / request.param).eval()

    def backend(gm: Any, inputs: Any) -> Any:
        return focus_backend(gm, inputs, options={"strict": True}, inner=eager_inner)

    return request.param, torch.compile(model, backend=backend, dynamic=True), words


def test_exact_match(trained: tuple[str, Any, Any], examples: list[Any]) -> None:
    """As dense within one answer: by default whatever the signal, in the paper's way by a good one.

    A random signal, or the delta of the other checkpoint, loses nearly all in the paper's way.
    """
    name, compiled, words = trained
    prompts = [example.prompt for example in examples]
    given = words(prompts, padding=True, padding_side="left", return_tensors="pt")

    def answer(**settings: Any) -> tuple[int, focus_compile.Generated]:
        """Right answers, and what generate returned."""
        with focus_compile.session(**settings):
            out = focus_compile.generate(
                compiled,
                given["input_ids"],
                given["attention_mask"],
                max_new_tokens=64,
                mask_token_id=words.mask_token_id,
                eos_token_id=words.eos_token_id,
                return_dict=True,
            )
        texts = words.batch_decode(
            out.sequences[:, given["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return sum(a == b.answer for a, b in zip(texts, examples, strict=True)), out

    dense, whole = answer(enabled=False)
    steps = sum(int(count.sum()) for count in whole.steps_per_block)
    assert dense >= 0.95 * COUNT
    for settings in ({}, {"signal": noise}):
        right, out = answer(**settings)
        assert right >= dense - 1
        assert out.focus_steps == out.forwards and out.retained_fraction < 0.7
        assert sum(int(count.sum()) for count in out.steps_per_block) <= 1.15 * steps
        assert out.rescued > 0 or (name, settings) == ("aligned_checkpoint", {})
        assert bool(out.retain_masks[0].all()), "the first step is not open"
    paper, out = answer(**PAPER)
    assert out.retained_fraction < 0.3 and out.rescued == 0 and not bool(out.retain_masks[0].all())
    assert paper >= dense - 1 if name == "aligned_checkpoint" else paper <= 0.1 * COUNT
    assert answer(signal=noise, **PAPER)[0] <= 0.1 * COUNT
