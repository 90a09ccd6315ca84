"""Compile before traffic comes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from focus_compile.compiling import shown
from focus_compile.generation.loop import generate

__all__ = ["warmup"]

log = logging.getLogger(__name__)

BLOCKS = 2
"""The first block meets the prompt's cache as it was stored, the second one a cache that grew."""
STEPS = 3
"""Denoising steps of a block: one that opens, one that follows, and the last one."""


def warmup(
    model: nn.Module,
    *,
    batch: int | Sequence[int] = 1,
    block_length: int = 32,
    history: int = 64,
    mask_token_id: int,
    use_cache: bool = True,
    progress: bool = True,
) -> float:
    """Compile all that :func:`~focus_compile.generate` will need, by generating two blocks.

    With symbolic sizes, which ``focus_compile.compile`` asks for, lengths and batches other than
    these compile nothing more, but for a batch of one: give ``batch=(1, 8)`` where both will come.
    A loop of your own calls the model in its own way: run it once instead.

    Args:
        model: compiled; batch: rows, or several numbers of them; history: tokens of a prompt.
        mask_token_id, use_cache: as in ``generate``.
        progress: show on stderr what is being compiled, where that is a terminal.

    Returns:
        the seconds that it took.

    Raises:
        ValueError: a number is less than 1, or the id of the mask token is no row of the embedding.
    """
    batches = [batch] if isinstance(batch, int) else list(batch)
    for name, value in (("batch", min(batches, default=0)), ("history", history)):
        if value < 1:
            raise ValueError(f"warmup: {name}={value}: expected 1 or more")
    device = next(model.parameters()).device
    start = time.perf_counter()
    with (
        Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar,
        shown(bar, task := bar.add_task("warming up", total=len(batches))),
    ):
        for rows in batches:
            ids = torch.full((rows, history), int(mask_token_id == 0), device=device)
            generate(
                model,
                ids,
                mask_token_id=mask_token_id,
                max_new_tokens=BLOCKS * block_length,
                block_length=block_length,
                remasking_strategy="fixed",
                denoising_steps=min(STEPS, block_length),
                use_cache=use_cache,
            )
            bar.advance(task)
    seconds = time.perf_counter() - start
    log.info("warmed up for %s in %.1f s", batches, seconds)
    return seconds
