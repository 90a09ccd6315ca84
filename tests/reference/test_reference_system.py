"""Sanity of one reference step, against transformers' own eager layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.reference import qwen3
from tests.reference.state import Config, RowState, Visibility
from tests.reference.system import Signal, dense_forward, focus_step, standalone_batch
from tests.reference.tiny import (
    BATCH,
    GROUPS,
    HEAD_DIM,
    HIDDEN,
    HISTORY,
    LAYERS,
    TOKENS,
    VOCAB,
    block,
    block_causal,
    eager,
    tiny_model,
    tiny_prompt,
)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return tiny_prompt()


@pytest.fixture(scope="module")
def history(model: Qwen3ForCausalLM, prompt: Tensor) -> qwen3.History:
    return dense_forward(model, prompt, qwen3.no_history(model), torch.arange(HISTORY))[1]


@torch.no_grad()
def test_dense_is_transformers_eager(
    model: Qwen3ForCausalLM, prompt: Tensor, history: qwen3.History
) -> None:
    ids, _, position_ids = block(seed=2, decoded=4)
    logits, _ = dense_forward(model, ids, history, position_ids)
    sequence = torch.cat([prompt, ids])
    expected = eager(model, sequence, block_causal(HISTORY, len(sequence)))[HISTORY:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("visibility", ["written", "prefix"])
@pytest.mark.parametrize("decoded", [0, 4, TOKENS])
def test_huge_alpha_is_dense(
    model: Qwen3ForCausalLM, history: qwen3.History, visibility: Visibility, decoded: int
) -> None:
    ids, masked, position_ids = block(3, decoded)
    config = Config(alpha=1e9, visibility=visibility, delayed_cache=False)
    state = RowState.fresh(model, TOKENS)
    for _ in range(2):
        result = focus_step(model, state, ids, masked, history, position_ids, config=config)
        expected, stored = dense_forward(model, ids, history, position_ids)
        assert result.retained == list(range(TOKENS))
        torch.testing.assert_close(result.logits, expected)
        for slots, dense in zip(result.slots, stored, strict=True):
            torch.testing.assert_close(slots, dense)


@torch.no_grad()
@pytest.mark.parametrize("visibility", ["written", "prefix"])
@pytest.mark.parametrize("seed", range(4))
def test_evicted_tokens_influence_nothing(
    model: Qwen3ForCausalLM,
    prompt: Tensor,
    history: qwen3.History,
    visibility: Visibility,
    seed: int,
) -> None:
    """Emulated with transformers' layers at full width, evicted residuals turned into noise."""
    ids, masked, position_ids = block(seed, decoded=2)
    result = focus_step(
        model,
        RowState.fresh(model, TOKENS),
        ids,
        masked,
        history,
        position_ids,
        config=Config(visibility=visibility),
        stale=False,
    )
    evicted = sorted(set(range(TOKENS)) - set(result.retained))
    assert evicted
    before = torch.arange(TOKENS) <= result.retained[-1]
    kept = torch.tensor(result.retain_mask)
    everything = torch.ones(TOKENS, dtype=torch.bool)
    slots = {"written": (everything, kept), "prefix": (before, kept & before)}[visibility]
    seen = [everything, slots[0], *[slots[1]] * 3]

    sequence = torch.cat([prompt, ids])
    hidden = model.model.embed_tokens(sequence)[None]
    tables = model.model.rotary_emb(hidden, torch.arange(len(sequence))[None])
    for index, layer in enumerate(model.model.layers):
        visible = block_causal(HISTORY, len(sequence))
        visible[HISTORY:, HISTORY:] = seen[index]
        if index >= 2:
            hidden[0, [HISTORY + p for p in evicted]] = torch.randn(len(evicted), HIDDEN)
        bias = qwen3.additive(visible, torch.float32)[None, None]
        hidden = layer(hidden, attention_mask=bias, position_embeddings=tables)
    expected = model.lm_head(model.model.norm(hidden))[0, [HISTORY + p for p in result.retained]]
    torch.testing.assert_close(result.logits, expected, atol=1e-5, rtol=1e-5)


