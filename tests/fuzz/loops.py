"""Loops that know nothing of sessions, as published ones are written.

Each is a generator: it yields the ids of a call, is sent the logits, and returns the text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.harness import MASK

Loop = Generator[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Knobs:
    """What varies a loop: tokens per step, confidence, tokens per window, noise, a seed."""

    count: int
    threshold: float
    window: int
    temperature: float
    seed: int


def _predicted(logits: Tensor, knobs: Knobs, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token and confidence of every position, the token by Gumbel noise where there is any."""
    logits = logits.double()
    noisy = logits
    if knobs.temperature:
        uniform = torch.rand(logits.shape, generator=source, dtype=torch.float64)
        noisy = logits - knobs.temperature * (-uniform.clamp_min(1e-9).log()).log()
    token = noisy.argmax(-1)
    return token, logits.softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)


def _most(score: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` best of each row, bool."""
    score = score.masked_fill(~among, -torch.inf)
    ranked = torch.sort(score, dim=1, descending=True, stable=True).indices
    return among & (ranked.argsort(1) < count)


def confident(ids: Tensor, knobs: Knobs) -> Loop:
    """The most confident tokens of the canvas, a fixed number in each step."""
    source = torch.Generator().manual_seed(knobs.seed)
    while bool((ids == MASK).any()):
        logits = yield ids
        token, confidence = _predicted(logits, knobs, source)
        ids = torch.where(_most(confidence, ids == MASK, knobs.count), token, ids)
    return ids


def windows(ids: Tensor, knobs: Knobs) -> Loop:
    """LLaDA's blocks: window after window over one canvas, a fixed number of steps for each."""
    source = torch.Generator().manual_seed(knobs.seed)
    place = torch.arange(ids.shape[1])
    start = int((ids == MASK).any(0).nonzero()[0])
    for first in range(start, ids.shape[1], knobs.window):
        inside = (place >= first) & (place < first + knobs.window)
        for _ in range(-(-knobs.window // knobs.count)):
            logits = yield ids
            token, confidence = _predicted(logits, knobs, source)
            ids = torch.where(_most(confidence, (ids == MASK) & inside, knobs.count), token, ids)
    return ids


def threshold(ids: Tensor, knobs: Knobs) -> Loop:
    """All tokens of enough confidence, at least one."""
    source = torch.Generator().manual_seed(knobs.seed)
    while bool((masked := ids == MASK).any()):
        logits = yield ids
        token, confidence = _predicted(logits, knobs, source)
        sure = (confidence > knobs.threshold) | _most(confidence, masked, 1)
        ids = torch.where(masked & sure, token, ids)
    return ids


def everywhere(ids: Tensor, knobs: Knobs) -> Loop:
    """Whatever is the most probable token, at every mask."""
    while bool((ids == MASK).any()):
        logits = yield ids
        ids = torch.where(ids == MASK, logits.argmax(-1), ids)
    return ids


def suppressed(ids: Tensor, knobs: Knobs) -> Loop:
    """As :func:`confident`, by a score that knows nothing of masks: the mask token is left out."""
    source = torch.Generator().manual_seed(knobs.seed)
    while bool((ids == MASK).any()):
        logits = yield ids
        logits = logits.clone()
        logits[..., MASK] = -torch.inf
        token, confidence = _predicted(logits, knobs, source)
        ids = torch.where(_most(confidence, ids == MASK, knobs.count), token, ids)
    return ids


def scattered(ids: Tensor, knobs: Knobs) -> Loop:
    """Random remasking: places that are drawn, whatever the model says of them."""
    source = torch.Generator().manual_seed(knobs.seed)
    while bool((ids == MASK).any()):
        logits = yield ids
        score = torch.rand(ids.shape, generator=source)
        token = logits[..., :MASK].argmax(-1)
        ids = torch.where(_most(score, ids == MASK, knobs.count), token, ids)
    return ids


def leftmost(ids: Tensor, knobs: Knobs) -> Loop:
    """From left to right."""
    while bool((ids == MASK).any()):
        logits = yield ids
        score = -torch.arange(ids.shape[1]).expand(ids.shape).float()
        token = logits[..., :MASK].argmax(-1)
        ids = torch.where(_most(score, ids == MASK, knobs.count), token, ids)
    return ids


def scheduled(ids: Tensor, knobs: Knobs) -> Loop:
    """Dream's schedule: a share of what is left, by entropy, and all of it in the last step."""
    steps = knobs.window
    for step in range(steps):
        logits = yield ids
        masked = ids == MASK
        share = 1.0 if step == steps - 1 else 1 / (steps - step)
        count = int(int(masked.sum(1).max()) * share)
        log = logits.double().log_softmax(-1)
        entropy = (log.exp() * log).sum(-1)
        ids = torch.where(_most(entropy, masked, count), logits.argmax(-1), ids)
    return ids


LOOPS: dict[str, Callable[[Tensor, Knobs], Loop]] = {
    "confident": confident,
    "windows": windows,
    "threshold": threshold,
    "everywhere": everywhere,
    "suppressed": suppressed,
    "scattered": scattered,
    "leftmost": leftmost,
    "scheduled": scheduled,
}
