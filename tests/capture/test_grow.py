"""Caches of fixed length, whose slots are replaced: transformers' StaticCache, the dual cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache, StaticCache

import focus_compile
from focus_compile.ops.fixed_cache import extend, extend_mask, replace
from tests.support.dialects import DIALECTS, Subject, SubjectOf, draw_call
from tests.support.harness import CACHE, MASK
from tests.support.models.llada import LLaDA

STATIC = DIALECTS["sdar-static"]


def test_replaced_slots_by_hand() -> None:
    """Three slots, two new keys: for the last slot and for the first."""
    index = torch.tensor([2, 0])
    table = torch.tensor([[10.0, 11.0, 12.0]])
    assert extend(table, index, 1).tolist() == [[10, 11, 12, 12, 10]]
    mask = torch.tensor([[[[True, True, False]], [[False, False, True]]]])
    past = torch.zeros(1, 1, 3, 1)
    wide = extend_mask(mask, past, index, 2)
    assert wide.flatten(0, 2).int().tolist() == [[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]]
    added = extend_mask(torch.tensor([[[[0.5, 1.5, 2.5]]]]), past, index, 2)
    assert added.flatten().tolist() == [-torch.inf, 1.5, -torch.inf, 2.5, 0.5]
    assert extend_mask(None, past, index, 2).flatten().int().tolist() == [0, 1, 0, 1, 1]
    joined = torch.arange(5.0).view(1, 1, 5, 1)
    assert replace(past, joined, index, 2).flatten().tolist() == [4, 0, 3]


@torch.no_grad()
def test_the_cache_is_written(subject_of: SubjectOf) -> None:
    """As eager execution writes it; with eviction, no slot outside the block changes."""
    subject, gone = subject_of(STATIC), 0
    for seed in range(4):
        draw = draw_call(STATIC, seed)
        expected, actual, evicted = (STATIC.arguments(subject.model, draw) for _ in range(3))
        subject.model(**expected)
        with focus_compile.session(alpha=1e9):
            subject.compiled(**actual)
        with focus_compile.session(alpha=1.0) as focus:
            subject.compiled(**evicted)
            gone += focus.stats.canvas - focus.stats.retained
        inside = slice(draw.history, draw.history + draw.ids.shape[1])
        for one, two, three in zip(
            expected[CACHE].layers, actual[CACHE].layers, evicted[CACHE].layers, strict=True
        ):
            assert int(one.cumulative_length) == inside.stop
            assert int(two.cumulative_length) == int(three.cumulative_length) == inside.stop
            for name in ("keys", "values"):
                want, got, some = (getattr(layer, name) for layer in (one, two, three))
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
                some[:, :, inside] = want[:, :, inside]
                assert torch.equal(some, want)
    assert gone


@torch.no_grad()
def test_blocks_in_a_cache_of_fixed_length(subject_of: SubjectOf) -> None:
    """Two blocks, each committed: the same logits as with a cache that grows."""
    subject = subject_of(STATIC)
    batch, tokens, prompt = 3, 8, 5
    ids = torch.randint(0, MASK, (batch, prompt), generator=torch.Generator().manual_seed(0))
    config = subject.model.config
    static = StaticCache(config, max_cache_len=prompt + 2 * tokens)
    heads = config.num_key_value_heads
    static.early_initialization(batch, heads, config.head_dim, torch.float32, ids.device)
    grows = DynamicCache(config=config)
    seen: dict[str, list[Tensor]] = {"static": [], "grows": []}
    for name, cache in (("static", static), ("grows", grows)):
        slots = prompt + 2 * tokens

        def call(block: Tensor, start: int, cache: Any = cache, slots: int = slots) -> Tensor:
            keys = slots if isinstance(cache, StaticCache) else start + block.shape[1]
            mask = (torch.arange(keys) < start + block.shape[1]).expand(
                batch, 1, block.shape[1], keys
            )
            places = torch.arange(start, start + block.shape[1]).expand(batch, -1)
            arguments = {"attention_mask": mask, "position_ids": places, CACHE: cache}
            return subject.compiled(input_ids=block, use_cache=True, **arguments).logits

        with focus_compile.session(alpha=1.2) as focus:
            call(ids, 0)
            start = prompt
            for _ in range(2):
                block = torch.full((batch, tokens), MASK)
                while (masked := block == MASK).any():
                    logits = call(block, start)
                    rewind(cache, start)
                    assert focus.retain_mask is not None
                    seen[name].append(logits)
                    chosen = masked & focus.retain_mask
                    chosen &= chosen.cumsum(1) <= 2
                    block = block.masked_fill(chosen, 7)
                call(block, start)
                start += tokens
        assert focus.stats.fed < focus.stats.canvas
    assert len(seen["static"]) == len(seen["grows"]) >= 2 * tokens // 2
    for one, two in zip(seen["static"], seen["grows"], strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def rewind(cache: Any, length: int) -> None:
    """Forget the block that a denoising step has stored."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
    else:
        cache.crop(length - cache.get_seq_length())


