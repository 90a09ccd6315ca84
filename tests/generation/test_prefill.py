"""Prompts: their mask tokens stay, their attention mask has one line, and they are no blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM

import focus_compile
from tests.support.harness import CACHE, MASK, Run, Sizes, build_model

BATCH, PROMPT, BLOCK = 2, 11, 5


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(build_model(Sizes(layers=2)), {"alpha": 1.2}, dynamic=True)


def prompts() -> Tensor:
    """Mask tokens at the beginning, in the middle and at the end."""
    ids = torch.randint(0, MASK, (BATCH, PROMPT), generator=torch.Generator().manual_seed(5))
    ids[0, [0, 4]], ids[1, -2:] = MASK, MASK
    return ids


def generate(model: Any, **given: Any) -> focus_compile.Generated:
    arguments = {"max_new_tokens": 2 * BLOCK, "block_length": BLOCK, "mask_token_id": MASK}
    if "tokens_per_step" in given:
        given["remasking_strategy"] = "fixed"
    made = focus_compile.generate(model, prompts(), **(arguments | given), return_dict=True)
    return made


def test_mask_tokens_of_a_prompt_stay(run: Run) -> None:
    """The compiled model, with nothing evicted in effect, gives the eager loop's tokens."""
    valid = torch.ones(BATCH, PROMPT, dtype=torch.int64)
    valid[0, :3] = 0
    first = {"remasking_strategy": "sequential"}
    for given in ({}, {"attention_mask": valid}):
        dense = generate(run.model, **given, **first)
        assert torch.equal(dense.sequences[:, :PROMPT], prompts())
        assert not (dense.sequences[:, PROMPT:] == MASK).any()
        with focus_compile.session(enabled=False):
            assert torch.equal(generate(run.compiled, **given, **first).sequences, dense.sequences)
        with focus_compile.session(alpha=1e9):
            made = generate(run.compiled, max_new_tokens=BLOCK, tokens_per_step=BLOCK, **given)
        whole = generate(run.model, max_new_tokens=BLOCK, tokens_per_step=BLOCK, **given)
        assert torch.equal(made.sequences, whole.sequences) and made.focus_steps == made.forwards


class Loop:
    """Somebody's own: prefill, then the first call of a block."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.cache = model, DynamicCache(config=config)
        self.length = 0

    def call(self, ids: Tensor, keep: bool) -> Tensor:
        seen = torch.ones(len(ids), 1, ids.shape[1], self.length + ids.shape[1], dtype=torch.bool)
        layers: list[Any] = self.cache.layers
        before = [(layer, layer.keys, layer.values) for layer in layers]
        out = self.model(input_ids=ids, attention_mask=seen, use_cache=True, **{CACHE: self.cache})
        if keep:
            self.length += ids.shape[1]
        else:
            for layer, keys, values in before:
                layer.keys, layer.values = keys, values
        logits: Tensor = out.logits
        return logits


@pytest.fixture(scope="module")
@torch.no_grad()
def captured(run: Run) -> Run:
    """Of a block shorter than the prompt: Dynamo takes sizes that are equal at first for one."""
    with focus_compile.session() as focus:
        loop = Loop(run.compiled, run.model.config)
        focus.masked = torch.zeros(BATCH, PROMPT, dtype=torch.bool)
        loop.call(prompts(), keep=True)
        loop.call(torch.full((BATCH, BLOCK), MASK), keep=False)
    return run


@pytest.mark.parametrize("block", [BLOCK, PROMPT, PROMPT + 2])
def test_a_prefill_that_is_taken_for_a_block(captured: Run, block: int) -> None:
    """Completed by the block behind it, whatever its length; dense where nothing is said to be
    open."""
    run, masks = captured, torch.full((BATCH, block), MASK)
    eager = Loop(run.model, run.model.config)
    expected = eager.call(prompts(), keep=True), eager.call(masks, keep=False)
    with focus_compile.session(alpha=1.0, signal="position") as focus:
        loop = Loop(run.compiled, run.model.config)
        loop.call(prompts(), keep=True)
        assert focus.retain_mask is not None and not bool(focus.retain_mask.all())
        focus.alpha = 1e9
        made = loop.call(masks, keep=False)
        torch.testing.assert_close(made, expected[1], atol=2e-4, rtol=1e-4)
    with focus_compile.session(alpha=1e9) as focus:
        loop = Loop(run.compiled, run.model.config)
        focus.masked = torch.zeros(BATCH, PROMPT, dtype=torch.bool)
        made = loop.call(prompts(), keep=True), loop.call(masks, keep=False)
        assert (focus.stats.dense_calls, focus.stats.steps) == (1, 1)
    for one, two in zip(made, expected, strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-4)


def test_prompts_without_mask_tokens_are_no_fault(run: Run) -> None:
    """Blocks of two lengths, committed; another batch in the same session."""
    with focus_compile.session() as focus:
        loop = Loop(run.compiled, run.model.config)
        loop.call(prompts().clamp_max(MASK - 1), keep=True)
        for block in (BLOCK, BLOCK + 2):
            loop.call(torch.full((BATCH, block), MASK), keep=False)
            loop.call(torch.full((BATCH, block), 7), keep=True)
        loop.call(torch.full((BATCH, BLOCK), MASK), keep=False)
        other = Loop(run.compiled, run.model.config)
        other.call(torch.full((1, PROMPT), 7), keep=True)
        other.call(torch.full((1, BLOCK), MASK), keep=False)
        assert focus.stats.steps == 4


class Own(Qwen3ForCausalLM):
    """A class of somebody else, which may compare shapes."""


def test_the_mask_of_a_prompt_has_one_line() -> None:
    """For transformers' own models; blocks have one line per token, so that graphs do not grow."""
    shapes: list[tuple[int, ...]] = []
    model = build_model(Sizes(layers=2))

    def look(_: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["attention_mask"].shape))

    model.register_forward_pre_hook(look, with_kwargs=True)
    made = [generate(model, max_new_tokens=BLOCK, tokens_per_step=BLOCK).sequences]
    model.__class__ = Own
    made.append(generate(model, max_new_tokens=BLOCK, tokens_per_step=BLOCK).sequences)
    later = (BATCH, 1, BLOCK, PROMPT + BLOCK)
    assert len(shapes) == 6
    assert shapes[:3] == [(BATCH, 1, 1, PROMPT), later, later]
    assert shapes[3] == (BATCH, 1, PROMPT, PROMPT)
    assert torch.equal(*made)


def test_two_graphs_serve_a_generation() -> None:
    """One for prompts, one for blocks and their commits, as when masks had a line per token.

    A third where history and block are as many as a head has numbers: tests/generation/test_cache.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = Run(build_model(Sizes(layers=2)), dynamic=True)
    made = generate(run.compiled, tokens_per_step=2, block_length=BLOCK - 1)
    assert made.focus_steps == made.forwards
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
