"""A dense decoding of prompts, and how early layers rank the masks at each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from focus_compile.backend import focus_backend
from focus_compile.generation.batch import CachedBatch, CanvasBatch
from focus_compile.generation.decoding import choose, propose
from focus_compile.generation.endings import Endings
from focus_compile.generation.request import criteria
from focus_compile.runtime.ambient import inside
from focus_compile.runtime.session import Session

__all__ = ["DenseStep", "Recorder"]


@dataclass(frozen=True)
class DenseStep:
    """One denoising step of a batch, every token of which was computed.

    Attributes:
        masked: bool ``[B, T]``, as fed; decoded: bool ``[B, T]``, what was decoded after it.
        confidence: fp32 ``[B, T]``, with which each masked token could be decoded, else -1.
        importances: fp32 ``[B, T]`` of each early layer, by its number.
    """

    masked: Tensor
    decoded: Tensor
    confidence: Tensor
    importances: dict[int, Tensor]


class Recorder:
    """Decodes densely, with the backend's own programs, which compute all and tell their scores.

    Programs run as graphs: one is captured for each of the early layers, and run once per step.

    Args:
        layers: how many early layers are looked at, at least 2.
        cached: whether the model is called with a cache of keys and values.

    Raises:
        Unsupported: FOCUS cannot be applied to the model, or it has fewer layers than that.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_token_id: int,
        *,
        block: int,
        threshold: float,
        layers: int = 3,
        cached: bool = True,
    ) -> None:
        self.model, self.token = model, mask_token_id
        self.block, self.threshold, self.cached = block, threshold, cached
        self.programs: dict[int, Callable[..., Any]] = {}
        for layer in range(1, layers):
            options = {
                "mask_token_id": mask_token_id, "strict": True, "exact": True,
                "layers": (layer - 1, layer),
            }  # fmt: skip
            backend = partial(focus_backend, options=options, inner=lambda graph, _: graph)
            self.programs[layer] = torch.compile(model, backend=backend, dynamic=True)

    @torch.no_grad()
    def blocks(
        self, ids: Tensor, real: Tensor, new: int, ends: Sequence[int]
    ) -> Iterator[list[DenseStep]]:
        """The steps of each block of a batch of prompts.

        ids, real: int64 ``[B, P]``, left-padded prompts and 1 where they are; new: tokens at most.
        """
        count = -(-new // self.block)
        if self.cached:
            rows: CachedBatch | CanvasBatch = CachedBatch(
                self.model, ids, real.bool(), count * self.block
            )
        else:
            masks = ids.new_full((len(ids), count * self.block), self.token)
            rows = CanvasBatch(self.model, ids, real.bool(), masks)
        endings = Endings(ids, list(ends), True, criteria(None), None)
        rows.prefill()
        with ExitStack() as stack:
            sessions = {
                layer: stack.enter_context(closing(self._session(layer)))
                for layer in range(len(self.programs) + 1)
            }
            for _ in range(count):
                fill = ends[0] if ends else self.token
                block, masked = rows.open_block(self.block, self.token, fill)
                steps: list[DenseStep] = []
                block = self._denoise(rows, block, masked, sessions, steps)
                yield steps
                rows.commit(block)
                rows.active = endings.observe(rows.sequences, rows.active, self.block)
                if not bool(rows.active.any()):
                    return

    def _session(self, layer: int) -> Session:
        """Its scores are the importance of one layer: the second of its program's, or the first."""
        weights = (0.0, 1.0) if layer else (1.0, 0.0)
        session = Session(self.token, signal=weights, exact=True)
        session.owns_kv = True
        return session

    def _denoise(
        self,
        rows: CachedBatch | CanvasBatch,
        block: Tensor,
        masked: Tensor,
        sessions: dict[int, Session],
        steps: list[DenseStep],
    ) -> Tensor:
        while bool(masked.any()):
            importances: dict[int, Tensor] = {}
            logits = None
            for layer, focus in sessions.items():
                focus.block = rows.block
                focus.reset()
                focus.masked = masked
                rows.model = self.programs[max(1, layer)]  # type: ignore[assignment]
                try:
                    with inside(focus):
                        logits = rows.peek(block)
                finally:
                    rows.model = self.model
                assert focus.scores is not None
                importances[layer] = focus.scores
            assert logits is not None
            where = masked.nonzero()[:, 0]
            before, none = rows.sequences[where], LogitsProcessorList()
            found = propose(logits[masked], masked, before, none, never=self.token)
            chosen = choose(found, masked, "threshold", threshold=self.threshold, count=1)
            steps.append(DenseStep(masked, chosen, found.confidence, importances))
            block = torch.where(chosen, found.tokens, block)
            masked = masked & ~chosen
        return block
