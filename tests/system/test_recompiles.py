"""How many graphs a model costs: they do not grow with the lengths of prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import focus_compile
from tests.support.harness import CACHE, MASK, Sizes, bound, build_model

SLOTS, BLOCK, STEPS = 48, 8, 2
LENGTHS = (8, *range(2, 21))
"""Of prompts: the first one is as long as the block, as if that were a rule."""

Model = Callable[..., Any]


class Loop:
    """A denoising loop over one of transformers' caches, which each step gives back as it was."""

    def __init__(self, config: Any, kind: str, batch: int) -> None:
        self.config, self.kind, self.batch = config, kind, batch
        static = kind.startswith("static")
        self.cache: Any = (
            StaticCache(config=config, max_cache_len=SLOTS)
            if static
            else DynamicCache(config=config)
        )
        self.slots = SLOTS if static else None
        self.history = 0

    def call(self, model: Model, ids: Tensor, cache: Any) -> Tensor:
        end = self.history + ids.shape[1]
        visible = torch.zeros(self.batch, 1, ids.shape[1], self.slots or end, dtype=torch.bool)
        visible[..., :end] = True
        positions = torch.arange(self.history, end).expand(self.batch, -1)
        arguments = {"attention_mask": visible, "position_ids": positions, "use_cache": True}
        return model(input_ids=ids, **arguments, **{CACHE: cache}).logits  # type: ignore[no-any-return]

    def store(self, model: Model, ids: Tensor) -> Tensor:
        logits = self.call(model, ids, self.cache)
        self.history += ids.shape[1]
        return logits

    def peek(self, model: Model, ids: Tensor) -> Tensor:
        if self.kind.endswith("cloned"):
            return self.call(model, ids, copy.deepcopy(self.cache))
        logits = self.call(model, ids, self.cache)
        if self.slots is None:
            self.cache.crop(-ids.shape[1])
        else:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.history)
        return logits

    def play(self, model: Model, prompt: Tensor, blocks: int) -> list[Tensor]:
        """Logits of every call."""
        made = [self.store(model, prompt)]
        for _ in range(blocks):
            block = torch.full((self.batch, BLOCK), MASK)
            for step in range(STEPS):
                made.append(self.peek(model, block))
                block[:, step] = 3 + step
            made.append(self.store(model, block.masked_fill(block == MASK, 5)))
        return made


@torch.no_grad()
@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "kind", ["dynamic, cropped", "dynamic, cloned", "static", "static, cloned"]
)
def test_graphs_of_any_number_of_prompts(kind: str, batch: int) -> None:
    """Three at most: an empty cache, one that was stored, one that was cropped."""
    torch._dynamo.reset()
    model = build_model(Sizes(layers=2))
    compiled = focus_compile.compile(model, mask_token_id=MASK)
    for at, length in enumerate(LENGTHS):
        torch.manual_seed(length)
        prompt, blocks = torch.randint(0, MASK, (batch, length)), 1 + length % 2
        with focus_compile.session(exact=True) as focus:
            made = Loop(model.config, kind, batch).play(compiled, prompt, blocks)
        assert focus.stats.steps == STEPS * blocks  # FOCUS is applied in every masked call
        if at % 6 == 0:
            expected = Loop(model.config, kind, batch).play(model, prompt, blocks)
            for ours, theirs in zip(made, expected, strict=True):
                assert (ours - theirs).abs().max().item() <= bound(theirs)
    status = focus_compile.status(compiled)
    assert 1 < status.graphs <= 3 and not status.masked_dense


@torch.no_grad()
@pytest.mark.usefixtures("no_inductor")
def test_batches_share_graphs() -> None:
    """One row has graphs of its own; all other batches have the same ones."""
    torch._dynamo.reset()
    model = build_model(Sizes(layers=2))
    compiled = focus_compile.compile(model, mask_token_id=MASK)
    for batch in (BLOCK, 2, 5, 3, 1, 4):
        prompt = torch.arange(batch * 7).view(batch, 7) % MASK
        with focus_compile.session(exact=True):
            Loop(model.config, "dynamic, cropped", batch).play(compiled, prompt, 1)
    assert focus_compile.status(compiled).graphs <= 6
