"""What must hold of a step with rescue, an open one and signals, on a tiny random model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.reference import qwen3
from tests.reference.emulation import Emulation
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
from tests.reference.trust import Judge, Signal, Strategy

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
        mask = {"full_attention": everything}
        logits: Tensor = sdpa(ids, attention_mask=mask, use_cache=False).logits
        return logits

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