@torch.no_grad()
def test_a_block_without_a_commit_in_between(subject_of: SubjectOf) -> None:
    """The model writes into the cache: slots of evicted tokens hold nothing."""
    subject = subject_of(STATIC)
    draw = draw_call(STATIC, 1)
    arguments = STATIC.arguments(subject.model, draw)
    wide = torch.ones(len(draw.ids), 1, draw.ids.shape[1], draw.history + draw.ids.shape[1] + 5)
    arguments["attention_mask"] = wide.bool()
    with focus_compile.session(alpha=1.0, signal="position") as focus:
        subject.compiled(**arguments)
        assert focus.retain_mask is not None
        kept = focus.retain_mask.all(0)
        moved = int((~kept).nonzero()[0]) + 1  # the first one with a hole is history now
        rewind(arguments[CACHE], draw.history + moved)
        with pytest.raises(focus_compile.UncommittedHistory, match=r"in the past: 1\."):
            subject.compiled(**arguments)


def test_slots_that_no_mask_hides_are_refused() -> None:
    """Eager attention without a mask, and ``is_causal``, which counts slots and not positions."""
    dual = DIALECTS["llada-dual"]
    causal = dataclasses.replace(dual, build=lambda: type(dual.build())(groups=2, causal=True))
    with pytest.raises(BackendCompilerFailed, match="over the slots of a cache: give a mask"):
        Subject(causal).focus(draw_call(causal, 0))


DUAL = DIALECTS["llada-dual"]


@torch.no_grad()
def test_nothing_of_a_replaced_slot_is_read(subject_of: SubjectOf) -> None:
    """Whatever lies in memory there."""
    subject = subject_of(DUAL)
    draw = draw_call(DUAL, 2)
    arguments = DUAL.arguments(subject.model, draw)
    expected = subject.compiled(**arguments).logits
    arguments = DUAL.arguments(subject.model, draw)
    for key, value in arguments["past_key_values"]:
        key[:, :, arguments["replace_position"]] = torch.nan
        value[:, :, arguments["replace_position"]] = torch.nan
    assert torch.equal(subject.compiled(**arguments).logits, expected)
    assert expected.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("places", [slice(2, 10), slice(6, 22, 2)])
def test_a_block_that_moves_without_a_commit(subject_of: SubjectOf, places: slice) -> None:
    """To the left, or to other slots from the same one on: K/V of the block before have holes."""
    subject = subject_of(DUAL)
    draw = dataclasses.replace(draw_call(DUAL, 2), ids=torch.full((2, 8), MASK), history=14)
    arguments = DUAL.arguments(subject.model, draw)
    arguments["replace_position"] = torch.arange(6, 14)
    moved = arguments | {"replace_position": torch.arange(26)[places]}
    with focus_compile.session(alpha=1.0):
        subject.compiled(**arguments)
        with pytest.raises(focus_compile.UncommittedHistory, match=r"in the past: \d+\. What"):
            subject.compiled(**moved)
    with focus_compile.session(alpha=1.0):
        subject.compiled(**arguments)
        subject.compiled(**arguments | {"input_ids": torch.full((2, 8), 7)})
        actual = subject.compiled(**moved).logits
    with focus_compile.session(alpha=1.0):
        again = DUAL.arguments(subject.model, draw)["past_key_values"]
        subject.model(**arguments | {"input_ids": torch.full((2, 8), 7), "past_key_values": again})
        fresh = subject.compiled(**moved | {"past_key_values": again}).logits
    torch.testing.assert_close(actual, fresh)


@torch.no_grad()
def test_caches_of_different_lengths_in_one_session(subject_of: SubjectOf) -> None:
    """Another request: its block starts where that of the one before did."""
    subject = subject_of(DUAL)
    draw = draw_call(DUAL, 2)
    wide = dataclasses.replace(draw, history=draw.history + 6)
    places = DUAL.arguments(subject.model, draw)["replace_position"]
    arguments = DUAL.arguments(subject.model, wide) | {"replace_position": places}
    with focus_compile.session(alpha=1.2):
        fresh = subject.compiled(**arguments).logits
    arguments = DUAL.arguments(subject.model, wide) | {"replace_position": places}
    with focus_compile.session(alpha=1.2):
        subject.focus(draw)
        assert torch.equal(subject.compiled(**arguments).logits, fresh)


