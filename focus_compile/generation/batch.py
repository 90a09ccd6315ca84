"""The batch that a generation works on: its sequences, and what a model is fed of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from focus_compile.generation.cache import hold
from focus_compile.generation.neighbours import refuse_neighbours
from focus_compile.models.compiled import original
from focus_compile.models.masks import attention_mask, cache_keyword, canvas_arguments

__all__ = ["CachedBatch", "CanvasBatch"]

NO_KEYS = (
    "the model left the cache that it was given empty, or a layer of it: call "
    "generate(use_cache=False), which feeds prompt and blocks together"
)


def _is_transformers(model: nn.Module) -> bool:
    """Whether a model is transformers' own.

    These take a mask of one line for all queries, and ask nothing of a cache but to be updated.
    Others' code may compare the mask's shape with that of the scores, and join keys by itself.
    """
    return type(original(model)).__module__.startswith("transformers.models.")


def _check_windows(cache: DynamicCache, length: int) -> None:
    """A layer with a sliding window caches no more than that, and one mask would serve all layers.

    As long as the window holds the whole text, the layer sees what every other one does.
    """
    layers: list[Any] = cache.layers
    windows = [layer.sliding_window for layer in layers if layer.is_sliding]
    if windows and length > min(windows):
        raise ValueError(
            f"prompt and answer have {length} tokens, and layers of the model a sliding window of "
            f"{min(windows)}, which generate() has no mask for: give shorter prompts or a smaller "
            "max_new_tokens, or, where the model was trained without it, load it with "
            "use_sliding_window=False"
        )


def _laid_out(x: Tensor) -> Tensor:
    """``x`` contiguous, with memory of its own.

    ``contiguous`` leaves strides of dims of size 1, and offsets, as they are; Dynamo looks at both.
    """
    return x.clone(memory_format=torch.contiguous_format)


class CachedBatch:
    """The growing batch: sequences ``[B, L]``, validity of their tokens, rows that go on.

    A cache holds the keys and values of what is decoded: the model is fed one block.
    """

    block: None = None

    def __init__(self, model: nn.Module, ids: Tensor, valid: Tensor, new: int = 0) -> None:
        """``new``: tokens that will follow the prompts.

        Raises:
            ValueError: prompt and answer are longer than the window of a layer.
        """
        self.model = model
        self.sequences, self.valid = ids, valid
        self.active = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        config: Any = model.config
        self.cache, self.keyword = DynamicCache(config=config), cache_keyword(model)
        self.room, self.held = ids.shape[1] + new, False
        _check_windows(self.cache, self.room)

    def forward(self, ids: Tensor, queries: int | None = None) -> Tensor:
        """Logits of the last ``T`` tokens of the rows; the cache must hold those before.

        All of them see the same; ``queries`` is 1 for one line of the mask instead of ``T``.
        """
        length = ids.shape[1]
        layers: list[Any] = self.cache.layers
        for layer in layers if self.held else ():
            layer.open(self.valid.shape[1] - length, length)
        places = self.valid.long().cumsum(1) - 1
        visible = self.valid[:, None, None, :].expand(-1, 1, queries or length, -1).contiguous()
        out = self.model(
            input_ids=ids,
            attention_mask=attention_mask(self.model, visible),
            position_ids=_laid_out(places.clamp_min(0)[:, -length:]),
            use_cache=True,
            **{self.keyword: self.cache},
        )
        logits: Tensor = out.logits
        return logits

    def prefill(self) -> Tensor:
        """Store the keys and values of the prompts, laid out as those of later blocks will be.

        Those of transformers' models go where they stay (:mod:`focus_compile.generation.cache`).
        Others return them transposed, and ``cat`` returns them contiguous: without this, Dynamo
        captures the first block and all others separately. A mask ``[B, 1, P, P]`` would be the
        largest value of all. Returns the logits of the last tokens, ``[B, V]``.
        """
        logits = self.forward(self.sequences, queries=1 if _is_transformers(self.model) else None)
        if not self.cache.is_initialized:
            raise ValueError(NO_KEYS)
        layers: list[Any] = self.cache.layers
        self.held = _is_transformers(self.model) and hold(layers, self.room)
        for layer in () if self.held else layers:
            layer.keys, layer.values = _laid_out(layer.keys), _laid_out(layer.values)
        return logits[:, -1]

    def peek(self, ids: Tensor) -> Tensor:
        """Logits of a block whose keys and values are not kept.

        Where they are written in place, the next call writes others. Else the cache gets its own
        tensors back instead of a cropped view of longer ones: Dynamo sees one layout, and compiles
        one graph.
        """
        if self.held:
            return self.forward(ids)
        layers: list[Any] = self.cache.layers
        before = [(layer, layer.keys, layer.values) for layer in layers]
        logits = self.forward(ids)
        for layer, keys, values in before:
            layer.keys, layer.values = keys, values
        return logits

    def open_block(self, length: int, token: int, fill: int) -> tuple[Tensor, Tensor]:
        """Ids and masks of a new block: masks in active rows, ``fill`` in idle ones."""
        masked = self.active.unsqueeze(1).expand(-1, length)
        self.valid = torch.cat([self.valid, torch.ones_like(masked)], 1)
        return torch.where(masked, token, fill), masked

    def commit(self, block: Tensor) -> Tensor:
        """Store the exact keys and values of a decoded block; logits of its last token."""
        logits = self.forward(block)
        self.sequences = torch.cat([self.sequences, block], 1)
        return logits[:, -1]


class CanvasBatch:
    """A batch of a model without a cache: every call gets the prompt and all blocks.

    Attributes:
        sequences: what is decoded so far, ``[B, L]``; active: rows that go on.
        block: ``(start, stop)``, positions of the block at hand.
        arguments: what the model gets beside the ids (``masks.canvas_arguments``).

    Raises:
        ValueError: prompts are padded, and the model does not keep the padding out.
    """

    def __init__(self, model: nn.Module, ids: Tensor, valid: Tensor, masks: Tensor) -> None:
        self.model = model
        self.sequences = ids
        self.ids = torch.cat([ids, masks], 1)
        self.active = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.block = (ids.shape[1], ids.shape[1])
        seen = torch.cat([valid, torch.ones_like(masks, dtype=torch.bool)], 1)
        if not bool(valid.all()):
            refuse_neighbours(model, self.ids, seen)
        self.arguments = canvas_arguments(model, seen)

    def prefill(self) -> None:
        """Nothing is stored."""

    def peek(self, ids: Tensor) -> Tensor:
        """Logits of the canvas, ``[B, L, V]``."""
        logits: Tensor = self.model(input_ids=ids, **self.arguments).logits
        return logits

    def open_block(self, length: int, _: int, fill: int) -> tuple[Tensor, Tensor]:
        """The canvas, and the masks of the next block in it; idle rows are filled to their ends."""
        start = self.block[1]
        self.block = (start, start + length)
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        idle = ~self.active.unsqueeze(1) & (place >= start)
        inside = (place >= start) & (place < start + length)
        return self.ids.masked_fill(idle, fill), self.active.unsqueeze(1) & inside

    def commit(self, ids: Tensor) -> None:
        """Keep a canvas whose block is decoded."""
        self.ids, self.sequences = ids, ids[:, : self.block[1]]