def test_slots_of_evicted_tokens_stay_stale(
    model: Qwen3ForCausalLM, history: qwen3.History
) -> None:
    """Second step with one more token known: layers >= 2 change at kept positions only."""
    ids, masked, position_ids = block(5, decoded=0)
    state = RowState.fresh(model, TOKENS)

    def prefer(last: int) -> Signal:
        return lambda _zero, _one, positions: torch.tensor([float(p == last) for p in positions])

    first = focus_step(model, state, ids, masked, history, position_ids, signal=prefer(TOKENS - 1))
    assert first.retained == list(range(TOKENS)) and first.progress == TOKENS - 1
    ids[4], masked[4] = 11, False
    second = focus_step(model, state, ids, masked, history, position_ids, signal=prefer(7))
    assert second.retained == [0, 4, 6, 7]  # top-2 = {7, leftmost}, 6 by adjacency, 4 decoded
    for layer, (old, new) in enumerate(zip(first.slots, second.slots, strict=True)):
        changed = (old[0] != new[0]).any(dim=-1).any(dim=0)
        expected = {0: [4], 1: list(range(TOKENS))}.get(layer, second.retained)
        assert changed.nonzero().flatten().tolist() == expected


def test_delayed_cache_feeds_until_the_right_neighbour_is_known(
    model: Qwen3ForCausalLM, history: qwen3.History
) -> None:
    ids, masked, position_ids = block(6, decoded=0)
    state = RowState.fresh(model, TOKENS)
    fed = []
    for p in (3, 8, 4, None, None):
        result = focus_step(model, state, ids, masked, history, position_ids)
        fed.append(result.fed)
        if p is not None:
            ids[p], masked[p] = p, False
    everything = list(range(TOKENS))
    without_8 = everything[:-1]
    # 8 is fed decoded at the third step; 3 waits until 4 was fed decoded, at the fourth.
    assert fed == [everything, everything, everything, without_8, [0, 1, 2, 4, 5, 6, 7]]


def test_row_without_masks_is_fed_whole_once(
    model: Qwen3ForCausalLM, history: qwen3.History
) -> None:
    ids, masked, position_ids = block(7, decoded=TOKENS)
    expected, _ = dense_forward(model, ids, history, position_ids)
    state = RowState.fresh(model, TOKENS)
    first, second = (focus_step(model, state, ids, masked, history, position_ids) for _ in range(2))
    torch.testing.assert_close(first.logits, expected)
    assert second.fed == [] and second.logits.shape == (0, VOCAB)


def test_standalone_rows_ignore_left_padding(model: Qwen3ForCausalLM) -> None:
    """A padded batch with the caller's mask equals each row alone."""
    rows = [block(seed, decoded=seed) for seed in range(BATCH)]
    ids, masked = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
    lengths = [HISTORY, 4, 0]
    positions = torch.stack([torch.arange(TOKENS) + length for length in lengths])
    noise = torch.Generator().manual_seed(8)
    shape = (BATCH, GROUPS, HISTORY, HEAD_DIM)
    past = [
        (torch.randn(shape, generator=noise), torch.randn(shape, generator=noise))
        for _ in range(LAYERS)
    ]
    visible = torch.ones(BATCH, TOKENS, HISTORY + TOKENS, dtype=torch.bool)
    for b, length in enumerate(lengths):
        visible[b, :, : HISTORY - length] = False
    batch = standalone_batch(model, ids, masked, past, positions, visible)
    for b, (length, padded) in enumerate(zip(lengths, batch, strict=True)):
        alone = standalone_batch(
            model,
            ids[b : b + 1],
            masked[b : b + 1],
            [
                (k[b : b + 1, :, HISTORY - length :], v[b : b + 1, :, HISTORY - length :])
                for k, v in past
            ],
            positions[b : b + 1],
        )[0]
        assert padded.retained == alone.retained
        assert len(padded.retained) < TOKENS
        torch.testing.assert_close(padded.logits, alone.logits)
