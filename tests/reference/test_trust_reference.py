"""What must hold of rescue, the first step and signals, on a tiny model with random weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.reference import calibration, qwen3
from tests.reference.calibration import Candidate
from tests.reference.emulation import Emulation
from tests.reference.generation import Decoding, Generated, Strategy, generate_row
from tests.reference.state import Config, RowState, StepResult, Visibility
from tests.reference.system import dense_forward, focus_step
from tests.reference.tiny import (
    BATCH,
    HIDDEN,
    HISTORY,
    MASK,
    TOKENS,
    block,
    block_causal,
    tiny_model,
    tiny_prompt,
)
from tests.reference.trust import Judge, Signal

JUDGE = Judge(MASK)
NEAR_TIE = 1e-5
THRESHOLD = 0.16
"""About the median of what the model is sure of: rows of both kinds."""


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return tiny_prompt()


@pytest.fixture(scope="module")
def history(model: Qwen3ForCausalLM, prompt: Tensor) -> qwen3.History:
    return dense_forward(model, prompt, qwen3.no_history(model), torch.arange(HISTORY))[1]


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


def pairs(
    model: Qwen3ForCausalLM, history: qwen3.History, config: Config, judge: Judge, seed: int
) -> Iterator[tuple[RowState, StepResult, RowState, StepResult]]:
    """Steps of a block, each from one state with rescue and without; the former goes on."""
    plain = Config(config.alpha, config.visibility, config.delayed_cache)
    ids, masked, position_ids = block(seed, decoded=1)
    state = RowState.fresh(model, TOKENS)
    while masked.any():
        twin = copy.deepcopy(state)
        arguments = (ids, masked, history, position_ids)
        without = focus_step(model, twin, *arguments, config=plain)
        result = focus_step(model, state, *arguments, config=config, judge=judge)
        yield state, result, twin, without
        p = next(p for p in reversed(without.retained) if masked[p])
        ids[p], masked[p] = 5 + p, False
        state.record(1)


@pytest.mark.parametrize("visibility", ["written", "prefix"])
def test_kept_tokens_are_as_without(
    model: Qwen3ForCausalLM, history: qwen3.History, visibility: Visibility
) -> None:
    """No token is certain: whatever a step evicts is rescued, and changes nothing of the kept."""
    config = Config(visibility=visibility, rescue=1.0)
    rescued = 0
    for state, result, twin, without in pairs(model, history, config, JUDGE, seed=1):
        assert result.retained == result.fed
        assert result.rescued == sorted({*result.fed} - {*without.retained})
        assert not {*result.rescued} - {*result.masked}
        rows = [result.retained.index(p) for p in without.retained]
        assert torch.equal(result.logits[rows], without.logits)
        for layer, (now, before) in enumerate(zip(result.slots, without.slots, strict=True)):
            others = [p for p in range(TOKENS) if layer < 2 or p not in result.rescued]
            assert torch.equal(now[0][:, others], before[0][:, others])
            assert torch.equal(now[1][:, others], before[1][:, others])
        assert all(result.written[p] for p in result.fed)
        assert result.progress == max(twin.progress, *result.fed)
        assert result.final == without.final and state.warm
        assert result.k == without.k and torch.equal(result.delta, without.delta)
        rescued += len(result.rescued)
    assert rescued > 10


@torch.no_grad()
@pytest.mark.parametrize("visibility", ["written", "prefix"])
@pytest.mark.parametrize("seed", range(2))
def test_rescued_tokens_see_all(
    model: Qwen3ForCausalLM,
    prompt: Tensor,
    history: qwen3.History,
    visibility: Visibility,
    seed: int,
) -> None:
    """One pass of transformers' layers in which each token sees what it may."""
    ids, masked, position_ids = block(seed, decoded=2)
    config = Config(visibility=visibility, rescue=1.0)
    result = focus_step(
        model,
        RowState.fresh(model, TOKENS),
        ids,
        masked,
        history,
        position_ids,
        config=config,
        judge=JUDGE,
        stale=False,
    )
    assert result.rescued
    late = torch.tensor([p in result.rescued for p in range(TOKENS)])
    bound = int((~late).nonzero()[-1]) if visibility == "prefix" else TOKENS
    before = torch.arange(TOKENS) <= bound
    sequence = torch.cat([prompt, ids])
    hidden = model.model.embed_tokens(sequence)[None]
    tables = model.model.rotary_emb(hidden, torch.arange(len(sequence))[None])
    for index, layer in enumerate(model.model.layers):
        visible = block_causal(HISTORY, len(sequence))
        if index:
            seen = before if index == 1 else before & ~late
            visible[HISTORY:, HISTORY:] = late[:, None] | seen
        bias = qwen3.additive(visible, torch.float32)[None, None]
        hidden = layer(hidden, attention_mask=bias, position_embeddings=tables)
    expected = model.lm_head(model.model.norm(hidden))[0, HISTORY:]
    assert hidden.shape[-1] == HIDDEN and result.retained == list(range(TOKENS))
    torch.testing.assert_close(result.logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["threshold", "fixed", "sequential"])
@pytest.mark.parametrize("shifted", [False, True])
def test_rescue_decides_by_what_is_kept(
    model: Qwen3ForCausalLM, history: qwen3.History, strategy: Strategy, shifted: bool
) -> None:
    """Rows of both kinds; those that are not in need are as without."""
    judge = Judge(MASK, strategy, 2, shifted)
    needs = set()
    for state, result, twin, without in pairs(model, history, Config(rescue=0.5), judge, seed=0):
        if len(without.retained) == len(without.fed):
            assert not result.rescued and math.isnan(result.c_star)
            continue
        needs.add(bool(result.rescued))
        if not result.rescued:
            assert torch.equal(result.logits, without.logits)
            assert (state.written, state.progress) == (twin.written, twin.progress)
    assert needs == {False, True}