@torch.no_grad()
def test_slots_counted_from_the_end(subject_of: SubjectOf) -> None:
    """As indexing counts them; of any integer type."""
    subject = subject_of(DUAL)
    draw = draw_call(DUAL, 2)
    expected = subject.focus(draw)
    arguments = DUAL.arguments(subject.model, draw)
    places = arguments["replace_position"]
    slots = arguments["past_key_values"][0][0].shape[2]
    tables = places % slots
    assert torch.equal(tables, places)
    with focus_compile.session(alpha=1e9):
        got = subject.compiled(**arguments | {"replace_position": places - slots})
    negative = DUAL.arguments(subject.model, draw) | {"replace_position": places - slots}
    torch.testing.assert_close(got.logits, subject.model(**negative).logits, atol=1e-4, rtol=1e-4)
    assert expected.shape == got.logits.shape
    short = DUAL.arguments(subject.model, draw) | {"replace_position": places.int()}
    with focus_compile.session(alpha=1e9):
        got = subject.compiled(**short)
    torch.testing.assert_close(got.logits, subject.eager(draw), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_masks_of_one_column(subject_of: SubjectOf) -> None:
    """They hide nothing, or all."""
    subject = subject_of(STATIC)
    draw = draw_call(STATIC, 2)
    column = torch.ones(len(draw.ids), 1, draw.ids.shape[1], 1, dtype=torch.bool)
    ours, theirs = (STATIC.arguments(subject.model, draw) for _ in range(2))
    with focus_compile.session(alpha=1e9):
        actual = subject.compiled(**ours | {"attention_mask": column}).logits
    expected = subject.model(**theirs | {"attention_mask": column}).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_caches_that_share_memory(subject_of: SubjectOf, caplog: pytest.LogCaptureFixture) -> None:
    """Keys of two layers in one buffer, two slots apart: the dense program runs, and says so."""
    subject = subject_of(DUAL)
    draw = draw_call(DUAL, 2)
    results = []
    for model in (subject.model, subject.compiled):
        arguments = DUAL.arguments(subject.model, draw)
        past = arguments["past_key_values"]
        shape = list(past[0][0].shape)
        buffer = draw.random(*shape[:2], shape[2] + 2, shape[3])
        past[0] = (buffer[:, :, :-2], past[0][1])
        past[2] = (buffer[:, :, 2:], past[2][1])
        with focus_compile.session() as focus, caplog.at_level("WARNING"):
            results.append(model(**arguments).logits)
            assert focus.stats.steps == 0
    torch.testing.assert_close(*results)
    assert "whose memory another input shares" in caplog.text


class LastGrows(nn.Module):
    """The last layer's cache grows; those before are of fixed length."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LLaDA(groups=2)
        self.groups, self.head, self.layers = 2, self.model.head, self.model.layers

    def forward(self, input_ids: Tensor, past_key_values: Any, replace_position: Tensor) -> Any:
        x = self.model.wte(input_ids)
        for index, block in enumerate(self.model.blocks):
            replaced = None if index == self.layers - 1 else replace_position
            x, _ = block(x, past_key_values[index], replaced)
        return self.model.ff_out(self.model.ln_f(x))


@torch.no_grad()
def test_caches_of_both_kinds() -> None:
    dialect = dataclasses.replace(DUAL, build=LastGrows, logits=lambda out: out)
    subject = Subject(dialect)
    draw = draw_call(DUAL, 2)
    results = []
    for model in (subject.model, subject.compiled, subject.compiled):
        arguments = DUAL.arguments(subject.model, draw)
        past = arguments["past_key_values"]
        past[-1] = tuple(part[:, :, :3] for part in past[-1])
        with focus_compile.session(alpha=1e9):
            results.append(model(**arguments))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(results[1], results[2])


class Accumulates(nn.Module):
    """Adds up what it computes of tokens, in an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LLaDA(groups=2)

    def forward(self, input_ids: Tensor, seen: Tensor) -> Tensor:
        logits = self.model(input_ids).logits
        seen.add_(logits)
        return logits


def test_tokens_that_are_written_are_refused() -> None:
    """Evicted ones are not computed: what would be written for them?"""
    dialect = dataclasses.replace(
        DUAL,
        build=Accumulates,
        arguments=lambda _, draw: {
            "input_ids": draw.ids,
            "seen": torch.zeros(*draw.ids.shape, 61),
        },
        logits=lambda out: out,
        history=False,
    )
    with pytest.raises(BackendCompilerFailed, match="writes what it computes of tokens"):
        Subject(dialect).focus(draw_call(dialect, 0))
