"""What must hold of generation with rescue, of `auto`, of signals, and of calibration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.reference import calibration
from tests.reference.calibration import Candidate
from tests.reference.generation import Decoding, Generated, Strategy, generate_row
from tests.reference.state import Config
from tests.reference.tiny import MASK, TOKENS, tiny_model, tiny_prompt
from tests.reference.trust import Signal

THRESHOLD = 0.16
"""About the median of what the model is sure of: rows of both kinds."""


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return tiny_prompt()


def generate(
    model: Qwen3ForCausalLM, seed: int, config: Config, decoding: Decoding, blocks: int = 2
) -> Generated:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, MASK, (4 + seed,), generator=generator)
    return generate_row(
        model,
        prompt,
        blocks=blocks,
        block_length=TOKENS,
        mask_id=MASK,
        config=config,
        decoding=decoding,
    )


@pytest.mark.parametrize("strategy", ["fixed", "sequential"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_a_fixed_number_is_decoded(
    model: Qwen3ForCausalLM, strategy: Strategy, shifted: bool, tau: float
) -> None:
    """With rescue at any tau every step decodes k tokens, those dense does if `sequential`."""
    count = 5
    decoding = Decoding(strategy, tokens_per_step=count, ban_mask_token=True, shifted=shifted)
    with_rescue = generate(model, 1, Config(rescue=tau, signal="position"), decoding)
    without = generate(model, 1, Config(signal="position"), decoding)
    least = math.ceil(TOKENS / count)
    assert with_rescue.steps_per_block == [least, least]
    assert all(steps > least for steps in without.steps_per_block)
    assert any(step.rescued for step in with_rescue.steps)
    if strategy == "sequential":
        places = [sorted(step.decoded) for step in with_rescue.steps]
        assert places == [[0, 1, 2, 3, 4], [5, 6, 7, 8]] * 2


@pytest.mark.parametrize("seed", [2, 5])
def test_whoever_is_forced_was_chosen_among_all(model: Qwen3ForCausalLM, seed: int) -> None:
    """tau = threshold: a step that decodes below it has computed every fed token."""
    decoding = Decoding("threshold", THRESHOLD, ban_mask_token=True)
    generated = generate(model, seed, Config(rescue=THRESHOLD), decoding)
    without = generate(model, seed, Config(), decoding)
    forced = 0
    for step in generated.steps:
        if max(step.confidence[p] for p in step.decoded) < THRESHOLD:
            assert step.retained == step.fed and len(step.decoded) == 1
            forced += 1
        if step.rescued:
            assert step.c_star < THRESHOLD and step.need_margin > 0
    assert forced
    # Until the first rescue the runs are one.
    for ours, theirs in zip(generated.steps, without.steps, strict=False):
        assert [p for p in ours.retained if p not in ours.rescued] == theirs.retained
        if ours.rescued:
            assert len(ours.decoded) >= len(theirs.decoded) == 1
            break
        assert (ours.decoded, ours.k) == (theirs.decoded, theirs.k)
    assert any(step.rescued for step in generated.steps)


def test_tau_zero_is_no_rescue(model: Qwen3ForCausalLM) -> None:
    decoding = Decoding("threshold", THRESHOLD)
    generated, without = (
        generate(model, 2, Config(rescue=tau), decoding, 1) for tau in (0.0, None)
    )
    assert generated.tokens == without.tokens
    assert [s.retained for s in generated.steps] == [s.retained for s in without.steps]
    assert not any(step.rescued for step in generated.steps)
    assert generated.margin == without.margin < math.inf


@pytest.mark.parametrize(("per_step", "opened"), [(3, [True] * 4), (2, [True] + [False] * 3)])
def test_auto_carries_what_a_block_told(
    model: Qwen3ForCausalLM, per_step: int, opened: list[bool]
) -> None:
    """More than K1 = 2 in a first step opens the next block's; a request begins open."""
    decoding = Decoding("fixed", tokens_per_step=per_step)
    config = Config(rescue=1.0, first_step="auto")
    generated = generate(model, 1, config, decoding, blocks=4)
    starts = [0]
    for steps in generated.steps_per_block[:-1]:
        starts.append(starts[-1] + steps)
    firsts = [generated.steps[start] for start in starts]
    assert [not step.rescued for step in firsts] == opened
    assert all(step.retained == step.fed == list(range(TOKENS)) for step in firsts)
    assert all(len(step.decoded) == per_step for step in firsts)


def test_signals(model: Qwen3ForCausalLM) -> None:
    decoding = Decoding("sequential", tokens_per_step=2)
    signals: list[Signal] = ["delta", (-1.0, 1.0), "position", "confidence", "importance"]
    runs = [
        generate(model, 3, Config(rescue=0.5, signal=signal), decoding, 1) for signal in signals
    ]
    kept = [[step.retained for step in run.steps] for run in runs]
    assert kept[0] == kept[1]
    # The leftmost K >= 2 are what `sequential` decodes.
    assert not any(step.rescued for step in runs[2].steps)
    assert all(len(step.decoded) <= step.k for step in runs[2].steps)
    # Nothing is known of a block in its first step.
    assert kept[3][0] == list(range(TOKENS))
    for run, sets in zip(runs, kept, strict=True):
        assert any(len(some) < len(s.fed) for some, s in zip(sets, run.steps, strict=True))


def test_calibration_follows_dense_decoding(model: Qwen3ForCausalLM, prompt: Tensor) -> None:
    blocks = 2
    settings: dict[str, Any] = {"blocks": blocks, "block_length": TOKENS, "mask_id": MASK}
    dense = calibration.trajectory(model, prompt, threshold=THRESHOLD, **settings)
    layers = model.config.num_hidden_layers
    decoding = Decoding("threshold", THRESHOLD, ban_mask_token=True)
    run = generate_row(model, prompt, decoding=decoding, **settings)
    predictions, replayed = {}, {}
    signals: list[Signal] = ["delta", "importance", "position", "confidence", (1.0, 0.0)]
    for candidate in [
        *(Candidate(signal, "evict") for signal in signals),
        *(Candidate(signal, "open") for signal in signals),
    ]:
        steps = [
            step
            for one in dense.blocks
            for step in calibration.replay(one, candidate, 1.5, THRESHOLD, layers)
        ]
        replayed[candidate] = steps
        predictions[candidate] = calibration.predict(steps, layers, TOKENS)
        assert sum(len(step.decoded) for step in steps) == blocks * TOKENS
        assert all(step.cost <= layers * len(step.fed) for step in steps)
        if candidate.first_step == "open" or candidate.signal == "confidence":
            assert steps[0].kept == list(range(TOKENS))
    # Before anything was evicted a session sees what dense decoding sees.
    assert replayed[Candidate("delta", "evict")][0].kept == run.steps[0].retained
    everything = [
        step
        for one in dense.blocks
        for step in calibration.replay(one, Candidate("delta", "evict"), 1e9, THRESHOLD, layers)
    ]
    kept_all = calibration.predict(everything, layers, TOKENS)
    fed = sum(len(step.fed) for step in everything)
    assert kept_all.hit is None and kept_all.evicting == 0
    assert kept_all.predicted == pytest.approx(fed / (TOKENS * len(everything)))
    advice = calibration.advise(predictions)
    assert not advice.judged
    forced = dense.forced(THRESHOLD)
    assert all(confidence < THRESHOLD for confidence in forced)
    steps = replayed[Candidate("delta", "evict")]
    tau = calibration.gate(THRESHOLD, len(everything), forced * 20, steps, layers)
    assert tau == THRESHOLD or tau in forced