@pytest.mark.parametrize("visibility", ["written", "prefix"])
def test_open_is_dense(
    model: Qwen3ForCausalLM, history: qwen3.History, visibility: Visibility
) -> None:
    ids, masked, position_ids = block(4, decoded=1)
    state = RowState.fresh(model, TOKENS)
    config = Config(visibility=visibility, first_step="open", rescue=1.0)
    arguments = (ids, masked, history, position_ids)
    first = focus_step(model, state, *arguments, config=config, judge=JUDGE)
    expected, stored = dense_forward(model, ids, history, position_ids)
    assert first.retained == list(range(TOKENS)) and not first.rescued
    torch.testing.assert_close(first.logits, expected, atol=1e-5, rtol=1e-5)
    for slots, dense in zip(first.slots, stored, strict=True):
        torch.testing.assert_close(slots, dense, atol=1e-5, rtol=1e-5)
    assert first.progress == TOKENS - 1 and all(first.written)
    second = focus_step(model, state, *arguments, config=Config(first_step="open"))
    assert len(second.retained) < len(second.fed)
    alone = focus_step(
        model,
        state,
        *arguments,
        config=Config(visibility=visibility, first_step="open"),
        stale=False,
    )
    assert len(alone.retained) < TOKENS


@torch.no_grad()
@pytest.mark.parametrize(
    ("visibility", "signal"),
    [("written", "delta"), ("prefix", "importance"), ("written", "confidence")],
)
def test_a_batch_is_its_rows(
    model: Qwen3ForCausalLM, visibility: Visibility, signal: Signal
) -> None:
    """Emulated on transformers' attention, rows with and without need in one batch."""
    sdpa = copy.deepcopy(model)
    sdpa.set_attn_implementation("sdpa")
    blocks = [block(seed, decoded=seed + 1) for seed in range(BATCH)]
    ids, masked = (torch.stack([b[i] for b in blocks]) for i in range(2))
    positions, history = torch.arange(TOKENS), qwen3.no_history(model)
    config = Config(visibility=visibility, rescue=THRESHOLD, signal=signal)
    emulation = Emulation(config, judge=JUDGE)
    states = [RowState.fresh(model, TOKENS) for _ in range(BATCH)]

    everything = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool)

    def call() -> Tensor:
        return sdpa(ids, attention_mask={"full_attention": everything}, use_cache=False).logits

    mixed = False
    for _ in range(4):
        found = emulation.step(call, ids, masked, 0)
        assert min(found.margin, found.need_margin) > NEAR_TIE
        mixed = mixed or len(set(found.rescued.any(1).tolist())) == 2
        for b, state in enumerate(states):
            arguments = (ids[b], masked[b], history, positions)
            row = focus_step(model, state, *arguments, config=config, judge=JUDGE)
            assert found.retained[b].tolist() == row.retain_mask
            assert found.rescued[b].nonzero().flatten().tolist() == row.rescued
            logits = found.logits[b, row.retained]
            torch.testing.assert_close(row.logits, logits, atol=1e-4, rtol=1e-4)
            after = emulation.rows[b]
            assert (after.written, after.progress) == (row.written, row.progress)
            assert after.final == row.final
            p = next(p for p in row.retained if masked[b, p])
            ids[b, p], masked[b, p] = 7 + p, False
            for known in (state, after):
                known.record(1)
    assert mixed


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


def test_bias_is_added(model: Qwen3ForCausalLM, history: qwen3.History) -> None:
    """A bias that outweighs the scores decides alone."""
    ids, masked, position_ids = block(5, decoded=0)
    state = RowState.fresh(model, TOKENS)
    state.progress = TOKENS - 1
    bias = torch.zeros(TOKENS)
    bias[[4, 8]] = 1e3
    arguments = (ids, masked, history, position_ids)
    result = focus_step(model, state, *arguments, config=Config(), bias_T=bias)
    assert result.retained == [3, 4, 7, 8]
    torch.testing.assert_close(
        result.delta - bias, result.importance1 - result.importance0, atol=1e-3, rtol=0
    )


def test_refusals(model: Qwen3ForCausalLM, history: qwen3.History) -> None:
    for tau in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="a threshold in"):
            Config(rescue=tau)
    ids, masked, position_ids = block(5, decoded=0)
    state = RowState.fresh(model, TOKENS)
    for config in (Config(rescue=0.5), Config(signal="confidence")):
        with pytest.raises(ValueError, match="judge has its id"):
            focus_step(model, state, ids, masked, history, position_ids, config=config)


def test_calibration_follows_dense_decoding(model: Qwen3ForCausalLM, prompt: Tensor) -> None:
    blocks = 2
    settings: dict[str, Any] = {"blocks": blocks, "block_length": TOKENS, "mask_id": MASK}
    dense = calibration.trajectory(model, prompt, threshold=THRESHOLD, **settings)
    layers = model.config.num_hidden_layers
    decoding = Decoding("threshold", THRESHOLD, ban_mask_token=True)
    run = generate_row(model, prompt, decoding=decoding, **settings)
    predictions, replayed = {}, {}
    signals: list[Signal] = ["delta", "importance", "position", "confidence", (1.0, 0.0)]
    for candidate in [Candidate(s, f) for s in signals for f in ("evict", "open")]:  # type: ignore[arg-type]
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
